"""Growth of a checkpoint's tables: old rows are copied to their slots in the larger table, new rows are added."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from embedtrain.checkpoint.parts import TensorPart
from embedtrain.checkpoint.reader import CheckpointReader
from embedtrain.embedding.init import initial_rows
from embedtrain.errors import CheckpointError
from embedtrain.optim.stores import RowState
from embedtrain.sharding.layout import Layout, layout_of
from embedtrain.spec import TableSpec

_BLOCK_BYTES = 16 << 20


def grown_parts(
    reader: CheckpointReader, spec: TableSpec, states: Sequence[RowState], old_ids: Tensor, seed: int, slots: range
) -> list[TensorPart]:
    """Returns the parts of a larger table and its optimizer state, to be written to a new checkpoint.

    Existing rows are copied bit for bit. New rows get the initial values that a new run would give to their slots,
    and the initial optimizer state. About 16 MiB of rows are held in memory at a time.

    Args:
        reader: the checkpoint of the smaller table.
        spec: the larger table.
        states: the optimizer's state per row.
        old_ids: [spec.num_rows] int64; for each new id its id in the checkpoint, or -1 if the row is new.
        seed: seed of the initial values of new rows.
        slots: the slots that this rank writes.

    Raises:
        CheckpointError: the checkpoint's table has another dim, dtype, optimizer state or layout.
    """
    tensors: list[tuple[str, tuple[int, ...], torch.dtype, Callable[[int, int], Tensor]]]
    tensors = [("weight", (spec.dim,), spec.dtype, functools.partial(_draw, spec, seed))]
    for state in states:
        shape: tuple[int, ...] = (spec.dim,) if state.per_element else ()
        tensors.append((state.name, shape, torch.float32, functools.partial(_fill, shape, state.fill)))
    new = layout_of(spec.num_rows, kind=spec.layout)
    parts = []
    for name, row_shape, dtype, fresh in tensors:
        full_name = f"{spec.name}/{name}"
        old = layout_of(reader.table(spec.name).shape[0], kind=spec.layout)
        _check(reader, full_name, row_shape, dtype, old)
        blocks = functools.partial(_blocks, reader, full_name, (old, new), old_ids, fresh, slots)
        global_shape = (spec.num_rows, *row_shape)
        parts.append(TensorPart(full_name, global_shape, dtype, new.description, slots.start, len(slots), None, blocks))
    return parts


def _blocks(
    reader: CheckpointReader,
    name: str,
    layouts: tuple[Layout, Layout],
    old_ids: Tensor,
    fresh: Callable[[int, int], Tensor],
    slots: range,
) -> Iterator[Tensor]:
    """Yields the rows of the larger tensor at `slots`, in order, in blocks of about 16 MiB."""
    old, new = layouts
    block_rows = max(1, _BLOCK_BYTES // reader.tensors[name].row_bytes)
    for start in range(slots.start, slots.stop, block_rows):
        stop = min(start + block_rows, slots.stop)
        rows = fresh(start, stop)
        ids = old_ids[new.id_of(torch.arange(start, stop))]
        is_old = ids >= 0
        rows[is_old] = reader.gather(name, old.slot_of(ids[is_old]))
        yield rows


def _draw(spec: TableSpec, seed: int, start: int, stop: int) -> Tensor:
    return initial_rows(spec, start, stop, seed)


def _fill(shape: tuple[int, ...], value: float, start: int, stop: int) -> Tensor:
    return torch.full((stop - start, *shape), value)


def _rows_of(reader: CheckpointReader, name: str) -> int:
    info = reader.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{reader.path} has no tensor {name!r}; it has {', '.join(sorted(reader.tensors))}")
    return info.shape[0]


def _check(reader: CheckpointReader, name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> None:
    info = reader.tensors[name]
    found, expected = (info.shape[1:], info.dtype, dict(info.layout)), (shape, dtype, layout.description)
    if found != expected:
        raise CheckpointError(
            f"{reader.path}: {name} must have rows of shape, dtype and layout {expected}, but has {found}"
        )
