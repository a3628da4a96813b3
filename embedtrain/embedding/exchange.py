"""The exchange of rows between ranks: ids to their owners, vectors back, gradients home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedtrain.distributed.collectives import all_to_all_rows, raise_together
from embedtrain.distributed.runtime import size_of
from embedtrain.embedding.shard import RowGroup


@dataclass(frozen=True)
class RowRequest:
    """What one id exchange settled for one group of tables.

    Attributes:
        inverse: [num_keys] int64; where each key's row lies among the distinct rows.
        ask_counts: distinct rows that this rank asks of each rank.
        owe_counts: rows that each rank asks of this one.
        rows: [sum(owe_counts)] int64; the local rows asked for, by asking rank.
    """

    inverse: Tensor
    ask_counts: list[int]
    owe_counts: list[int]
    rows: Tensor


def exchange_ids(
    groups: Sequence[RowGroup],
    keys: Sequence[Tensor],
    error: Exception | None,
    process_group: dist.ProcessGroup | None,
) -> list[RowRequest]:
    """Tells every owner which of its rows this rank needs; each distinct row is asked for once.

    A rank that found its input wrong passes the error instead of keys: word of it travels with the counts,
    and every rank raises before any row moves.

    Collective: every rank of `process_group`, with the same groups.

    Args:
        groups: the groups of tables looked up.
        keys: [n] int64 per group; see `RowGroup.keys_of`. Ignored where there is an error.
        error: what was wrong with this rank's input, or None.
    """
    if process_group is None:
        if error is not None:
            raise error
        return [_request_from_self(group_keys) for group_keys in keys]
    world_size = size_of(process_group)
    device = groups[0].weight.device
    distinct: list[tuple[Tensor, Tensor]] = []
    counts = torch.zeros(world_size, len(groups) + 1, dtype=torch.int64, device=device)
    if error is None:
        distinct = [torch.unique(group_keys, return_inverse=True) for group_keys in keys]
        ranks = torch.arange(world_size + 1, device=device)
        for column, (group, (unique, _)) in enumerate(zip(groups, distinct, strict=True)):
            counts[:, column] = torch.searchsorted(unique, ranks * group.num_local_rows).diff()
    else:
        counts[:, -1] = 1
    owed = torch.empty_like(counts)
    dist.all_to_all_single(owed, counts, group=process_group)
    ask, owe = torch.stack([counts, owed]).tolist()  # the step's one wait for the device
    if any(row[-1] for row in owe):
        raise_together(error, process_group)
    requests = []
    for column, (group, (unique, inverse)) in enumerate(zip(groups, distinct, strict=True)):
        ask_counts, owe_counts = [row[column] for row in ask], [row[column] for row in owe]
        rows = all_to_all_rows(unique % group.num_local_rows, ask_counts, owe_counts, process_group)
        requests.append(RowRequest(inverse, ask_counts, owe_counts, rows))
    return requests


def _request_from_self(keys: Tensor) -> RowRequest:
    # With one rank a key is its local row.
    rows, inverse = torch.unique(keys, return_inverse=True)
    return RowRequest(inverse, [rows.numel()], [rows.numel()], rows)


def exchange_vectors(group: RowGroup, request: RowRequest) -> Tensor:
    """Fetches the distinct rows that this rank asked for, as float32; [sum(ask_counts), dim].

    In backward, the gradient of each row travels to its owner and waits there. The loss is a mean over the
    local batch; the gradient of the mean over the global batch is their sum divided by the world size, which
    happens here and nowhere else.

    Collective: every rank of the group's process group, and its backward too.
    """
    # Rows are not leaves of the graph: the anchor makes autograd call backward, which delivers them.
    anchor = torch.empty(0, device=group.weight.device, requires_grad=torch.is_grad_enabled())
    vectors: Tensor = _ExchangeVectors.apply(anchor, group, request)  # type: ignore[no-untyped-call]
    return vectors


class _ExchangeVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, group: RowGroup, request: RowRequest) -> Tensor:
        ctx.group, ctx.request = group, request
        owned = group.weight.index_select(0, request.rows)
        vectors = all_to_all_rows(owned, request.owe_counts, request.ask_counts, group.process_group)
        return vectors.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        group, request = ctx.group, ctx.request
        if group.process_group is not None:
            grad = grad / size_of(group.process_group)
        home = all_to_all_rows(grad, request.ask_counts, request.owe_counts, group.process_group)
        group.deliver(request.rows, home)
        return None, None, None
