"""Chains: a delta, the checkpoint that it changes, and so on back to the one that holds all rows."""

from __future__ import annotations

from embedtrain import storage
from embedtrain.checkpoint.manifest import MANIFEST_NAME, Manifest, decode, step_folder_name
from embedtrain.errors import CheckpointError, CorruptCheckpointError


def read_manifest(path: str) -> Manifest:
    """Returns the manifest of the checkpoint at `path`.

    Raises:
        CheckpointError: there is no complete checkpoint, or a newer embedtrain wrote it.
        CorruptCheckpointError: the manifest is not what was written.
    """
    url = storage.join(path, MANIFEST_NAME)
    try:
        data = storage.read(url)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST_NAME}") from error
    except OSError as error:
        raise CheckpointError(f"{url} could not be read: {error}") from error
    return decode(data, url)


def read_chain(path: str) -> list[tuple[str, Manifest]]:
    """Returns path and manifest of each checkpoint that the rows of the one at `path` lie in, all rows first.

    Raises:
        CheckpointError: as `read_manifest`.
        CorruptCheckpointError: a manifest is not what was written, or a delta's parent is missing, or is
            another checkpoint than the one that the delta was saved after.
    """
    chain = [(path, read_manifest(path))]
    while (parent := chain[0][1].parent) is not None:
        child_path, child = chain[0]
        parent_path = parent_path_of(child_path, child)
        if MANIFEST_NAME not in storage.list_files(parent_path):
            raise CorruptCheckpointError(f"{child_path} holds changes to {parent_path}, which is missing")
        found = read_manifest(parent_path)
        if found.checksum != parent.checksum:
            raise CorruptCheckpointError(
                f"{child_path} holds changes to another checkpoint than the one that is now {parent_path}"
            )
        if _kinds(found) != _kinds(child):
            raise CorruptCheckpointError(f"{child_path} does not hold the tensors of {parent_path}")
        chain.insert(0, (parent_path, found))
    return chain


def parent_path_of(path: str, manifest: Manifest) -> str:
    """Returns the folder of the checkpoint that the delta at `path` changes."""
    if manifest.parent is None:
        raise ValueError(f"{path} is not a delta")
    return storage.join(path.rstrip("/").rpartition("/")[0], step_folder_name(manifest.parent.step))


def _kinds(manifest: Manifest) -> dict[str, object]:
    return {name: (info.shape, info.dtype, info.layout) for name, info in manifest.tensors.items()}
