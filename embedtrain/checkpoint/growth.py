"""Tables of a checkpoint with more rows: the old ones moved to where the larger table has them."""

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
    """Returns a larger table and its optimizer's state, to be written to another checkpoint.

    Rows that the checkpoint has are taken over bit for bit. New ones have the values that a new run would give them:
    those of their slot in the larger table, and the state's first value. About 16 MiB of rows are held at a time.

    Args:
        reader: the checkpoint.
        spec: the larger table.
        states: what the optimizer keeps for a row.
        old_ids: [spec.num_rows] int64; the id in the checkpoint of each id, -1 for a new one.
        seed: of new rows.
        slots: those that this rank writes.

    Raises:
        CheckpointError: the checkpoint's table has another dim or dtype, other states, or its rows lie in an order
            that this version does not know.
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
    """Yields the rows of the larger tensor at some slots, in order."""
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
        raise CheckpointError(f"{reader.path} has no tensor {name!r}, but {', '.join(sorted(reader.tensors))}")
    return info.shape[0]


def _check(reader: CheckpointReader, name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> None:
    info = reader.tensors[name]
    found, expected = (info.shape[1:], info.dtype, dict(info.layout)), (shape, dtype, layout.description)
    if found != expected:
        raise CheckpointError(
            f"{reader.path}: expected {name} with rows of shape, dtype and layout {expected}, found {found}"
        )
