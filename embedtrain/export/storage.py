"""Opening output files on any fsspec path: they appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem

from embedtrain.data.codecs import codec_of_name, without_compression
from embedtrain.data.sources import file_system_of
from embedtrain.errors import UserError


def refuse_packed_name(path: str, format: str) -> None:
    """Checks that the name of an uncompressed format does not end in the suffix of a compression.

    Raises:
        UserError: the name ends in such a suffix.
    """
    if (codec := codec_of_name(path)) is not None:
        raise UserError(
            f"{path} ends in the suffix of {codec}, but files of the format {format} are not compressed: name it "
            f"{without_compression(path)}"
        )


def refuse_input(output: str, sources: Iterable[str], option: str) -> None:
    """Checks that the output is not one of the input files.

    Args:
        output: path of the new file.
        sources: paths of the input files.
        option: the option that names the input files, for the message.

    Raises:
        UserError: the output is one of the input files, possibly under another name (a link).
    """
    file_system, name = file_system_of(output)
    for source in sources:
        read_from, source_name = file_system_of(source)
        is_same = type(read_from) is type(file_system) and source_name == name
        if isinstance(file_system, LocalFileSystem) and isinstance(read_from, LocalFileSystem):
            with suppress(OSError):
                is_same = os.path.samefile(source_name, name)
        if is_same:
            raise UserError(f"--output {output} is one of the input files of {option}: give another name")


@contextmanager
def new_files(paths: Sequence[str], overwrite: bool) -> Iterator[list[BinaryIO]]:
    """Opens new files that appear under their names when the block ends, and not at all if it fails.

    Until then they have temporary names in the same folder. Missing folders are created, and removed after a failure.
    Object stores cannot rename, so there each file is copied within the store at the end.

    Raises:
        UserError: a path exists and `overwrite` is false, is a folder, or cannot be written.
    """
    places = [vacant_place(path, overwrite=overwrite) for path in paths]
    missing = sorted({folder for file_system, place in places for folder in _missing_folders(file_system, place)})
    partial = [f"{place}.partial-{os.getpid()}" for _, place in places]
    try:
        with ExitStack() as stack:
            yield [
                stack.enter_context(_open_new(file_system, temporary))
                for (file_system, _), temporary in zip(places, partial, strict=True)
            ]
        for (file_system, place), temporary in zip(places, partial, strict=True):
            file_system.mv(temporary, place)
    except BaseException:
        for (file_system, _), temporary in zip(places, partial, strict=True):
            if file_system.exists(temporary):
                file_system.rm_file(temporary)
        for folder in reversed(missing):  # The deepest first.
            with suppress(OSError):  # It was not created, or others have written to it.
                os.rmdir(folder)
        raise


def _missing_folders(file_system: Any, place: str) -> Iterator[str]:
    """Yields the missing parent folders of a new local file; other file systems have no empty folders."""
    folder = os.path.dirname(place)
    while isinstance(file_system, LocalFileSystem) and folder and not os.path.lexists(folder):
        yield folder
        folder = os.path.dirname(folder)


def vacant_place(path: str, *, overwrite: bool) -> tuple[Any, str]:
    """Returns the fsspec file system of a new file, and the file's path inside it.

    Raises:
        UserError: the path exists and `overwrite` is false, or is a folder.
    """
    file_system, place = file_system_of(path)
    if file_system.isdir(place):
        raise UserError(f"{path} is a folder: give the path of a new file")
    if not overwrite and file_system.exists(place):
        raise UserError(f"{path} already exists: choose another output, or replace it with --overwrite")
    return file_system, place


def _open_new(file_system: Any, path: str) -> Any:
    try:
        file_system.makedirs(file_system._parent(path), exist_ok=True)
        return file_system.open(path, "wb")
    except OSError as error:
        raise UserError(f"cannot write the output: {error}") from error
