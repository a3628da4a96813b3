"""The collectives of the project. `group` is always an argument; None means a job of one process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedtrain.distributed.runtime import rank_of
from embedtrain.distributed.shared_memory import SharedMemoryExchange
from embedtrain.distributed.stages import count_sent, stage
from embedtrain.errors import UserError

T = TypeVar("T")


def all_to_all_rows(
    rows: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: dist.ProcessGroup | None,
    shared: SharedMemoryExchange | None = None,
) -> Tensor:
    """Sends consecutive runs of rows to the ranks in order, and returns what they sent, by rank.

    Collective: every rank of `group`.

    Args:
        rows: [sum(send_counts), ...] contiguous.
        send_counts: rows for each rank.
        receive_counts: rows from each rank.
        shared: the ranks' shared memory, where they have it: the way that is taken then.

    Returns:
        [sum(receive_counts), ...]; `rows` itself where there is no group.
    """
    if group is None:
        return rows
    if shared is not None:
        with stage("exchange"):
            return shared.all_to_all(rows, send_counts, receive_counts)
    received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    count_sent((len(rows) - send_counts[dist.get_rank(group)]) * rows.shape[1:].numel() * rows.element_size())
    with stage("exchange"):
        dist.all_to_all_single(received, rows.contiguous(), list(receive_counts), list(send_counts), group=group)
    return received


def all_gather_rows(
    rows: Tensor,
    counts: Sequence[int],
    group: dist.ProcessGroup | None,
    shared: SharedMemoryExchange | None = None,
) -> Tensor:
    """Returns the rows of every rank, in rank order, with gradients that find their way back.

    Backward sums the gradients that the ranks have for a row, in rank order.

    Collective: every rank of `group`, and its backward too.

    Args:
        rows: [counts[rank], dim].
        counts: rows of each rank.
        shared: as in `all_to_all_rows`.

    Returns:
        [sum(counts), dim]; `rows` itself where there is no group.
    """
    if group is None:
        return rows
    gathered: Tensor = _AllGatherRows.apply(rows, list(counts), group, shared)  # type: ignore[no-untyped-call]
    return gathered


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup, shared: SharedMemoryExchange | None
    ) -> Tensor:
        ctx.counts, ctx.group, ctx.shared = counts, group, shared
        return all_to_all_rows(rows.repeat(len(counts), 1), [rows.shape[0]] * len(counts), counts, group, shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        num_rows = ctx.counts[rank_of(ctx.group)]
        parts = all_to_all_rows(grad, ctx.counts, [num_rows] * len(ctx.counts), ctx.group, ctx.shared)
        return parts.view(len(ctx.counts), num_rows, grad.shape[1]).sum(dim=0), None, None, None


def all_reduce_sum(
    values: Tensor, group: dist.ProcessGroup | None, shared: SharedMemoryExchange | None = None
) -> Tensor:
    """Sums `values` over the ranks, in place, and returns them. Collective: every rank of `group`."""
    if shared is not None:
        return shared.all_reduce_sum(values)
    if group is not None:
        size = dist.get_world_size(group)
        count_sent(2 * (size - 1) * values.nbytes // size)  # in a ring
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group)
    return values


def all_gather_object(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Returns the ranks' values in rank order. Collective: every rank of `group`."""
    if group is None:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: T, group: dist.ProcessGroup | None, src: int = 0) -> T:
    """Returns the value of rank `src` of `group`. Collective: every rank of `group`."""
    if group is None:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, group_src=src, group=group)
    return holder[0]


def raise_together(error: BaseException | None, group: dist.ProcessGroup | None) -> None:
    """Raises on every rank when any rank passes an error, so that no rank is left waiting for it.

    A rank with an error of its own raises that; the others raise what the lowest failing rank reports: the
    same class and text for a UserError, else a RuntimeError with that rank's number and traceback.

    Collective: every rank of `group`.
    """
    report: tuple[type[Exception], str] | None = None
    if isinstance(error, UserError):
        report = (type(error), str(error))
    elif error is not None:
        trace = "".join(traceback.format_exception(error))
        report = (RuntimeError, f"rank {rank_of(group)} failed:\n{trace}")
    reports = all_gather_object(report, group)
    if error is not None:
        raise error
    for found in reports:
        if found is not None:
            error_type, text = found
            raise error_type(text)


def run_on_each(function: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Runs `function` on every rank and returns this rank's result, or raises on all what failed on any.

    Collective: every rank of `group`.
    """
    try:
        result = function()
    except Exception as error:
        raise_together(error, group)
        raise
    raise_together(None, group)
    return result


def run_on_first(function: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Runs `function` on rank 0 and returns its result, or raises its error, on every rank.

    Collective: every rank of `group`.
    """
    result = run_on_each(lambda: function() if rank_of(group) == 0 else None, group)
    return broadcast_object(result, group)  # type: ignore[return-value]
