"""Where vectors are read from and exported to: any fsspec path."""

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
    """Refuses the name of a compressed file for a format whose readers expect none.

    Raises:
        UserError: the name ends in the suffix of a compression.
    """
    if (codec := codec_of_name(path)) is not None:
        raise UserError(
            f"{path}: a file of the format {format} is not compressed, and its readers do not expect {codec}: give "
            f"{without_compression(path)}, or another name"
        )


def refuse_input(output: str, sources: Iterable[str], option: str) -> None:
    """Refuses to replace a file that is read.

    Args:
        output: path of the new file.
        sources: paths of the files that are read.
        option: by which these were given.

    Raises:
        UserError: the output is one of them, whatever the two are called.
    """
    file_system, name = file_system_of(output)
    for source in sources:
        read_from, source_name = file_system_of(source)
        is_same = type(read_from) is type(file_system) and source_name == name
        if isinstance(file_system, LocalFileSystem) and isinstance(read_from, LocalFileSystem):
            with suppress(OSError):
                is_same = os.path.samefile(source_name, name)
        if is_same:
            raise UserError(f"--output {output} is a file of {option}: give another name")


@contextmanager
def new_files(paths: Sequence[str], overwrite: bool) -> Iterator[list[BinaryIO]]:
    """Opens files that appear under their names when the block ends, and not at all when it fails.

    Until then they have temporary names beside their places. Missing folders are made, and go again if it fails.
    On object stores, which cannot rename, the end is a copy within the store.

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
        for folder in reversed(missing):  # the deepest first
            with suppress(OSError):  # it was not made, or others have put something in it
                os.rmdir(folder)
        raise


def _missing_folders(file_system: Any, place: str) -> Iterator[str]:
    """Yields the folders above a new local file that are not there; other file systems need not have empty ones."""
    folder = os.path.dirname(place)
    while isinstance(file_system, LocalFileSystem) and folder and not os.path.lexists(folder):
        yield folder
        folder = os.path.dirname(folder)


def vacant_place(path: str, *, overwrite: bool) -> tuple[Any, str]:
    """Returns the fsspec file system of the path of a new file, and the path inside it.

    Raises:
        UserError: the path exists and `overwrite` is false, or is a folder.
    """
    file_system, place = file_system_of(path)
    if file_system.isdir(place):
        raise UserError(f"expected the path of a new file, but {path} is a folder")
    if not overwrite and file_system.exists(place):
        raise UserError(f"{path} is already there; choose another output, or replace it by --overwrite")
    return file_system, place


def _open_new(file_system: Any, path: str) -> Any:
    try:
        file_system.makedirs(file_system._parent(path), exist_ok=True)
        return file_system.open(path, "wb")
    except OSError as error:
        raise UserError(f"cannot write the output: {error}") from error
