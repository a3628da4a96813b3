"""Sharded embedding tables behind one module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import job_ranks
from embedtrain.embedding.features import Routes, resolve_features
from embedtrain.embedding.input_dist import Asked, input_dist_of
from embedtrain.embedding.lookup import lookup
from embedtrain.embedding.output_dist import fetch_distinct, fetch_own, output_dist
from embedtrain.embedding.placement import Auto, PlacementChoice, place_rows
from embedtrain.embedding.pooling_choice import PoolingChoice, PoolingChoices
from embedtrain.embedding.shard_view import ShardView
from embedtrain.embedding.state_dict import add_entries, as_attributes, refuse_clashes, take_entries
from embedtrain.embedding.table_group import TableGroup, TableGroups, TableShard
from embedtrain.jagged import Jagged
from embedtrain.spec import FeatureSpec, TableSpec

if TYPE_CHECKING:
    from typing_extensions import Self


_OF_ANOTHER_DTYPE = "Convert the other modules alone, or make the tables with TableSpec(dtype=torch.bfloat16)"


class CollectionOptions(TypedDict, total=False):
    """What a model passes on to its collection; see `EmbeddingCollection`."""

    device: torch.device | str | None
    ranks: Ranks | None
    seed: int
    wire_dtype: torch.dtype | None
    placement: PlacementChoice | Auto
    cache_bytes: int | None


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
            the rows of each step from, or "auto": on the host if the device's free memory is too small. `Auto` also
            leaves memory free for saves.
        cache_bytes: of rows on the host, how much of the device's memory holds copies of the hot ones; where None,
            half of what is free. Which rows are copied changes no result.
    Attributes:
        ranks: those that share the tables.
        table_groups: the groups of tables; every optimizer updates some of them.

    Raises:
        ValueError: names repeat, a table is called as an entry of another one in state dicts, a feature names a table
            that does not exist, or an option is none of those above.
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
        placement: PlacementChoice | Auto = "device",
        cache_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if wire_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"wire_dtype must be torch.float32, torch.bfloat16 or None, got {wire_dtype}")
        self.features = resolve_features(tables, features)
        refuse_clashes([table.name for table in tables])
        self.ranks = ranks if ranks is not None else job_ranks()
        # "cuda" becomes "cuda:0", so that `to` can tell whether rows are there already.
        self.device = torch.empty(0, device="cpu" if device is None else device).device
        members: dict[tuple[int, torch.dtype, str, str], list[TableSpec]] = {}
        for table in tables:
            members.setdefault(table.group, []).append(table)
        where = place_rows(placement, cache_bytes, list(members.values()), self.ranks.size, self.device)
        self.table_groups = [
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
        self._choices: PoolingChoices = {}
        self._begin()

    def _begin(self) -> None:
        places = {
            shard.spec.name: (number, position)
            for number, group in enumerate(self.table_groups)
            for position, shard in enumerate(group.shards)
        }
        self._input_dist = input_dist_of(self.table_groups, Routes(self.features, places), self.ranks)
        self._input_dist.choices = self._choices
        self._watchers: list[Callable[[Mapping[int, Tensor]], None]] = []

    @property
    def shards(self) -> dict[str, TableShard]:
        """This rank's part of each table, by name. See `write_back` of rows in host memory."""
        return {shard.spec.name: shard for group in self.table_groups for shard in group.shards}

    def write_back(self) -> None:
        """Brings rows in host memory up to date with their copies on the device, to be read or written by others."""
        for group in self.table_groups:
            group.access.let_go()

    def watch(self, watcher: Callable[[Mapping[int, Tensor]], None]) -> None:
        """Has a function called with the keys that this rank's batches look up, [n] int64 by number of the group."""
        self._watchers.append(watcher)

    def trained_by(self, optimizer: str) -> TableGroups:
        """Returns the tables whose `TableSpec.optimizer` has this name, to make their optimizer of.

        Raises:
            ValueError: there are none.
        """
        named: dict[str, list[TableGroup]] = {}
        for group in self.table_groups:
            named.setdefault(group.shards[0].spec.optimizer, []).append(group)
        if optimizer not in named:
            raise ValueError(f"no table is trained by {optimizer!r}; the names are {', '.join(map(repr, named))}")
        return TableGroups(named[optimizer])

    def requires_grad_(self, requires_grad: bool = True, *, tables: Sequence[str] | None = None) -> Self:
        """Freezes the rows, which backward then leaves out, or has them trained again.

        Collective: every rank alike.

        Args:
            requires_grad: whether the rows are trained, and the module's own parameters if it has any.
            tables: names of tables, if it is about these alone.

        Raises:
            ValueError: there is no such table.
        """
        tables = [tables] if isinstance(tables, str) else tables
        unknown = sorted(set(tables or ()) - self.shards.keys())
        if unknown:
            raise ValueError(f"there is no table {', '.join(unknown)}; the tables are {', '.join(self.shards)}")
        for group in self.table_groups:
            named = set(group.table_names if tables is None else tables)
            group.freeze(group.frozen - named if requires_grad else group.frozen | (named & set(group.table_names)))
        return self if tables is not None else super().requires_grad_(requires_grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of the rows that wait, and those of the module's own parameters."""
        for group in self.table_groups:
            group.clear_gradient()
        super().zero_grad(set_to_none)

    def extra_repr(self) -> str:
        """Returns a line per table."""
        lines = [line for group in self.table_groups for line in _lines_of(group, self.features.values())]
        return "\n".join([f"rank {self.ranks.rank} of {self.ranks.size}, device {self.device}", *lines])

    def forward(self, batch: Mapping[str, Jagged | Tensor]) -> dict[str, Tensor]:
        """Looks up the features of this rank's batch.

        Collective: every rank, with the same features; batches may differ in size and may be empty. Where
        gradients are enabled every rank must also run backward.

        Args:
            batch: bags per feature, or a tensor of ids: [n], a bag of one id each, or [n, k], n bags of k ids.

        Returns:
            Per feature float32 vectors: [num_bags, dim] with pooling. Without pooling [num_values, dim], and
            [n, k, dim] for ids [n, k].

        Raises:
            BadIdError: an id of any rank is outside its table and its feature's policy is "error"; raised on
                every rank before any row moves.
            ValueError: the batch names a feature that does not exist, on any rank; raised likewise.
        """
        asked = self.ask(batch)
        return output_dist(asked, lookup(asked))

    def ask(self, batch: Mapping[str, Jagged | Tensor], *, is_ahead: bool = False) -> Asked:
        """Exchanges the ids of a batch, which needs no row, for `look_up` or `distinct_rows` later.

        Collective: as `forward`, whose exceptions it raises too.

        Args:
            batch: as for `forward`. It may be in host memory, where ids can be range-checked without a device sync.
            is_ahead: whether another step is under way. On GPUs the ids then travel apart from its rows.
        """
        asked, keys = self._input_dist.ask(batch, is_ahead=is_ahead)
        if not is_ahead:
            self._take_choices(asked)
        for watcher in self._watchers:
            watcher(keys)
        return asked

    def look_up(self, asked: Asked) -> dict[str, Tensor]:
        """Looks up what was asked for; as `forward`. Collective: every rank, in the order in which they asked."""
        self._take_choices(asked)
        return output_dist(asked, lookup(asked))

    @property
    def pooling_choices(self) -> dict[str, Any]:
        """Where the ranks pool the bags of features that say `pool_at="auto"`, as JSON.

        They are decided from the first batch, and again when bags become twice as long or short. A decision changes the
        rounding of sums: a run that sets the choices it had goes on with the same bits, and one that does not decides
        anew. Choices of another number of ranks are not taken over.
        """
        return {"num_ranks": self.ranks.size, "features": {name: [*choice] for name, choice in self._choices.items()}}

    @pooling_choices.setter
    def pooling_choices(self, saved: Mapping[str, Any]) -> None:
        choices = saved["features"] if saved["num_ranks"] == self.ranks.size else {}
        self._choices = {name: PoolingChoice(*choices[name]) for name in choices if name in self.features}
        self._input_dist.choices = self._choices

    def _take_choices(self, asked: Asked) -> None:
        """Takes the choices that hold after a batch, in the order of the steps even if another batch is asked ahead."""
        if torch.is_grad_enabled():
            if asked.choices is not self._choices:  # a module takes microseconds to set an attribute
                self._choices = asked.choices
            # The next batch without gradients begins an evaluation, even if a step was asked ahead before the last one.
            self._input_dist.choices_of_evaluation = {}

    def distinct_rows(self, asked: Asked, *, counts: Tensor | None = None) -> Tensor:
        """Fetches each distinct row that was asked for once, for models that work on compact rows.

        Collective: every rank, in the order in which they asked.

        Args:
            asked: the batch.
            counts: [at least num_distinct] float32; in how many terms of the loss each row takes part. They travel home
                with the gradient, on every rank or on none, for an optimizer with `optim.CurvatureDamping`.

        Returns:
            [num_distinct, dim] float32; `Asked.places` says where each value's row lies.

        Raises:
            ValueError: the features' tables differ in dim, or features are pooled.
        """
        return fetch_distinct(asked, counts)

    def own_rows(self, name: str) -> Tensor:
        """Returns the rows of a table that this rank owns, for models that compare with all rows of a table.

        In backward their gradients wait here for the optimizer, beside those of look-ups; nothing travels. The step
        then updates every row. No collective.

        Returns:
            [num_slots, dim] float32 in order of `TableShard.slots`; it may share memory with the table.
        """
        (group,) = [group for group in self.table_groups if name in group.table_names]
        return fetch_own(group, self.shards[name])

    def bring_rows(self, asked: Asked) -> None:
        """Copies those of the rows asked of this rank that live in host memory to the device, before their step."""
        for part in asked.parts:
            part.bring_rows()

    def gather_table(self, name: str, state: str = "weight") -> Tensor:
        """Returns a whole table, or an optimizer's state of it, in order of id, on every rank.

        Collective: every rank. For tables that fit on one.
        """
        for group in self.table_groups:
            group.access.write_back()
        shard = self.shards[name]
        return shard.gather(self.ranks, state)

    def shard_views(self) -> list[ShardView]:
        """Returns this rank's weights and optimizer state, as a checkpoint saves and loads them.

        Collective: every rank, as the optimizer's `settle`, which it calls and whose exception it raises.
        """
        return [view for group in self.table_groups for view in group.views()]

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy is made of: all but the watchers, and what `_begin` makes of the tables anew."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_input_dist", "_watchers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the rows, as `to` asks for, with the module's own parameters; refuses another dtype.

        Raises:
            ValueError: rows would be stored in another dtype, or on a device without memory.
        """
        for group in self.table_groups:
            made = fn(torch.empty(0, dtype=group.weight.dtype, device=self.device))
            if made.dtype != group.weight.dtype:
                raise ValueError(
                    f"the rows of {', '.join(group.table_names)} are stored as {group.weight.dtype} and looked up as "
                    f"torch.float32; they do not become {made.dtype}. {_OF_ANOTHER_DTYPE}"
                )
            if made.device.type == "meta":
                raise ValueError("tables cannot live on the meta device: their rows are drawn when they are made")
        if made.device != self.device:
            self.device = made.device
            watchers = self._watchers
            for group in self.table_groups:
                group.move(made.device)
            self._begin()
            self._watchers = watchers
        applied: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Adds weights, optimizer state and counts of steps: "item.weight", "item.accumulator", "item.step".

        Rows are DTensors in order of slots that share memory with the tables, so that torch's own distributed
        checkpoint saves them, and loads them in place. A count of steps is a copy, which `load_state_dict` takes over.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        mesh = self.ranks.device_mesh(self.table_groups[0].weight.device.type)
        taken = {name for name, _ in itertools.chain(self.named_parameters(), self.named_buffers())}
        add_entries(destination, prefix, self.shard_views(), mesh, taken)

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
        for group in self.table_groups:
            group.changes.before_update_of_all()
        views = self.shard_views()
        rest = take_entries(state_dict, prefix, views, missing_keys, error_msgs)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Tells torch's distributed checkpoint to find the tables, which are not attributes, under `_entries`."""
        return dict.fromkeys(vars(self._entries), "_entries")

    @property
    def _entries(self) -> SimpleNamespace:
        return as_attributes(self.shard_views())


def _lines_of(group: TableGroup, features: Collection[FeatureSpec]) -> Iterator[str]:
    """Yields a line per table."""
    for spec in group.specs:
        frozen = ", frozen" if spec.name in group.frozen else ""
        dtype = str(spec.dtype).removeprefix("torch.")
        names = [feature.name for feature in features if feature.table_name == spec.name]
        yield (
            f"({spec.name}): {spec.num_rows:,} rows of {spec.dim} {dtype}, trained by {spec.optimizer!r}"
            f"{frozen}, features {', '.join(names) or 'none'}"
        )
