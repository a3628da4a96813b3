"""The exchange of rows between ranks: ids to their owners, vectors back, gradients home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.stages import stage
from embedtrain.embedding.owner_pooling import BagsAsked, SumRequest
from embedtrain.embedding.table_group import TableGroup
from embedtrain.ops import dispatch
from embedtrain.ops.pool_rows import Bags, grad_of_weights, pool_rows, pool_rows_backward
from embedtrain.ops.row_gradient import Delivery, Run
from embedtrain.ops.sort_unique import OrderedKeys, SortedKeys, order_keys, sort_unique


@dataclass(frozen=True)
class Lookup:
    """What this rank looks up in one group of tables.

    Attributes:
        keys: [num_keys] int64; see `TableGroup.keys_of`. Of the rows that travel here.
        bags: the bags that the owners of their rows pool; None where there are none.
        at_owner: per feature of the batch, whether it is among `bags`.
        runs: of the keys, where one rank has all rows.
    """

    keys: Tensor
    bags: BagsAsked | None = None
    at_owner: Sequence[bool] = ()
    runs: Sequence[Run] = ()


class RowRequest:
    """What one id exchange settled for one group of tables.

    Attributes:
        keys: [num_keys] int64; see `Lookup`.
        at_owner, runs: likewise.
        sums: what it settled for bags pooled at the owners; None where no rank has any.
        has_rows: whether any rank asks for rows, which every rank knows.
        ask_counts: distinct rows that this rank asks of each rank; none where it has all rows itself.
        owe_counts: rows that each rank asks of this one.
        rows: [sum(owe_counts)] int64; the local rows asked for, by asking rank.
        ordered_rows: the same in order, after `sort_ahead`.
    """

    def __init__(
        self,
        lookup: Lookup,
        bound: int,
        ordered: OrderedKeys | SortedKeys | None = None,
        ask_counts: Sequence[int] = (),
        owe_counts: Sequence[int] = (),
        rows: Tensor | None = None,
        *,
        sums: SumRequest | None = None,
        has_rows: bool = True,
    ) -> None:
        self.keys, self.at_owner, self.runs = lookup.keys, lookup.at_owner, lookup.runs
        self._bound = bound  # all keys are below it
        self.ask_counts = list(ask_counts)
        self.owe_counts = list(owe_counts)
        self._rows = rows
        self._ordered = ordered
        self.ordered_rows: OrderedKeys | None = None
        self.sums = sums
        self.has_rows = has_rows

    @property
    def is_local(self) -> bool:
        """Whether this rank has all rows itself: then a key is its local row."""
        return self._rows is None

    @property
    def rows(self) -> Tensor:
        """The local rows that this rank hands out and takes gradients for."""
        return self.distinct.unique if self._rows is None else self._rows

    @property
    def rows_read(self) -> Tensor:
        """[n] int64; the local rows that this rank reads for the request, those whose bags it pools too; may repeat."""
        if self._rows is None:
            return self.keys
        return self._rows if self.sums is None else torch.cat([self._rows, self.sums.rows])

    @property
    def distinct(self) -> SortedKeys:
        """The distinct keys; sorted when first asked for, which a look-up without gradient never does."""
        if self._ordered is None:
            with stage("unique"):
                self._ordered = sort_unique(self.keys, bound=self._bound, with_inverse=False)
        return self._ordered.sorted

    @property
    def inverse(self) -> Tensor:
        """[num_keys] int64; where each key's row lies among the distinct ones."""
        if self._ordered is None or self._ordered.inverse is None:
            with stage("unique"):
                self._ordered = order_keys(self.keys, bound=self._bound)
        assert self._ordered.inverse is not None
        return self._ordered.inverse

    def sort_ahead(self) -> None:
        """Sorts the rows that ranks ask for, which the update will need, where that is not part of the update."""
        if self._rows is not None and not dispatch.uses_native(self._rows):
            self.ordered_rows = OrderedKeys(self._rows)


_ROWS, _ANY_ROWS, _IDS_OF_BAGS, _SUMS, _ANY_BAGS, _ANY_WEIGHTS = range(6)
"""What a rank tells another for each group; word of an error follows the last group. See `Ranks.ask` of the first two.
The three that say whether there is any are told to every rank alike, so that all know which exchanges take place."""


def exchange_ids(
    groups: Sequence[TableGroup],
    lookups: Sequence[Lookup],
    error: Exception | None,
    ranks: Ranks,
) -> list[RowRequest]:
    """Tells every owner which of its rows this rank needs; each distinct row is asked for once.

    A rank that found its input wrong passes the error instead of keys: word of it travels with the counts,
    and every rank raises before any row moves.

    Collective: every rank, with the same groups.

    Args:
        groups: the groups of tables looked up.
        lookups: what this rank looks up in each. Ignored where there is an error.
        error: what was wrong with this rank's input, or None.
        ranks: by which the ids travel.
    """
    if ranks.size == 1:
        if error is not None:
            raise error
        return [RowRequest(lookup, group.num_local_rows) for group, lookup in zip(groups, lookups, strict=True)]
    device = groups[0].device
    counts = torch.zeros(ranks.size, len(groups) + 1, 6, dtype=torch.int64, device=device)
    if error is not None:
        counts[:, -1] = 1
        lookups = [Lookup(torch.zeros(0, dtype=torch.int64, device=device))] * len(groups)
    ordered: list[OrderedKeys | SortedKeys] = []
    for place, (group, lookup) in enumerate(zip(groups, lookups, strict=True)):
        with stage("unique"):
            ordered.append(order_keys(lookup.keys, bound=ranks.size * group.num_local_rows))
        _count(counts[:, place], group, lookup, ordered[-1])
    distinct = [each.sorted.unique for each in ordered]
    (ask, owe), rows = ranks.ask(counts, distinct, [group.num_local_rows for group in groups])
    if any(owe[-1][_ROWS]):
        ranks.fail_together(error)
    return [
        _settle(group, lookup, keys, (ask[place], owe[place]), rows[place], ranks)
        for place, (group, lookup, keys) in enumerate(zip(groups, lookups, ordered, strict=True))
    ]


def _count(counts: Tensor, group: TableGroup, lookup: Lookup, ordered: OrderedKeys | SortedKeys) -> None:
    """Fills in what this rank asks of each rank for one group; counts: [world_size, 6]."""
    firsts = torch.arange(counts.shape[0] + 1, device=counts.device) * group.num_local_rows
    counts[:, _ROWS] = ordered.num_below(firsts).diff()
    counts[:, _ANY_ROWS] = int(lookup.keys.numel() > 0)
    if lookup.bags is not None:
        counts[:, _IDS_OF_BAGS] = lookup.bags.id_counts
        counts[:, _SUMS] = lookup.bags.sum_counts
        counts[:, _ANY_BAGS] = 1
        counts[:, _ANY_WEIGHTS] = int(lookup.bags.is_weighted)


def _settle(
    group: TableGroup,
    lookup: Lookup,
    ordered: OrderedKeys | SortedKeys,
    counts: tuple[list[list[int]], list[list[int]]],
    rows: Tensor,
    ranks: Ranks,
) -> RowRequest:
    """Makes one group's request; the ids of bags travel if any rank has bags.

    Args:
        counts: of what is asked of each rank, and owed to it.
        rows: the local rows asked of this rank.
    """
    ask, owe = counts
    sums = None
    if any(owe[_ANY_BAGS]):
        sums = SumRequest(
            group,
            lookup.bags or BagsAsked(group, [], lookup.keys.new_zeros(0)),
            (ask[_IDS_OF_BAGS], owe[_IDS_OF_BAGS]),
            (ask[_SUMS], owe[_SUMS]),
            is_weighted=any(owe[_ANY_WEIGHTS]),
            ranks=ranks,
        )
    return RowRequest(
        lookup,
        ranks.size * group.num_local_rows,
        ordered,
        ask[_ROWS],
        owe[_ROWS],
        rows,
        sums=sums,
        has_rows=any(owe[_ANY_ROWS]),
    )


def exchange_vectors(group: TableGroup, request: RowRequest) -> Tensor:
    """Fetches the distinct rows that this rank asked for, as float32; [num_distinct, dim].

    In backward, the gradient of each row travels to its owner and waits there.

    Collective: every rank of the group's process group, and its backward too.
    """
    vectors: Tensor = _ExchangeVectors.apply(group.anchor, group, request)  # type: ignore[no-untyped-call]
    return vectors


def look_up_bags(
    group: TableGroup, request: RowRequest, bags: Sequence[Bags], weights: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Fetches rows and pools them, for all features of a group at once.

    In backward, the gradients of all features are summed by row, travel to the rows' owners and wait there.

    Collective: every rank of the group's process group, and its backward too.

    Args:
        group: the tables.
        request: the rows and sums; its keys are those of the features that are pooled here, one after the other.
        bags: the features; their weights, where there are any, are detached.
        weights: the same weights as the caller gave them, for their own gradient.

    Returns:
        Per feature [num_bags, dim] float32.
    """
    # Autograd takes its time over each argument, and most features have no weights.
    learned = weights if any(weight is not None and weight.requires_grad for weight in weights) else ()
    pooled: tuple[Tensor, ...] = _LookUpBags.apply(group.anchor, group, request, bags, *learned)  # type: ignore[no-untyped-call]
    return pooled


def _fetch(group: TableGroup, request: RowRequest, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the distinct rows; `dtype` is None for what traveled."""
    if request.is_local:
        return group.read(request.rows, dtype)
    if not request.has_rows:
        return torch.zeros(0, group.weight.shape[1], dtype=dtype or group.weight.dtype, device=group.device)
    weight, places = group.rows_to_pool(request.rows)
    wire_dtype = group.vector_wire_dtype
    return group.ranks.all_to_all_gather(
        weight, places, request.owe_counts, request.ask_counts, wire_dtype, dtype or wire_dtype
    )


def _send_home(group: TableGroup, request: RowRequest, grad: Tensor) -> None:
    if not request.has_rows:
        return
    grads = [grad]
    if not request.is_local:
        wired = grad.to(group.gradient_wire_dtype)
        grads = group.ranks.all_to_all_split(wired, request.ask_counts, request.owe_counts, torch.float32)
    # Rows of one rank are distinct; several ranks may ask for the same.
    bags = [Bags(len(part)) for part in grads]
    group.deliver(Delivery(request.rows, bags, grads, is_unique=request.is_local, ordered=request.ordered_rows))


class _ExchangeVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, group: TableGroup, request: RowRequest) -> Tensor:
        ctx.group, ctx.request = group, request
        return _fetch(group, request, torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        _send_home(ctx.group, ctx.request, grad)
        return None, None, None


class _LookUpBags(torch.autograd.Function):
    """One function for both ways to pool, so that every rank runs the same collectives in the same order."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, group: TableGroup, request: RowRequest, bags: Sequence[Bags], *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.request, ctx.bags = group, request, bags
        here = _pooled_here(request, bags)
        # One rank pools straight from the table.
        source, index = (
            group.rows_to_pool(request.keys) if request.is_local else (_fetch(group, request), request.inverse)
        )
        ctx.vectors = (source, index) if any(ctx.needs_input_grad[4:]) else None
        pooled_here = pool_rows(source, index, [bags[number] for number in here]) if here else []
        pooled_there = request.sums.fetch() if request.sums is not None else []
        if not pooled_there:
            return tuple(pooled_here)
        vectors_here, vectors_there = iter(pooled_here), iter(pooled_there)
        return tuple(next(vectors_there if is_there else vectors_here) for is_there in request.at_owner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        group, request, bags = ctx.group, ctx.request, ctx.bags
        here = _pooled_here(request, bags)
        if request.is_local:
            group.deliver(Delivery(request.keys, bags, grads, runs=request.runs))
        elif request.has_rows:
            own = [bags[number] for number in here]
            dim = group.weight.shape[1]
            summed = (
                pool_rows_backward([grads[number] for number in here], own, request.distinct, dim)
                if own
                else torch.zeros(0, dim, device=group.device)
            )
            _send_home(group, request, summed)
        if request.sums is not None:
            request.sums.send_home([grad for number, grad in enumerate(grads) if number not in here])
        of_weights: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 4)
        if ctx.vectors is not None:
            source, index = ctx.vectors
            parts = index.split([bags[number].num_values for number in here])
            for number, part in zip(here, parts, strict=True):
                grad = grads[number]
                if ctx.needs_input_grad[4 + number] and grad is not None:
                    of_weights[number] = grad_of_weights(source, part, bags[number], grad)
        return None, None, None, None, *of_weights


def _pooled_here(request: RowRequest, bags: Sequence[Bags]) -> list[int]:
    """Returns the positions of the features whose rows travel to this rank."""
    at_owner = request.at_owner or [False] * len(bags)
    return [number for number, is_there in enumerate(at_owner) if not is_there]
