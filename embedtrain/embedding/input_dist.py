"""Ids to the owners of their rows: what a batch looks up is planned, then the ranks exchange it once.

Planning is pure: it needs no rank and no row. One process plans as several do and has nothing to exchange.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.stages import stage
from embedtrain.embedding.features import Route, Routes, as_bags
from embedtrain.embedding.ids import valid_bags
from embedtrain.embedding.owner_pooling import BagsAsked, BagsOwed, choose_owner, id_type
from embedtrain.embedding.pooling import bags_of
from embedtrain.embedding.requests import LocalRows, NoRows, RemoteRows, RowRequest
from embedtrain.embedding.table_group import TableGroup
from embedtrain.jagged import Jagged
from embedtrain.ops._backend.transfer import to_device
from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.sort_unique import OrderedKeys, SortedKeys, order_keys


class GroupAsked(NamedTuple):
    """What a batch looks up in one group of tables, and what the ranks settled about it.

    Attributes:
        group: the tables.
        route: the features, in order of their tables.
        bags: per feature how its vectors are pooled.
        weights: per feature the weights as the caller gave them, for their own gradient.
        at_owner: per feature whether the owners of its rows pool its bags.
        rows: those that travel to the examples; they are of the features that are pooled there.
        sums: those that owners make; None if no rank wants any.
    """

    group: TableGroup
    route: Route
    bags: Sequence[Bags]
    weights: Sequence[Tensor | None]
    at_owner: Sequence[bool]
    rows: RowRequest
    sums: BagsOwed | None


class Asked(NamedTuple):
    """What one input dist settled, for `EmbeddingCollection.look_up` or `distinct_rows`.

    Attributes:
        names: the features, in the caller's order.
        parts: per group of tables that is looked up.
    """

    names: tuple[str, ...]
    parts: Sequence[GroupAsked]

    def places(self) -> dict[str, Tensor]:
        """Returns per feature [num_values] int64; each value's row among those of `distinct_rows`. Sorts the ids."""
        places: dict[str, Tensor] = {}
        num_before = 0
        for part in self.parts:
            inverse = part.rows.inverse + num_before if num_before else part.rows.inverse
            places.update(zip(part.route.names, inverse.split([bags.num_values for bags in part.bags]), strict=True))
            if len(self.parts) > 1:  # the host waits for this, if keys are sorted on a device
                num_before += part.rows.distinct.unique.numel()
        return places


class _Plan(NamedTuple):
    """What this rank looks up in one group of tables, before ranks know of each other.

    Attributes:
        route, bags, weights: see `GroupAsked`.
        keys: [num_values] int64; see `TableGroup.keys_of`.
    """

    route: Route
    bags: Sequence[Bags]
    weights: Sequence[Tensor | None]
    keys: Tensor


class InputDist(ABC):
    """The first stage of a look-up. `input_dist_of` makes the one that fits the ranks.

    Args:
        groups: the groups of tables.
        routes: where features are looked up.
        ranks: those that share the tables.
    """

    def __init__(self, groups: Sequence[TableGroup], routes: Routes, ranks: Ranks) -> None:
        self._groups, self._routes, self._ranks = groups, routes, ranks
        self._no_keys = torch.zeros(0, dtype=torch.int64, device=groups[0].device)

    @abstractmethod
    def ask(self, batch: Mapping[str, Jagged | Tensor], *, is_ahead: bool) -> tuple[Asked, list[Tensor]]:
        """Returns what was settled, and per group looked up the keys of all ids. See `EmbeddingCollection.ask`."""

    def _plans(self, given: Mapping[str, Jagged | Tensor]) -> list[_Plan]:
        """Returns what this rank looks up.

        Raises:
            ValueError: a feature does not exist, or an id is refused.
        """
        batch = as_bags(given)
        return [self._plan(route, batch) for route in self._routes.of(tuple(batch))]

    def _plan(self, route: Route, batch: Mapping[str, Jagged]) -> _Plan:
        group = self._groups[route.number]
        features = [batch[name] for name in route.names]
        keys, num_outside = group.keys_of(route.tables, [feature.values for feature in features])
        if any(num_outside):
            features = [
                valid_bags(bags, feature, group.shards[table].spec.num_rows, self._ranks.rank)
                for bags, feature, table in zip(features, route.features, route.tables, strict=True)
            ]
            keys, _ = group.keys_of(route.tables, [feature.values for feature in features])
        bags = [
            bags_of(values, feature.pooling, group.device)
            for values, feature in zip(features, route.features, strict=True)
        ]
        return _Plan(route, bags, [feature.weights for feature in features], to_device(keys, group.device))


class LocalInputDist(InputDist):
    """Of one process: it has all rows."""

    def ask(self, batch: Mapping[str, Jagged | Tensor], *, is_ahead: bool) -> tuple[Asked, list[Tensor]]:
        """See `InputDist`."""
        parts, keys = [], []
        for plan in self._plans(batch):
            group = self._groups[plan.route.number]
            runs = group.runs_of(plan.route.tables, [bags.num_values for bags in plan.bags])
            rows = LocalRows(group, plan.keys, runs)
            at_owner = [False] * len(plan.bags)
            parts.append(GroupAsked(group, plan.route, plan.bags, plan.weights, at_owner, rows, None))
            keys.append(plan.keys)
        return Asked(tuple(batch), parts), keys


_ROWS, _ANY_ROWS, _IDS_OF_BAGS, _SUMS, _ANY_BAGS, _ANY_WEIGHTS = range(6)
"""What a rank tells another for each group. See `Ranks.ask` of the first two. The three that say whether there is any
are told to every rank alike, so that all know which exchanges take place."""
_FEATURES = _ANY_ROWS
"""After the last group a rank tells, in the place of `_ROWS`, whether it found an error, and here which features it
looks up."""


class SharedInputDist(InputDist):
    """Of several ranks: each distinct row is asked for once, of its owner."""

    def ask(self, batch: Mapping[str, Jagged | Tensor], *, is_ahead: bool) -> tuple[Asked, list[Tensor]]:
        """See `InputDist`.

        A rank that found its input wrong tells so instead of what it wants, and every rank raises.
        """
        plans: list[_Plan] = []
        error: Exception | None = None
        # A rank whose input is wrong may not know which groups the others look up: all groups are settled.
        wanted = [_Wanted(self._no_keys, None, ()) for _ in self._groups]
        try:
            plans = self._plans(batch)
            for plan in plans:
                wanted[plan.route.number] = self._wanted(plan)
        except ValueError as raised:
            error = raised
            wanted = [_Wanted(self._no_keys, None, ()) for _ in self._groups]
        ranks = self._ranks.beside() if is_ahead else self._ranks
        names = tuple(batch) if isinstance(batch, Mapping) else ()
        settled = self._exchange(wanted, error, names, ranks)
        parts = []
        for plan in plans:
            number = plan.route.number
            rows, sums = settled[number]
            if is_ahead:
                rows.sort_ahead()
            at_owner = wanted[number].at_owner
            parts.append(GroupAsked(self._groups[number], plan.route, plan.bags, plan.weights, at_owner, rows, sums))
        return Asked(names, parts), [plan.keys for plan in plans]

    def _wanted(self, plan: _Plan) -> _Wanted:
        """Parts the features of a group into those whose rows travel here and those that owners pool."""
        group = self._groups[plan.route.number]
        at_owner = choose_owner(group, plan.route.features, plan.bags, plan.weights, plan.keys)
        if not any(at_owner):
            return _Wanted(plan.keys, None, at_owner)
        parts = plan.keys.split([bags.num_values for bags in plan.bags])
        sides = [
            [part for part, is_there in zip(parts, at_owner, strict=True) if is_there == side] for side in (False, True)
        ]
        here, there = (torch.cat([self._no_keys, *side]) for side in sides)
        asked = [bags for bags, is_there in zip(plan.bags, at_owner, strict=True) if is_there]
        return _Wanted(here, BagsAsked(group, asked, there), at_owner)

    def _exchange(
        self, wanted: Sequence[_Wanted], error: Exception | None, names: tuple[str, ...], ranks: Ranks
    ) -> list[tuple[RowRequest, BagsOwed | None]]:
        """Tells every owner which of its rows this rank wants; returns what is settled by group.

        Collective: every rank.
        """
        counts = torch.zeros(ranks.size, len(self._groups) + 1, 6, dtype=torch.int64, device=self._no_keys.device)
        if error is not None:
            counts[:, -1, _ROWS] = 1
        counts[:, -1, _FEATURES] = self._routes.checksum_of(names)
        ordered: list[OrderedKeys | SortedKeys] = []
        for number, (group, own) in enumerate(zip(self._groups, wanted, strict=True)):
            with stage("unique"):
                ordered.append(order_keys(own.keys, bound=ranks.size * group.num_local_rows))
            _count(counts[:, number], group, own, ordered[-1])
        distinct = [each.sorted.unique for each in ordered]
        (ask, owe), rows = ranks.ask(counts, distinct, [group.num_local_rows for group in self._groups])
        if any(owe[-1][_ROWS]):
            ranks.fail_together(error)
        if len(set(owe[-1][_FEATURES])) > 1:
            _refuse_features(ranks.all_gather(sorted(names)))
        return [
            (
                RemoteRows(group, ordered[number], ask[number][_ROWS], owe[number][_ROWS], rows[number])
                if any(owe[number][_ANY_ROWS])
                else NoRows(group, ordered[number]),
                _exchange_bags(group, wanted[number].bags, (ask[number], owe[number]), ranks),
            )
            for number, group in enumerate(self._groups)
        ]


class _Wanted(NamedTuple):
    """What this rank wants of one group of tables.

    Attributes:
        keys: of the rows that travel here.
        bags: those that owners pool, if there are any.
        at_owner: see `GroupAsked`.
    """

    keys: Tensor
    bags: BagsAsked | None
    at_owner: Sequence[bool]


def _refuse_features(names: Sequence[Sequence[str]]) -> NoReturn:
    """Raises, on every rank, which features each rank looks up."""
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for rank, own in enumerate(names):
        ranks_of.setdefault(tuple(own), []).append(rank)
    found = "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {', '.join(own)}"
        for own, ranks in ranks_of.items()
    )
    raise ValueError(
        f"the ranks look up different features ({found}). Every rank looks up the same ones in a step: give a feature "
        "that a rank has no ids of an empty tensor"
    )


def _count(counts: Tensor, group: TableGroup, wanted: _Wanted, ordered: OrderedKeys | SortedKeys) -> None:
    """Fills in what this rank asks of each rank for one group; counts: [world_size, 6]."""
    firsts = torch.arange(counts.shape[0] + 1, device=counts.device) * group.num_local_rows
    counts[:, _ROWS] = ordered.num_below(firsts).diff()
    counts[:, _ANY_ROWS] = int(wanted.keys.numel() > 0)
    if wanted.bags is not None:
        counts[:, _IDS_OF_BAGS] = wanted.bags.id_counts
        counts[:, _SUMS] = wanted.bags.sum_counts
        counts[:, _ANY_BAGS] = 1
        counts[:, _ANY_WEIGHTS] = int(wanted.bags.is_weighted)


def _exchange_bags(
    group: TableGroup, asked: BagsAsked | None, counts: tuple[list[list[int]], list[list[int]]], ranks: Ranks
) -> BagsOwed | None:
    """Sends the ids of bags to the owners of their rows, if any rank has any; None else. Collective: every rank.

    Args:
        counts: of what is asked of each rank, and owed to it.
    """
    ask, owe = counts
    if not any(owe[_ANY_BAGS]):
        return None
    asked = asked or BagsAsked(group, [], torch.zeros(0, dtype=torch.int64, device=group.device))
    is_weighted = any(owe[_ANY_WEIGHTS])
    payload = asked.payload(id_type(group), is_weighted)
    owed = ranks.all_to_all(payload, ask[_IDS_OF_BAGS], owe[_IDS_OF_BAGS])
    return BagsOwed(group, asked, (ask[_SUMS], owe[_SUMS]), owed, is_weighted=is_weighted)


def input_dist_of(groups: Sequence[TableGroup], routes: Routes, ranks: Ranks) -> InputDist:
    """Returns the first stage of look-ups on these ranks."""
    return (LocalInputDist if ranks.size == 1 else SharedInputDist)(groups, routes, ranks)
