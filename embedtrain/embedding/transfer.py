"""What travels for a look-up: ids to the owners of their rows, the rows back, and gradients home."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.distributed.collectives import all_to_all_rows
from embedtrain.distributed.shared_memory import SharedMemoryExchange
from embedtrain.distributed.stages import stage
from embedtrain.embedding.shard import RowGroup
from embedtrain.ops._backend.row_memory import empty_buffer
from embedtrain.ops.gather_rows import gather_rows


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
        for rank, arrived in enumerate(shared.receive(row_shape, wire_dtype)):
            if rank != shared.rank:
                targets[rank].copy_(arrived)
    return vectors


def ask_through_memory(
    shared: SharedMemoryExchange, counts: Tensor, keys: Sequence[Tensor], rows_per_rank: Sequence[int], column: int
) -> tuple[Tensor, list[Tensor]]:
    """Tells every rank the counts and the rows that go with them, in one exchange.

    Collective: every rank that shares the memory.

    Args:
        shared: the memory.
        counts: [world_size, groups + 1, kinds] int64; what this rank tells each.
        keys: per group ascending keys, see `RowGroup.keys_of`; none at all where this rank's input was wrong.
        rows_per_rank: of each group, local rows of a rank.
        column: where `counts` hold how many keys of a group are a rank's.

    Returns:
        The counts that each rank told this one, of the shape of `counts`, and per group the local rows that they
        ask of this rank, [n] int64, by asking rank.
    """
    head = counts[0].numel()
    parts = [of_group.split(counts[:, group, column].tolist()) for group, of_group in enumerate(keys)]
    letters = []
    for rank, told_to_rank in enumerate(counts):
        rows = [part[rank] - rank * num_rows for part, num_rows in zip(parts, rows_per_rank, strict=False)]
        letters.append(torch.cat([told_to_rank.flatten(), *rows]))
    with stage("exchange"):
        arrived = shared.exchange(letters)
        told = torch.stack([letter[:head].view_as(counts[0]) for letter in arrived])
        if not keys:
            return told, []
        rows_by_rank = [
            letter[head:].split(num_rows)
            for letter, num_rows in zip(arrived, told[:, : len(keys), column].tolist(), strict=True)
        ]
        return told, [torch.cat(of_group) for of_group in zip(*rows_by_rank, strict=True)]


def send_gradients(group: RowGroup, grad: Tensor, ask_counts: Sequence[int], owe_counts: Sequence[int]) -> list[Tensor]:
    """Sends the gradients of rows to their owners, and returns those of this rank's rows by the rank that asked.

    Collective: every rank of the group's process group.

    Args:
        group: the tables.
        grad: [sum(ask_counts), dim] float32; of the rows that this rank asked for, by owner.
        ask_counts: how many from each rank.
        owe_counts: how many for each rank.

    Returns:
        Per rank [count, dim] float32. What this rank asked of itself is a view of `grad`, if not rounded on the way.
    """
    wired = grad.to(group.gradient_wire_dtype)
    shared = group.shared
    if shared is None:
        received = all_to_all_rows(wired, ask_counts, owe_counts, group.process_group).float()
        return list(received.split(list(owe_counts)))
    with stage("exchange"):
        return [
            # The memory is the sender's, which writes to it again soon.
            part.float() if rank == shared.rank else empty_buffer(*part.shape).copy_(part)
            for rank, part in enumerate(shared.exchange(wired.split(list(ask_counts))))
        ]
