"""Chains of checkpoints: a full checkpoint followed by deltas, each of which changes the checkpoint before it."""

from __future__ import annotations

from embedtrain import storage
from embedtrain.checkpoint.manifest import MANIFEST_NAME, Manifest, decode, step_folder_name
from embedtrain.errors import CheckpointError, CorruptCheckpointError


def read_manifest(path: str) -> Manifest:
    """Returns the manifest of the checkpoint at `path`.

    Raises:
        CheckpointError: there is no complete checkpoint, or a newer embedtrain wrote it.
        CorruptCheckpointError: the manifest is damaged.
    """
    url = storage.join(path, MANIFEST_NAME)
    try:
        data = storage.read(url)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST_NAME}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {url}: {error}") from error
    return decode(data, url)


def read_chain(path: str) -> list[tuple[str, Manifest]]:
    """Returns (path, manifest) of every checkpoint that the one at `path` is made of, the full checkpoint first.

    Raises:
        CheckpointError: see `read_manifest`.
        CorruptCheckpointError: a manifest is damaged, or a delta's parent is missing or was replaced by
            another checkpoint.
    """
    chain = [(path, read_manifest(path))]
    while (parent := chain[0][1].parent) is not None:
        child_path, child = chain[0]
        parent_path = parent_path_of(child_path, child)
        if MANIFEST_NAME not in storage.list_files(parent_path):
            raise CorruptCheckpointError(f"{child_path} is a delta of {parent_path}, which is missing")
        found = read_manifest(parent_path)
        if found.checksum != parent.checksum:
            raise CorruptCheckpointError(
                f"{child_path} is a delta of another checkpoint than the one now in {parent_path}"
            )
        if _kinds(found) != _kinds(child):
            raise CorruptCheckpointError(f"{child_path} is a delta of {parent_path} but has other tensors")
        chain.insert(0, (parent_path, found))
    return chain


def parent_path_of(path: str, manifest: Manifest) -> str:
    """Returns the path of the parent of the delta at `path`; ValueError if it is not a delta."""
    if manifest.parent is None:
        raise ValueError(f"{path} is not a delta")
    return storage.join(path.rstrip("/").rpartition("/")[0], step_folder_name(manifest.parent.step))


def _kinds(manifest: Manifest) -> dict[str, object]:
    return {name: (info.shape, info.dtype, info.layout) for name, info in manifest.tensors.items()}
