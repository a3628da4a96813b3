"""Ids to the owners of their rows: what a batch looks up is planned, then the ranks exchange it once.

Planning is pure: it needs no rank and no row. One process plans as several do and has nothing to exchange.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.stages import stage
from embedtrain.embedding.features import Route, Routes, as_bags, shapes_of
from embedtrain.embedding.ids import faults_of, valid_bags
from embedtrain.embedding.owner_pooling import PooledAtOwners
from embedtrain.embedding.pooling import bags_of
from embedtrain.embedding.pooling_choice import Measured, PoolingChoices, agree, chosen_owner, is_open, measure
from embedtrain.embedding.requests import GroupRequest, LocalRequest, RemoteRequest, Wanted
from embedtrain.embedding.table_group import TableGroup
from embedtrain.jagged import Jagged
from embedtrain.ops._backend import dispatch
from embedtrain.ops._backend.transfer import HostCopy, to_device
from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.sort_unique import OrderedKeys, SortedKeys, order_keys


class Fault(NamedTuple):
    """What may be wrong with ids on a device.

    Attributes:
        num_wrong: scalar int64 on the device; positive if something is.
        explain: raises what it is.
    """

    num_wrong: Tensor
    explain: Callable[[], object]


class Check(NamedTuple):
    """Whether ids on a device are rows, on its way to the host.

    Attributes:
        faults: what may be wrong.
        counts: how much is, of each.
    """

    faults: Sequence[Fault]
    counts: HostCopy

    def run(self) -> None:
        """Raises what is wrong, if anything is; waits for the device if it has not come that far."""
        for fault, count in zip(self.faults, self.counts.values().tolist(), strict=True):
            if count:
                fault.explain()


class Asked(NamedTuple):
    """What one input dist settled, for `EmbeddingCollection.look_up` or `distinct_rows`.

    Attributes:
        names: the features, in the caller's order.
        parts: per table group that is looked up.
        choices: where the ranks pool the bags of the batches that follow; see `EmbeddingCollection.pooling_choices`.
        shapes: of the ids of features without pooling that are tensors [n, k].
        check: of ids on a device that nobody has looked at yet; before rows are read.
    """

    names: tuple[str, ...]
    parts: Sequence[GroupRequest]
    choices: PoolingChoices
    shapes: Mapping[str, torch.Size]
    check: Check | None = None

    def places(self) -> dict[str, Tensor]:
        """Returns per feature [num_values] int64; each value's row among those of `distinct_rows`. Sorts the ids."""
        places: dict[str, Tensor] = {}
        num_before = 0
        for part in self.parts:
            inverse = part.inverse + num_before if num_before else part.inverse
            places.update(zip(part.route.names, inverse.split([bags.num_values for bags in part.bags]), strict=True))
            if len(self.parts) > 1:  # the host waits for this, if keys are sorted on a device
                num_before += part.distinct.unique.numel()
        return places


Planned = tuple[list[Bags], list[Tensor | None], Tensor]
"""What a batch looks up in a group: bags and weights per feature, see `GroupRequest`, and keys."""


class InputDist(ABC):
    """The first stage of a look-up. `input_dist_of` makes the one that fits the ranks.

    Args:
        groups: the groups of tables.
        routes: where features are looked up.
        ranks: those that share the tables.

    Attributes:
        choices: where the next batch's bags are pooled.
        choices_of_evaluation: where those of the next batch without gradients are; empty when an evaluation begins.
    """

    def __init__(self, groups: Sequence[TableGroup], routes: Routes, ranks: Ranks) -> None:
        self.choices: PoolingChoices = {}
        self.choices_of_evaluation: PoolingChoices = {}
        self._groups, self._routes, self._ranks = groups, routes, ranks
        self._no_keys = torch.zeros(0, dtype=torch.int64, device=groups[0].device)
        is_native = dispatch.uses_native(self._no_keys)  # those updates sort for themselves
        self._sorts_ahead = not is_native or any(group.access.is_on_host for group in groups)

    @abstractmethod
    def ask(self, batch: Mapping[str, Jagged | Tensor], *, is_ahead: bool) -> tuple[Asked, dict[int, Tensor]]:
        """Returns what was settled, and by group number the keys of all ids. See `EmbeddingCollection.ask`."""

    def _plan(self, route: Route, batch: Mapping[str, Jagged]) -> tuple[Planned, Fault | None]:
        """Returns what a batch looks up in a group, and what may turn out to be wrong with ids on a device.

        Raises:
            ValueError: an id is refused.
        """
        group = self._groups[route.number]
        features = [batch[name] for name in route.names]
        keys, num_outside = group.keys_of(route.tables, [feature.values for feature in features])
        fault = None
        if isinstance(num_outside, Tensor):
            fault = Fault(faults_of(features, num_outside), lambda: self._valid(route, batch))
            if all(feature.invalid_ids == "error" for feature in route.features):
                num_outside = []  # the caller asks later
            else:
                num_outside, fault = [int(HostCopy(fault.num_wrong).item())], None
        if any(num_outside):
            features = self._valid(route, batch)
            keys, _ = group.keys_of(route.tables, [feature.values for feature in features])
        bags = [
            bags_of(values, feature.pooling, group.device)
            for values, feature in zip(features, route.features, strict=True)
        ]
        weights = [feature.weights for feature in features]
        return (bags, weights, to_device(keys, group.device)), fault

    def _valid(self, route: Route, batch: Mapping[str, Jagged]) -> list[Jagged]:
        shards = self._groups[route.number].shards
        return [
            valid_bags(batch[name], feature, shards[table].spec.num_rows, self._ranks.rank)
            for name, feature, table in zip(route.names, route.features, route.tables, strict=True)
        ]


class LocalInputDist(InputDist):
    """Of one process: it has all rows."""

    def ask(self, batch: Mapping[str, Jagged | Tensor], *, is_ahead: bool) -> tuple[Asked, dict[int, Tensor]]:
        """See `InputDist`."""
        bags = as_bags(batch)
        names = tuple(bags)
        parts: list[LocalRequest] = []
        faults: list[Fault] = []
        for route in self._routes.of(names):
            planned, fault = self._plan(route, bags)
            parts.append(LocalRequest(self._groups[route.number], route, *planned))
            faults += [] if fault is None else [fault]
        if self._sorts_ahead and torch.is_grad_enabled():
            for part in parts:
                part.sort_ahead(is_counted=is_ahead or bool(faults))
        check = Check(faults, HostCopy(torch.stack([fault.num_wrong for fault in faults]))) if faults else None
        if check is not None and not is_ahead:
            check.run()  # the one wait for the device, which also brings the numbers of distinct rows
        shapes = shapes_of(batch, self._routes.features)
        keys = {part.route.number: part.rows for part in parts}
        return Asked(names, parts, self.choices, shapes, check if is_ahead else None), keys


_ROWS, _ANY_ROWS, _IDS_OF_BAGS, _SUMS, _ANY_BAGS, _ANY_WEIGHTS = range(6)
"""What a rank tells another for each group. See `Ranks.ask` of the first two. The three that say whether there is any
are told to every rank alike, so that all know which exchanges take place."""
_IS_WRONG, _FEATURES = range(2)
"""What it tells after the last group: whether its input is wrong, and a checksum of the features that it looks up. What
it measured of each feature whose bags may be pooled on either side follows; see `measure`."""


class SharedInputDist(InputDist):
    """Of several ranks: each distinct row is asked for once, of its owner."""

    def __init__(self, groups: Sequence[TableGroup], routes: Routes, ranks: Ranks) -> None:
        super().__init__(groups, routes, ranks)
        self._open = [name for name, feature in routes.features.items() if is_open(feature)]
        self._uncounted: list[OrderedKeys] = []

    def ask(self, batch: Mapping[str, Jagged | Tensor], *, is_ahead: bool) -> tuple[Asked, dict[int, Tensor]]:
        """See `InputDist`.

        A rank that found its input wrong tells so instead of what it wants, and every rank raises.
        """
        measured: dict[str, Measured] = {}
        # A rank whose input is wrong may not know which groups the others look up: all groups are settled.
        nothing: list[Wanted | None] = [None] * len(self._groups)
        wanted, error = list(nothing), None
        faults: list[Fault] = []
        # An evaluation chooses anew: its choices are of its own batches, and a run that resumes makes the same ones.
        is_training = torch.is_grad_enabled()
        choices = self.choices if is_training else self.choices_of_evaluation
        try:
            bags = as_bags(batch)
            for route in self._routes.of(tuple(bags)):
                wanted[route.number] = self._wanted(route, bags, choices, measured, faults)
        except ValueError as raised:
            wanted, error = nothing, raised
        ranks = self._ranks.beside() if is_ahead else self._ranks
        names = tuple(batch) if isinstance(batch, Mapping) else ()
        requests, heard = self._exchange(wanted, error, faults, names, measured, ranks)
        choices = agree(choices, heard)
        if is_training:
            self.choices = choices
        else:
            self.choices_of_evaluation = choices
        if self._sorts_ahead and is_training:
            for request in requests:
                request.sort_ahead(is_counted=False)
            self._uncounted = [request.home_keys for request in requests if request.home_keys is not None]
        keys = {number: each.keys for number, each in enumerate(wanted) if each is not None}
        return Asked(names, requests, self.choices, shapes_of(batch, self._routes.features)), keys

    def _wanted(
        self,
        route: Route,
        batch: Mapping[str, Jagged],
        choices: PoolingChoices,
        measured: dict[str, Measured],
        faults: list[Fault],
    ) -> Wanted:
        """Decides which features' rows travel here and which owners pool.

        It adds what the decision was made from, and what may turn out to be wrong.
        """
        (bags, weights, keys), fault = self._plan(route, batch)
        faults += [] if fault is None else [fault]
        group = self._groups[route.number]
        own = measure(group, route, bags, weights, keys, choices)
        measured.update(own)
        at_owner = [
            chosen_owner(feature, of_bags, choices.get(name), own.get(name))
            for name, feature, of_bags in zip(route.names, route.features, bags, strict=True)
        ]
        return Wanted(route, bags, weights, at_owner, keys)

    def _exchange(
        self,
        wanted: Sequence[Wanted | None],
        error: Exception | None,
        faults: Sequence[Fault],
        names: tuple[str, ...],
        measured: Mapping[str, Measured],
        ranks: Ranks,
    ) -> tuple[list[GroupRequest], dict[str, Measured]]:
        """Tells every owner which of its rows this rank wants.

        Collective: every rank.

        Returns:
            What is settled by group looked up, and what all ranks measured of each feature, added up.
        """
        num_groups = len(self._groups)
        shape = (ranks.size, num_groups + 1 + len(self._open), 6)
        counts = torch.zeros(shape, dtype=torch.int64, device=self._no_keys.device)
        if error is not None:
            counts[:, num_groups, _IS_WRONG] = 1
        elif faults:
            counts[:, num_groups, _IS_WRONG] = torch.stack([fault.num_wrong for fault in faults]).sum()
        counts[:, num_groups, _FEATURES] = self._routes.checksum_of(names)
        ordered: list[OrderedKeys | SortedKeys] = []
        pooled: list[PooledAtOwners | None] = []
        for number, (group, own) in enumerate(zip(self._groups, wanted, strict=True)):
            keys = self._no_keys if own is None else own.keys_pooled(at_owner=False)
            with stage("unique"):
                ordered.append(order_keys(keys, bound=ranks.size * group.num_local_rows))
            pooled.append(None if own is None else own.pooled_at_owners(group))
            _count(counts[:, number], group, keys, ordered[-1], pooled[-1])
        if measured:
            rows = [measured.get(name, Measured()) for name in self._open]
            counts[:, num_groups + 1 :, : len(Measured._fields)] = to_device(torch.tensor(rows), counts.device)
        (ask, owe), rows_owed = ranks.ask(counts, ordered, [group.num_local_rows for group in self._groups])
        for earlier in self._uncounted:
            earlier.is_counted = True  # the host has just waited for what came after them
        if any(owe[num_groups][_IS_WRONG]):
            ranks.fail_together(error or _explained(faults))
        if len(set(owe[num_groups][_FEATURES])) > 1:
            _refuse_features(ranks.all_gather(sorted(names)))
        requests: list[GroupRequest] = []
        for number, (group, own) in enumerate(zip(self._groups, wanted, strict=True)):
            sums = _exchange_bags(group, pooled[number], ask[number], owe[number])
            if own is None:
                continue
            travelling = (ask[number][_ROWS], owe[number][_ROWS]) if any(owe[number][_ANY_ROWS]) else None
            requests.append(RemoteRequest(group, own, ordered[number], travelling, rows_owed[number], sums))
        heard = {
            name: Measured(*(sum(kind) for kind in told[: len(Measured._fields)]))
            for name, told in zip(self._open, owe[num_groups + 1 :], strict=True)
        }
        return requests, heard


def _explained(faults: Sequence[Fault]) -> Exception | None:
    """Returns what is wrong with this rank's ids on a device, if anything is."""
    for fault in faults:
        try:
            fault.explain()
        except ValueError as error:
            return error
    return None


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


def _count(
    counts: Tensor, group: TableGroup, keys: Tensor, ordered: OrderedKeys | SortedKeys, pooled: PooledAtOwners | None
) -> None:
    """Fills in what this rank asks of each rank for one group; counts: [world_size, 6]."""
    firsts = torch.arange(counts.shape[0] + 1, device=counts.device) * group.num_local_rows
    counts[:, _ROWS] = ordered.num_below(firsts).diff()
    counts[:, _ANY_ROWS] = int(keys.numel() > 0)
    if pooled is not None:
        counts[:, _IDS_OF_BAGS] = pooled.id_counts
        counts[:, _SUMS] = pooled.sum_counts
        counts[:, _ANY_BAGS] = 1
        counts[:, _ANY_WEIGHTS] = int(pooled.is_weighted)


def _exchange_bags(
    group: TableGroup, pooled: PooledAtOwners | None, ask: list[list[int]], owe: list[list[int]]
) -> PooledAtOwners | None:
    """Sends the ids of bags to the owners of their rows, if any rank has any; None else. Collective: every rank.

    Args:
        group: the tables.
        pooled: this rank's bags, if it has any.
        ask: by kind and rank, what this rank asks.
        owe: what it is asked for.
    """
    if not any(owe[_ANY_BAGS]):
        return None
    pooled = pooled or PooledAtOwners(group, [], torch.zeros(0, dtype=torch.int64, device=group.device))
    of_ids, of_sums = ((ask[kind], owe[kind]) for kind in (_IDS_OF_BAGS, _SUMS))
    pooled.exchange(of_ids, of_sums, any(owe[_ANY_WEIGHTS]))
    return pooled


def input_dist_of(groups: Sequence[TableGroup], routes: Routes, ranks: Ranks) -> InputDist:
    """Returns the first stage of look-ups on these ranks."""
    return (LocalInputDist if ranks.size == 1 else SharedInputDist)(groups, routes, ranks)
