"""Compaction: writes one full checkpoint from a chain of deltas."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor

from embedtrain.checkpoint.manifest import TensorInfo
from embedtrain.checkpoint.parts import TensorPart
from embedtrain.checkpoint.reader import CheckpointReader
from embedtrain.checkpoint.writer import Contents, write_checkpoint
from embedtrain.distributed.ranks import ONE_PROCESS

_BLOCK_BYTES = 64 * 2**20


def compact(path: str, checkpoints_path: str) -> str:
    """Writes a full checkpoint that equals the one at `path`, which stays unchanged.

    Runs in one process, not a collective. Every byte read is checked. Uses tens of MiB of memory.

    Args:
        path: a full checkpoint or a delta.
        checkpoints_path: another folder of checkpoints, any fsspec URL; the new checkpoint has the same step.

    Returns:
        The new checkpoint's path.

    Raises:
        CheckpointError: `checkpoints_path` already has a checkpoint of that step, or cannot be written.
        CorruptCheckpointError: the chain is damaged.
    """
    with CheckpointReader(path) as reader:
        parts = [
            TensorPart(
                name,
                info.shape,
                info.dtype,
                info.layout,
                offset=0,
                span=info.shape[0],
                slots=None,
                blocks=functools.partial(_blocks, reader, name, info),
            )
            for name, info in reader.tensors.items()
        ]
        steps = reader.manifest.table_steps
        contents = Contents(reader.step, parts, reader.state, reader.replicated(), table_steps=steps)
        return write_checkpoint(checkpoints_path, contents, ONE_PROCESS).path


def _blocks(reader: CheckpointReader, name: str, info: TensorInfo) -> Iterator[Tensor]:
    num_rows = info.shape[0] if info.row_bytes else 0
    block_rows = max(1, _BLOCK_BYTES // max(1, info.row_bytes))
    for start in range(0, num_rows, block_rows):
        yield reader.read(name, start, min(start + block_rows, num_rows))
