"""Sharded embedding tables behind one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import job_ranks
from embedtrain.embedding.exchange import Lookup, RowRequest, exchange_ids, exchange_vectors, look_up_bags
from embedtrain.embedding.features import Route, Routes, resolve_features
from embedtrain.embedding.ids import valid_bags
from embedtrain.embedding.owner_pooling import BagsAsked, choose_owner
from embedtrain.embedding.placement import PlacementChoice, place_rows
from embedtrain.embedding.pooling import bags_of
from embedtrain.embedding.shard_view import ShardView
from embedtrain.embedding.state_dict import as_entry, key_of, take_entry
from embedtrain.embedding.table_group import TableGroup, TableGroups, TableShard
from embedtrain.jagged import Jagged
from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.transfer import to_device
from embedtrain.spec import FeatureSpec, TableSpec


class CollectionOptions(TypedDict, total=False):
    """What a model passes on to its collection; see `EmbeddingCollection`."""

    device: torch.device | str | None
    ranks: Ranks | None
    seed: int
    wire_dtype: torch.dtype | None
    placement: PlacementChoice
    cache_bytes: int | None


@dataclass(frozen=True)
class RowsAsked:
    """Distinct rows that `EmbeddingCollection.ask_for_rows` asked for.

    Attributes:
        requests: by the position of their group, what the ranks settled; the rows come in this order.
        inverse: per feature [num_values] int64; the place of each value's row among those that will come.
    """

    requests: dict[int, RowRequest]
    inverse: dict[str, Tensor]


@dataclass(frozen=True)
class VectorsAsked:
    """Vectors of features that `EmbeddingCollection.ask` asked for.

    Attributes:
        requests: by the position of their group, what the ranks settled.
        features: per group its features, in order.
        bags: per feature how its vectors are pooled.
        weights: per feature the weights as the caller gave them, for their own gradient.
    """

    requests: dict[int, RowRequest]
    features: dict[int, list[str]]
    bags: dict[str, Bags]
    weights: dict[str, Tensor | None]


class EmbeddingCollection(nn.Module):
    """Embedding tables sharded by row over the ranks of a job.

    Tables of one dim, dtype and optimizer form a group: a step costs one id, one vector and one gradient exchange per
    group, whatever the number of features. The rows are not parameters of the module: their gradients wait
    at the rank that owns them for a sparse optimizer of `embedtrain.optim`.

    Collective: every rank makes the collection.

    Args:
        tables: at least one, of unique names.
        features: what `forward` accepts; where None, one unpooled feature per table, of its name.
        device: of this rank's rows; the CPU where None.
        ranks: those that share the tables; if None, the job's. `embedtrain.ranks_of` makes them of a process group.
        seed: of the first values.
        wire_dtype: in which vectors and gradients travel between ranks, float32 or bfloat16; where None, vectors as
            they are stored and gradients as float32.
        placement: where the rows and their state live: on the "device", on the "host", whose memory a GPU copies
            the rows of each step from, or "auto": on the host where the device's free memory is too small.
        cache_bytes: of rows on the host, how much of the device's memory holds copies of the hot ones; where None,
            half of what is free. Which rows are copied changes no result.

    Attributes:
        ranks: those that share the tables.
        looked_up: per group [n] int64, a key for each id of this rank's last batch; those of no group none.

    Raises:
        ValueError: names repeat, a feature names a table that does not exist, or an option is none of those above.
    """

    def __init__(
        self,
        tables: Sequence[TableSpec],
        features: Sequence[FeatureSpec] | None = None,
        *,
        device: torch.device | str | None = None,
        ranks: Ranks | None = None,
        seed: int = 0,
        wire_dtype: torch.dtype | None = None,
        placement: PlacementChoice = "device",
        cache_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if wire_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"wire_dtype must be torch.float32, torch.bfloat16 or None, got {wire_dtype}")
        self.features = resolve_features(tables, features)
        self.ranks = ranks if ranks is not None else job_ranks()
        self.device = torch.device("cpu" if device is None else device)
        members: dict[tuple[int, torch.dtype, str], list[TableSpec]] = {}
        for table in tables:
            members.setdefault(table.group, []).append(table)
        where = place_rows(placement, cache_bytes, list(members.values()), self.ranks.size, self.device)
        self.row_groups = [
            TableGroup(
                specs,
                seed=seed,
                device=self.device,
                ranks=self.ranks,
                wire_dtype=wire_dtype,
                placement=where,
            )
            for specs in members.values()
        ]
        places = {
            shard.spec.name: (number, position)
            for number, group in enumerate(self.row_groups)
            for position, shard in enumerate(group.shards)
        }
        self._no_lookup = Lookup(torch.zeros(0, dtype=torch.int64, device=self.device))
        self._routes = Routes(self.features, places)
        self.looked_up: list[Tensor] = [self._no_lookup.keys] * len(self.row_groups)

    @property
    def shards(self) -> dict[str, TableShard]:
        """This rank's part of each table, by name; as it is now, which rows on the host are after being asked for."""
        for group in self.row_groups:
            group.write_back()
        return {shard.spec.name: shard for group in self.row_groups for shard in group.shards}

    def trained_by(self, optimizer: str) -> TableGroups:
        """Returns the tables whose `TableSpec.optimizer` has this name, to make their optimizer of.

        Raises:
            ValueError: there are none.
        """
        named: dict[str, list[TableGroup]] = {}
        for group in self.row_groups:
            named.setdefault(group.shards[0].spec.optimizer, []).append(group)
        if optimizer not in named:
            raise ValueError(f"no table is trained by {optimizer!r}; the names are {', '.join(map(repr, named))}")
        return TableGroups(named[optimizer])

    def forward(self, batch: Mapping[str, Jagged]) -> dict[str, Tensor]:
        """Looks up the features of this rank's batch.

        Collective: every rank, with the same features; batches may differ in size and may be empty. Where
        gradients are enabled every rank must also run backward.

        Returns:
            Per feature float32 vectors: [num_values, dim] without pooling, else [num_bags, dim].

        Raises:
            BadIdError: an id of any rank is outside its table and its feature's policy is "error"; raised on
                every rank before any row moves.
            ValueError: the batch names a feature that does not exist, on any rank; raised likewise.
        """
        return self.look_up(self.ask(batch))

    def ask(self, batch: Mapping[str, Jagged], *, is_ahead: bool = False) -> VectorsAsked:
        """Exchanges the ids of a batch, which needs no row, for `look_up` later.

        Collective: as `forward`, whose exceptions it raises too.

        Args:
            batch: as for `forward`. It may be in host memory, where it takes no waiting for the device to know that the
                ids are rows.
            is_ahead: whether another step is under way. On GPUs the ids then travel apart from its rows.
        """
        asked, bags = dict(batch), dict[str, Bags]()
        routes, requests = self._exchange_ids(asked, self.ranks.beside() if is_ahead else self.ranks, bags)
        if is_ahead:
            for route in routes:
                requests[route.number].sort_ahead()
        return VectorsAsked(
            {route.number: requests[route.number] for route in routes},
            {route.number: route.names for route in routes},
            bags,
            {name: values.weights for name, values in asked.items()},
        )

    def look_up(self, asked: VectorsAsked) -> dict[str, Tensor]:
        """Looks up what was asked for; as `forward`. Collective: every rank, in the order in which they asked."""
        vectors: dict[str, Tensor] = {}
        for number, names in asked.features.items():
            bags, weights = [asked.bags[name] for name in names], [asked.weights[name] for name in names]
            pooled = look_up_bags(self.row_groups[number], asked.requests[number], bags, weights)
            vectors.update(zip(names, pooled, strict=True))
        return {name: vectors[name] for name in asked.weights}

    def distinct_rows(self, batch: Mapping[str, Jagged]) -> tuple[Tensor, dict[str, Tensor]]:
        """Fetches each distinct row of the batch once, for models that work on compact rows.

        Collective: as `forward`.

        Returns:
            vectors: [num_distinct, dim] float32.
            inverse: per feature [num_values] int64; the place among `vectors` of each value's row.

        Raises:
            ValueError: the features' tables differ in dim, or as `forward`.
        """
        asked = self.ask_for_rows(batch)
        return self.fetch_rows(asked), asked.inverse

    def ask_for_rows(self, batch: Mapping[str, Jagged], *, is_ahead: bool = False) -> RowsAsked:
        """Exchanges the ids of a batch, which needs no row, for `fetch_rows` later.

        Collective: as `forward`, whose exceptions it raises too.

        Args:
            batch: as for `distinct_rows`. The ids may be in host memory, where it takes no waiting for the device to
                know that they are rows.
            is_ahead: whether another step is under way. On GPUs the ids then travel apart from its rows.
        """
        numbers = {self._routes.group_of(name) for name in batch if name in self.features}
        if len({self.row_groups[number].weight.shape[1] for number in numbers}) > 1:
            raise ValueError(f"distinct_rows needs tables of one dim; those of the features {list(batch)} differ")
        batch = dict(batch)
        routes, requests = self._exchange_ids(batch, self.ranks.beside() if is_ahead else self.ranks, None)
        inverse: dict[str, Tensor] = {}
        num_before = 0
        for route in routes:
            request = requests[route.number]
            if is_ahead:
                request.sort_ahead()
            sizes = [batch[name].values.numel() for name in route.names]
            places = request.inverse + num_before if num_before else request.inverse
            inverse.update(zip(route.names, places.split(sizes), strict=True))
            if len(routes) > 1:  # the host waits for this, where keys are sorted on a device
                num_before += request.distinct.unique.numel()
        return RowsAsked({route.number: requests[route.number] for route in routes}, inverse)

    def fetch_rows(self, asked: RowsAsked) -> Tensor:
        """Fetches the rows that were asked for; [num_distinct, dim] float32. Collective: every rank, in order."""
        parts = [exchange_vectors(self.row_groups[number], request) for number, request in asked.requests.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def bring_rows(self, asked: RowsAsked | VectorsAsked) -> None:
        """Copies those of the rows asked of this rank that live in host memory to the device, before their step."""
        for number, request in asked.requests.items():
            self.row_groups[number].bring_ahead(request.rows_read)

    def gather_table(self, name: str, state: str = "weight") -> Tensor:
        """Returns a whole table, or an optimizer's state of it, in order of id, on every rank.

        Collective: every rank. For tables that fit on one.
        """
        shard = self.shards[name]
        local = shard.weight if state == "weight" else shard.state[state]
        ranks = range(self.ranks.size)
        sizes = [stop - start for start, stop in map(shard.layout.shard_range, ranks)]
        copies = local.repeat(len(ranks), *[1] * (local.dim() - 1))
        slots = self.ranks.all_to_all(copies, [local.shape[0]] * len(ranks), sizes)
        return slots[shard.layout.slot_of(torch.arange(shard.spec.num_rows, device=slots.device))]

    def shard_views(self) -> list[ShardView]:
        """Returns this rank's weights and optimizer state, as a checkpoint saves and loads them."""
        return [view for shard in self.shards.values() for view in shard.views()]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Adds weights and optimizer state, "item.weight" and "item.accumulator", as `torch.nn.Module` asks for.

        They are DTensors in order of slots that share memory with the tables, so that torch's own distributed
        checkpoint saves them, and loads them in place.
        """
        mesh = self.ranks.device_mesh(self.row_groups[0].weight.device.type)
        for view in self.shard_views():
            destination[prefix + key_of(view)] = as_entry(view, mesh)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes over what `_save_to_state_dict` gave, or whole tensors in order of slots."""
        views = {prefix + key_of(view): view for view in self.shard_views()}
        missing_keys += [key for key in views if key not in state_dict]
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in views]
        for group in self.row_groups:
            group.changes.before_update_of_all()
        faults = [take_entry(view, state_dict[key]) for key, view in views.items() if key in state_dict]
        error_msgs += [fault for fault in faults if fault is not None]

    def _exchange_ids(
        self, batch: dict[str, Jagged], ranks: Ranks, bags: dict[str, Bags] | None
    ) -> tuple[Sequence[Route], list[RowRequest]]:
        """Returns where the features are looked up, and a request per group.

        Features of `batch` with bad ids are replaced by what their policy makes of them.

        Args:
            bags: takes how each feature is pooled, which owners may do then; None where all rows must travel here.
        """
        routes: Sequence[Route] = ()
        lookups = [self._no_lookup] * len(self.row_groups)
        self.looked_up[:] = [self._no_lookup.keys] * len(self.row_groups)
        error: Exception | None = None
        try:
            routes = self._routes.of(tuple(batch))
            for route in routes:
                keys = self.looked_up[route.number] = to_device(self._keys_of(route, batch), self.device)
                lookups[route.number] = Lookup(keys) if bags is None else self._lookup(route, batch, bags, keys)
        except ValueError as raised:
            error = raised
        # A rank whose input is wrong may not know which groups the others look up: the request is of all.
        return routes, exchange_ids(self.row_groups, lookups, error, ranks)

    def _lookup(self, route: Route, batch: Mapping[str, Jagged], bags: dict[str, Bags], keys: Tensor) -> Lookup:
        """Parts the features of a group into those whose rows travel here and those that owners pool.

        Args:
            bags: takes how each feature is pooled.
        """
        group = self.row_groups[route.number]
        own = [
            bags_of(batch[name], feature.pooling, self.device)
            for name, feature in zip(route.names, route.features, strict=True)
        ]
        bags.update(zip(route.names, own, strict=True))
        if self.ranks.size == 1:
            return Lookup(keys, runs=group.runs_of(route.tables, [feature.num_values for feature in own]))
        weights = [batch[name].weights for name in route.names]
        at_owner = choose_owner(group, route.features, own, weights, keys)
        if not any(at_owner):
            return Lookup(keys)
        parts = keys.split([feature.num_values for feature in own])
        here, there = (
            torch.cat([keys[:0], *(part for part, is_there in zip(parts, at_owner, strict=True) if is_there == side)])
            for side in (False, True)
        )
        asked = [feature for feature, is_there in zip(own, at_owner, strict=True) if is_there]
        return Lookup(here, BagsAsked(group, asked, there), at_owner)

    def _keys_of(self, route: Route, batch: dict[str, Jagged]) -> Tensor:
        group = self.row_groups[route.number]
        keys, num_outside = group.keys_of(route.tables, [batch[name].values for name in route.names])
        if not any(num_outside):
            return keys
        rank = self.ranks.rank
        for name, table, feature in zip(route.names, route.tables, route.features, strict=True):
            batch[name] = valid_bags(batch[name], feature, group.shards[table].spec.num_rows, rank)
        return group.keys_of(route.tables, [batch[name].values for name in route.names])[0]
