"""Input dist: plans what a batch looks up, then sends the ids to the owners of their rows in one exchange.

Planning needs no other rank and reads no rows. A single process plans in the same way, but exchanges nothing.
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
    """Holds a check of ids on a device whose result the host does not know yet.

    Attributes:
        num_wrong: scalar int64 on the device; number of faults.
        explain: raises the error that describes the first fault.
    """

    num_wrong: Tensor
    explain: Callable[[], object]


class Check(NamedTuple):
    """Holds the checks of a batch whose results are being copied to the host.

    Attributes:
        faults: the checks.
        counts: `num_wrong` of each check, in a copy to the host.
    """

    faults: Sequence[Fault]
    counts: HostCopy

    def run(self) -> None:
        """Raises the error of the first check that found a fault; waits for the copy."""
        for fault, count in zip(self.faults, self.counts.values().tolist(), strict=True):
            if count:
                fault.explain()


class Asked(NamedTuple):
    """Holds a batch whose ids were exchanged, for `EmbeddingCollection.look_up` or `distinct_rows`.

    Attributes:
        names: names of the features, in the caller's order.
        parts: one request per table group that is looked up.
        choices: pooling choices for the following batches; see `EmbeddingCollection.pooling_choices`.
        shapes: shape of the ids of each feature without pooling whose ids are a tensor [n, k].
        check: checks of ids on a device that must run before rows are read; None if all ids are checked.
    """

    names: tuple[str, ...]
    parts: Sequence[GroupRequest]
    choices: PoolingChoices
    shapes: Mapping[str, torch.Size]
    check: Check | None = None

    def gradient_buffer(self, num_rows: int) -> Tensor | None:
        """Returns memory for the gradient of `distinct_rows` that is sent home without a copy; None if there is none.

        Args:
            num_rows: number of rows of the gradient, of all groups.
        """
        # The groups of a collection have the same ranks and wire dtypes.
        return self.parts[0].group.gradient_buffer(num_rows) if self.parts else None

    def places(self) -> dict[str, Tensor]:
        """Returns, per feature, the index of each value's row in the result of `distinct_rows`; [num_values] int64.

        Sorts the ids if they are not sorted yet.
        """
        places: dict[str, Tensor] = {}
        num_before = 0
        for part in self.parts:
            inverse = part.inverse + num_before if num_before else part.inverse
            places.update(zip(part.route.names, inverse.split([bags.num_values for bags in part.bags]), strict=True))
            if len(self.parts) > 1:  # a device sync if keys are sorted on a device, so avoided for a single group
                num_before += part.distinct.unique.numel()
        return places


Planned = tuple[list[Bags], list[Tensor | None], Tensor]
"""The plan of a batch for one table group: bags and weights per feature as in `GroupRequest`, and keys."""


class InputDist(ABC):
    """Sends ids to the owners of their rows, the first stage of a look-up. `input_dist_of` returns an implementation.

    Args:
        groups: the table groups.
        routes: the tables in which features are looked up.
        ranks: the ranks that share the tables.

    Attributes:
        choices: pooling choices for the next batch with gradients.
        choices_of_evaluation: pooling choices for the next batch without gradients; empty when an evaluation begins.
    """

    def __init__(self, groups: Sequence[TableGroup], routes: Routes, ranks: Ranks) -> None:
        self.choices: PoolingChoices = {}
        self.choices_of_evaluation: PoolingChoices = {}
        self._groups, self._routes, self._ranks = groups, routes, ranks
        self._no_keys = torch.zeros(0, dtype=torch.int64, device=groups[0].device)
        is_native = dispatch.uses_native(self._no_keys)  # native updates sort the rows themselves
        self._sorts_ahead = not is_native or any(group.access.is_on_host for group in groups)

    @abstractmethod
    def ask(self, batch: Mapping[str, Jagged | Tensor], *, is_ahead: bool) -> tuple[Asked, dict[int, Tensor]]:
        """Returns the exchanged batch, and the keys of all ids by group index. See `EmbeddingCollection.ask`."""

    def _plan(self, route: Route, batch: Mapping[str, Jagged]) -> tuple[Planned, Fault | None]:
        """Returns the plan of a batch for one group, and a check if ids on a device are not yet checked.

        Raises:
            ValueError: ids or lengths are already known to be invalid.
        """
        group = self._groups[route.number]
        features = [batch[name] for name in route.names]
        keys, num_outside = group.keys_of(route.tables, [feature.values for feature in features])
        fault = None
        if isinstance(num_outside, Tensor):
            fault = Fault(faults_of(features, num_outside), lambda: self._valid(route, batch))
            if all(feature.invalid_ids == "error" for feature in route.features):
                num_outside = []  # the caller runs the check later, without a device sync here
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
    """Implements the input dist of a single process, which owns all rows."""

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
            check.run()  # the only device sync of the step, which also brings the numbers of distinct rows
        shapes = shapes_of(batch, self._routes.features)
        keys = {part.route.number: part.rows for part in parts}
        return Asked(names, parts, self.choices, shapes, check if is_ahead else None), keys


_ROWS, _ANY_ROWS, _IDS_OF_BAGS, _SUMS, _ANY_BAGS, _ANY_WEIGHTS = range(6)
"""Numbers that a rank sends to each other rank for each group. `Ranks.ask` documents the first two. The three `_ANY_`
flags have the same value for all receivers, so that all ranks know which exchanges take place."""
_IS_WRONG, _FEATURES = range(2)
"""Numbers that follow those of the groups: whether this rank's input is invalid, and a checksum of the features that it
looks up. Then follow the measurements of each feature whose bags may be pooled on either side; see `measure`."""


class SharedInputDist(InputDist):
    """Implements the input dist of several ranks, which asks the owner of each distinct row once."""

    def __init__(self, groups: Sequence[TableGroup], routes: Routes, ranks: Ranks) -> None:
        super().__init__(groups, routes, ranks)
        self._open = [name for name, feature in routes.features.items() if is_open(feature)]
        self._uncounted: list[OrderedKeys] = []

    def ask(self, batch: Mapping[str, Jagged | Tensor], *, is_ahead: bool) -> tuple[Asked, dict[int, Tensor]]:
        """See `InputDist`.

        A rank with invalid input reports this to the others instead of its request, and every rank raises.
        """
        measured: dict[str, Measured] = {}
        # All groups are exchanged, because a rank with invalid input may not know which groups the others look up.
        nothing: list[Wanted | None] = [None] * len(self._groups)
        wanted, error = list(nothing), None
        faults: list[Fault] = []
        # Each evaluation decides from its own batches, so that a resumed run makes the same choices.
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
        """Plans a batch for one group, and decides per feature whether its bags are pooled here or at the owners.

        Adds the measurements behind the decision to `measured`, and checks of ids to `faults`.
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
            One request per group that is looked up; and per feature the sum of all ranks' measurements.
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
            earlier.is_counted = True  # their counts have arrived, because the host waited for later work
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
    """Returns the error of the first check that found a fault in this rank's ids; None if there is no fault."""
    for fault in faults:
        try:
            fault.explain()
        except ValueError as error:
            return error
    return None


def _refuse_features(names: Sequence[Sequence[str]]) -> NoReturn:
    """Raises an error on every rank that lists the features of each rank."""
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for rank, own in enumerate(names):
        ranks_of.setdefault(tuple(own), []).append(rank)
    found = "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {', '.join(own)}"
        for own, ranks in ranks_of.items()
    )
    raise ValueError(
        f"the ranks look up different features ({found}). All ranks must look up the same features in a step: if a "
        "rank has no ids of a feature, give it an empty tensor"
    )


def _count(
    counts: Tensor, group: TableGroup, keys: Tensor, ordered: OrderedKeys | SortedKeys, pooled: PooledAtOwners | None
) -> None:
    """Fills in the numbers that this rank sends to each rank for one group; counts: [world_size, 6]."""
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
    """Sends the ids of bags that owners pool to the owners; returns None if no rank has such bags.

    Collective: every rank.

    Args:
        group: the tables.
        pooled: this rank's bags, if it has any.
        ask: by kind and rank, the numbers that this rank sent.
        owe: by kind and rank, the numbers that this rank received.
    """
    if not any(owe[_ANY_BAGS]):
        return None
    pooled = pooled or PooledAtOwners(group, [], torch.zeros(0, dtype=torch.int64, device=group.device))
    of_ids, of_sums = ((ask[kind], owe[kind]) for kind in (_IDS_OF_BAGS, _SUMS))
    pooled.exchange(of_ids, of_sums, any(owe[_ANY_WEIGHTS]))
    return pooled


def input_dist_of(groups: Sequence[TableGroup], routes: Routes, ranks: Ranks) -> InputDist:
    """Returns the implementation of `InputDist` for one process or for several ranks."""
    return (LocalInputDist if ranks.size == 1 else SharedInputDist)(groups, routes, ranks)
