"""Sharded embedding tables behind one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embedtrain.checkpoint.view import ShardView
from embedtrain.distributed.collectives import all_to_all_rows
from embedtrain.distributed.runtime import GroupReference, default_group, rank_of, size_of
from embedtrain.distributed.shared_memory import connect
from embedtrain.embedding.exchange import Lookup, RowRequest, exchange_ids, exchange_vectors, look_up_bags
from embedtrain.embedding.features import resolve_features
from embedtrain.embedding.ids import valid_bags
from embedtrain.embedding.owner_pooling import BagsAsked, choose_owner
from embedtrain.embedding.pooling import bags_of
from embedtrain.embedding.shard import RowGroup, RowGroups, TableShard
from embedtrain.embedding.state_dict import as_entry, key_of, mesh_of, take_entry
from embedtrain.jagged import Jagged
from embedtrain.spec import FeatureSpec, TableSpec


class CollectionOptions(TypedDict, total=False):
    """What a model passes on to its collection; see `EmbeddingCollection`."""

    device: torch.device | str | None
    process_group: dist.ProcessGroup | None
    seed: int
    wire_dtype: torch.dtype | None


class EmbeddingCollection(nn.Module):
    """Embedding tables sharded by row over the ranks of a process group.

    Tables of one dim, dtype and optimizer form a group: a step costs one id, one vector and one gradient exchange per
    group, whatever the number of features. The rows are not parameters of the module: their gradients wait
    at the rank that owns them for a sparse optimizer of `embedtrain.optim`.

    Collective: every rank of the process group makes the collection.

    Args:
        tables: at least one, of unique names.
        features: what `forward` accepts; where None, one unpooled feature per table, of its name.
        device: of this rank's rows; the CPU where None.
        process_group: the ranks that share the tables; where None, the job's, or one process without a job.
        seed: of the first values.
        wire_dtype: in which vectors and gradients travel between ranks, float32 or bfloat16; where None, vectors as
            they are stored and gradients as float32.

    Attributes:
        shared: the ranks' shared memory, where they have it.

    Raises:
        ValueError: names repeat, a feature names a table that does not exist, or `wire_dtype` is another.
    """

    def __init__(
        self,
        tables: Sequence[TableSpec],
        features: Sequence[FeatureSpec] | None = None,
        *,
        device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if wire_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"wire_dtype must be torch.float32, torch.bfloat16 or None, got {wire_dtype}")
        self.features = resolve_features(tables, features)
        process_group = process_group if process_group is not None else default_group()
        self._process_group = GroupReference(process_group)
        self.device = torch.device("cpu" if device is None else device)
        members: dict[tuple[int, torch.dtype, str], list[TableSpec]] = {}
        for table in tables:
            members.setdefault(table.group, []).append(table)
        self.shared = connect(self.process_group, self.device)
        self.row_groups = [
            RowGroup(
                specs,
                seed=seed,
                device=self.device,
                process_group=process_group,
                wire_dtype=wire_dtype,
                shared=self.shared,
            )
            for specs in members.values()
        ]
        places = {
            shard.spec.name: (number, position)
            for number, group in enumerate(self.row_groups)
            for position, shard in enumerate(group.shards)
        }
        self._no_lookup = Lookup(torch.zeros(0, dtype=torch.int64, device=self.device))
        self._place = {name: places[feature.table_name] for name, feature in self.features.items()}

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the tables; None for one process."""
        return self._process_group.get()

    @property
    def shards(self) -> dict[str, TableShard]:
        """This rank's part of each table, by name."""
        return {shard.spec.name: shard for group in self.row_groups for shard in group.shards}

    def trained_by(self, optimizer: str) -> RowGroups:
        """Returns the tables whose `TableSpec.optimizer` has this name, to make their optimizer of.

        Raises:
            ValueError: there are none.
        """
        named: dict[str, list[RowGroup]] = {}
        for group in self.row_groups:
            named.setdefault(group.shards[0].spec.optimizer, []).append(group)
        if optimizer not in named:
            raise ValueError(f"no table is trained by {optimizer!r}; the names are {', '.join(map(repr, named))}")
        return RowGroups(named[optimizer])

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
        batch = dict(batch)
        members, requests = self._exchange_ids(batch, may_pool=True)
        vectors: dict[str, Tensor] = {}
        for number, names in members.items():
            bags = [bags_of(batch[name], self.features[name].pooling) for name in names]
            weights = [batch[name].weights for name in names]
            pooled = look_up_bags(self.row_groups[number], requests[number], bags, weights)
            vectors.update(zip(names, pooled, strict=True))
        return {name: vectors[name] for name in batch}

    def distinct_rows(self, batch: Mapping[str, Jagged]) -> tuple[Tensor, dict[str, Tensor]]:
        """Fetches each distinct row of the batch once, for models that work on compact rows.

        Collective: as `forward`.

        Returns:
            vectors: [num_distinct, dim] float32.
            inverse: per feature [num_values] int64; the place among `vectors` of each value's row.

        Raises:
            ValueError: the features' tables differ in dim, or as `forward`.
        """
        numbers = {self._place_of(name)[0] for name in batch if name in self.features}
        if len({self.row_groups[number].weight.shape[1] for number in numbers}) > 1:
            raise ValueError(f"distinct_rows needs tables of one dim; those of the features {list(batch)} differ")
        batch = dict(batch)
        members, requests = self._exchange_ids(batch, may_pool=False)
        parts: list[Tensor] = []
        places: dict[str, Tensor] = {}
        for number, names in members.items():
            sizes = [batch[name].values.numel() for name in names]
            inverse = requests[number].inverse
            if parts:
                inverse = inverse + sum(len(part) for part in parts)
            places.update(zip(names, inverse.split(sizes), strict=True))
            parts.append(exchange_vectors(self.row_groups[number], requests[number]))
        return parts[0] if len(parts) == 1 else torch.cat(parts), places

    def gather_table(self, name: str, state: str = "weight") -> Tensor:
        """Returns a whole table, or an optimizer's state of it, in order of id, on every rank.

        Collective: every rank. For tables that fit on one.
        """
        shard = self.shards[name]
        local = shard.weight if state == "weight" else shard.state[state]
        ranks = range(size_of(self.process_group))
        sizes = [stop - start for start, stop in map(shard.layout.shard_range, ranks)]
        copies = local.repeat(len(ranks), *[1] * (local.dim() - 1))
        slots = all_to_all_rows(copies, [local.shape[0]] * len(ranks), sizes, self.process_group)
        return slots[shard.layout.slot_of(torch.arange(shard.spec.num_rows, device=slots.device))]

    def shard_views(self) -> list[ShardView]:
        """Returns this rank's weights and optimizer state, as a checkpoint saves and loads them."""
        return [view for shard in self.shards.values() for view in shard.views()]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Adds weights and optimizer state, "item.weight" and "item.accumulator", as `torch.nn.Module` asks for.

        They are DTensors in order of slots that share memory with the tables, so that torch's own distributed
        checkpoint saves them, and loads them in place.
        """
        mesh = mesh_of(self.process_group, self.device)
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

    def _place_of(self, feature: str) -> tuple[int, int]:
        """Returns the number of the feature's group, and its table's position there."""
        return self._place[feature]

    def _exchange_ids(
        self, batch: dict[str, Jagged], *, may_pool: bool
    ) -> tuple[dict[int, list[str]], list[RowRequest]]:
        """Returns, by group, the features that look it up, in order, and a request per group.

        Features of `batch` with bad ids are replaced by what their policy makes of them.

        Args:
            may_pool: whether owners may pool bags, or all rows must travel here.
        """
        members: dict[int, list[str]] = {}
        lookups = [self._no_lookup] * len(self.row_groups)
        error: Exception | None = None
        try:
            unknown = [name for name in batch if name not in self.features]
            if unknown or not batch:
                raise ValueError(f"expected a batch of the features {list(self.features)}, got {list(batch)}")
            for name in batch:
                members.setdefault(self._place_of(name)[0], []).append(name)
            for number, names in members.items():
                names.sort(key=lambda name: self._place_of(name)[1])  # in order of local row, which helps to sort
                keys = self._keys_of(number, names, batch)
                lookups[number] = self._lookup(number, names, batch, keys) if may_pool else Lookup(keys)
        except ValueError as raised:
            error = raised
        # A rank whose input is wrong may not know which groups the others look up: the request is of all.
        return members, exchange_ids(self.row_groups, lookups, error, self.process_group)

    def _lookup(self, number: int, names: list[str], batch: dict[str, Jagged], keys: Tensor) -> Lookup:
        """Parts the features of a group into those whose rows travel here and those that owners pool."""
        group, features = self.row_groups[number], [self.features[name] for name in names]
        bags = [bags_of(batch[feature.name], feature.pooling) for feature in features]
        if size_of(self.process_group) == 1:
            tables = [self._place_of(name)[1] for name in names]
            return Lookup(keys, runs=group.runs_of(tables, [feature.num_values for feature in bags]))
        at_owner = choose_owner(group, features, bags, [batch[name].weights for name in names], keys)
        if not any(at_owner):
            return Lookup(keys)
        parts = keys.split([feature.num_values for feature in bags])
        here, there = (
            torch.cat([keys[:0], *(part for part, is_there in zip(parts, at_owner, strict=True) if is_there == side)])
            for side in (False, True)
        )
        asked = [feature for feature, is_there in zip(bags, at_owner, strict=True) if is_there]
        return Lookup(here, BagsAsked(group, asked, there), at_owner)

    def _keys_of(self, number: int, names: list[str], batch: dict[str, Jagged]) -> Tensor:
        group = self.row_groups[number]
        tables = [self._place_of(name)[1] for name in names]
        keys, num_outside = group.keys_of(tables, [batch[name].values for name in names])
        if not any(num_outside):
            return keys
        rank = rank_of(self.process_group)
        for name, table in zip(names, tables, strict=True):
            batch[name] = valid_bags(batch[name], self.features[name], group.shards[table].spec.num_rows, rank)
        return group.keys_of(tables, [batch[name].values for name in names])[0]
