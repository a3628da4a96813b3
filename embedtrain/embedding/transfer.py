"""Rows from their owners to the ranks that asked for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.distributed.collectives import all_to_all_rows
from embedtrain.distributed.shared_memory import SharedMemoryExchange
from embedtrain.embedding.shard import RowGroup
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.row_memory import empty_buffer
from embedtrain.stages import stage


def fetch_rows(
    group: RowGroup, rows: Tensor, owe_counts: Sequence[int], ask_counts: Sequence[int], dtype: torch.dtype | None
) -> Tensor:
    """Returns the rows that this rank asked for, [sum(ask_counts), dim], by owner.

    Collective: every rank of the group's process group.

    Args:
        group: the tables.
        rows: [sum(owe_counts)] int64; the local rows that each rank asked for.
        owe_counts: how many for each rank.
        ask_counts: how many from each rank.
        dtype: of the result; None for that of the wire.
    """
    dtype = dtype or group.vector_wire_dtype
    weight, places = group.rows_to_pool(rows)
    if group.shared is not None:
        owed = places.split(list(owe_counts))
        return _fetch_from_memory(weight, group.vector_wire_dtype, group.shared, owed, ask_counts, dtype)
    owned = gather_rows(weight, places, group.vector_wire_dtype)
    return all_to_all_rows(owned, owe_counts, ask_counts, group.process_group).to(dtype)


def _fetch_from_memory(
    weight: Tensor,
    wire_dtype: torch.dtype,
    shared: SharedMemoryExchange,
    owed: Sequence[Tensor],
    ask_counts: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Has owners gather into memory that the others read, and a rank's own rows where they are wanted."""
    row_shape = weight.shape[1:]
    with stage("exchange"):
        for rank, room in enumerate(shared.rooms([len(rows) for rows in owed], row_shape, wire_dtype)):
            if rank != shared.rank:
                gather_rows(weight, owed[rank], out=room)
        shared.send()
        vectors = empty_buffer(sum(ask_counts), *row_shape, dtype=dtype)
        targets = vectors.split(list(ask_counts))
        own_rows, own_target = owed[shared.rank], targets[shared.rank]
        if wire_dtype == weight.dtype:
            gather_rows(weight, own_rows, out=own_target)
        else:
            own_target.copy_(gather_rows(weight, own_rows, wire_dtype))  # rounded as the others' rows are
        for rank, arrived in enumerate(shared.receive(ask_counts, row_shape, wire_dtype)):
            if rank != shared.rank:
                targets[rank].copy_(arrived)
    return vectors
