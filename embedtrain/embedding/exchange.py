"""The exchange of rows between ranks: ids to their owners, vectors back, gradients home."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedtrain.distributed.collectives import all_to_all_rows, raise_together
from embedtrain.distributed.runtime import size_of
from embedtrain.embedding.shard import RowGroup
from embedtrain.ops.pool_rows import Bags, grad_of_weights, pool_rows, pool_rows_backward
from embedtrain.ops.sort_unique import SortedKeys, sort_unique
from embedtrain.stages import stage


class RowRequest:
    """What one id exchange settled for one group of tables.

    Attributes:
        keys: [num_keys] int64; see `RowGroup.keys_of`.
        ask_counts: distinct rows that this rank asks of each rank; none where it has all rows itself.
        owe_counts: rows that each rank asks of this one.
        rows: [sum(owe_counts)] int64; the local rows asked for, by asking rank.
    """

    def __init__(
        self,
        keys: Tensor,
        bound: int,
        distinct: SortedKeys | None = None,
        ask_counts: Sequence[int] = (),
        owe_counts: Sequence[int] = (),
        rows: Tensor | None = None,
    ) -> None:
        self.keys = keys
        self._bound = bound  # all keys are below it
        self.ask_counts = list(ask_counts)
        self.owe_counts = list(owe_counts)
        self._rows = rows
        self._distinct = distinct

    @property
    def is_local(self) -> bool:
        """Whether this rank has all rows itself: then a key is its local row."""
        return self._rows is None

    @property
    def rows(self) -> Tensor:
        """The local rows that this rank hands out and takes gradients for."""
        return self.distinct.unique if self._rows is None else self._rows

    @property
    def distinct(self) -> SortedKeys:
        """The distinct keys; sorted when first asked for, which a look-up without gradient never does."""
        if self._distinct is None:
            with stage("unique"):
                self._distinct = sort_unique(self.keys, bound=self._bound, with_inverse=False)
        return self._distinct

    @property
    def inverse(self) -> Tensor:
        """[num_keys] int64; where each key's row lies among the distinct ones."""
        if self._distinct is None or self._distinct.inverse is None:
            with stage("unique"):
                self._distinct = sort_unique(self.keys, bound=self._bound)
        assert self._distinct.inverse is not None
        return self._distinct.inverse


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
    world_size = size_of(process_group)
    if world_size == 1:
        if error is not None:
            raise error
        return [RowRequest(group_keys, group.num_local_rows) for group, group_keys in zip(groups, keys, strict=True)]
    device = groups[0].device
    distinct: list[SortedKeys] = []
    counts = torch.zeros(world_size, len(groups) + 1, dtype=torch.int64, device=device)
    if error is None:
        ranks = torch.arange(world_size + 1, device=device)
        for column, (group, group_keys) in enumerate(zip(groups, keys, strict=True)):
            with stage("unique"):
                distinct.append(sort_unique(group_keys, bound=world_size * group.num_local_rows))
            counts[:, column] = torch.searchsorted(distinct[-1].unique, ranks * group.num_local_rows).diff()
    else:
        counts[:, -1] = 1
    shared = groups[0].shared
    owed = all_to_all_rows(counts, [1] * world_size, [1] * world_size, process_group, shared)
    ask, owe = torch.stack([counts, owed]).tolist()  # the step's one wait for the device
    if any(row[-1] for row in owe):
        raise_together(error, process_group)
    requests = []
    for column, (group, group_keys) in enumerate(zip(groups, keys, strict=True)):
        ask_counts, owe_counts = [row[column] for row in ask], [row[column] for row in owe]
        # Half the bytes, where local rows fit.
        wire_type = torch.int32 if group.num_local_rows < 1 << 31 else torch.int64
        wanted = (distinct[column].unique % group.num_local_rows).to(wire_type)
        rows = all_to_all_rows(wanted, ask_counts, owe_counts, process_group, shared).long()
        requests.append(
            RowRequest(group_keys, world_size * group.num_local_rows, distinct[column], ask_counts, owe_counts, rows)
        )
    return requests


def exchange_vectors(group: RowGroup, request: RowRequest) -> Tensor:
    """Fetches the distinct rows that this rank asked for, as float32; [num_distinct, dim].

    In backward, the gradient of each row travels to its owner and waits there.

    Collective: every rank of the group's process group, and its backward too.
    """
    vectors: Tensor = _ExchangeVectors.apply(_anchor(group), group, request)  # type: ignore[no-untyped-call]
    return vectors


def look_up_bags(
    group: RowGroup, request: RowRequest, bags: Sequence[Bags], weights: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Fetches rows and pools them, for all features of a group at once.

    In backward, the gradients of all features are summed by row, travel to the rows' owners and wait there.

    Collective: every rank of the group's process group, and its backward too.

    Args:
        group: the tables.
        request: the rows; its keys are the features' one after the other.
        bags: the features; their weights, where there are any, are detached.
        weights: the same weights as the caller gave them, for their own gradient.

    Returns:
        Per feature [num_bags, dim] float32.
    """
    pooled: tuple[Tensor, ...] = _LookUpBags.apply(_anchor(group), group, request, bags, *weights)  # type: ignore[no-untyped-call]
    return pooled


def _anchor(group: RowGroup) -> Tensor:
    # Rows are not leaves of the graph: the anchor makes autograd call backward, which delivers them.
    return torch.empty(0, device=group.device, requires_grad=torch.is_grad_enabled())


def _fetch(group: RowGroup, request: RowRequest, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the distinct rows; `dtype` is None for what traveled."""
    if request.is_local:
        return group.read(request.rows, dtype)
    owned = group.read(request.rows, group.vector_wire_dtype)
    vectors = all_to_all_rows(owned, request.owe_counts, request.ask_counts, group.process_group, group.shared)
    return vectors if dtype is None else vectors.to(dtype)


def _send_home(group: RowGroup, request: RowRequest, grad: Tensor) -> None:
    if not request.is_local:
        wired = grad.to(group.gradient_wire_dtype)
        grad = all_to_all_rows(wired, request.ask_counts, request.owe_counts, group.process_group, group.shared).float()
    group.deliver(request.rows, grad)


class _ExchangeVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, group: RowGroup, request: RowRequest) -> Tensor:
        ctx.group, ctx.request = group, request
        return _fetch(group, request, torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        _send_home(ctx.group, ctx.request, grad)
        return None, None, None


class _LookUpBags(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, group: RowGroup, request: RowRequest, bags: Sequence[Bags], *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.request, ctx.bags = group, request, bags
        # One rank pools straight from the table, where the device has it.
        is_in_place = request.is_local and not group.is_on_host
        source = group.weight if is_in_place else _fetch(group, request)
        index = request.keys if is_in_place else request.inverse
        ctx.vectors = (source, index) if any(ctx.needs_input_grad[4:]) else None
        return tuple(pool_rows(source, index, bags))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        group, request, bags = ctx.group, ctx.request, ctx.bags
        summed = pool_rows_backward(grads, bags, request.distinct, group.weight.shape[1])
        _send_home(group, request, summed)
        of_weights: list[Tensor | None] = [None] * len(bags)
        if ctx.vectors is not None:
            source, index = ctx.vectors
            parts = index.split([feature.num_values for feature in bags])
            for number, (feature, part, grad) in enumerate(zip(bags, parts, grads, strict=True)):
                if ctx.needs_input_grad[4 + number] and grad is not None:
                    of_weights[number] = grad_of_weights(source, part, feature, grad)
        return None, None, None, None, *of_weights
