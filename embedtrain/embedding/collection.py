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
    """Options that a model passes to its `EmbeddingCollection`, which documents them."""

    device: torch.device | str | None
    ranks: Ranks | None
    seed: int
    wire_dtype: torch.dtype | None
    placement: PlacementChoice | Auto
    cache_bytes: int | None


class EmbeddingCollection(nn.Module):
    """Holds embedding tables that are sharded by row over the ranks of a job.

    Tables with equal dim, dtype, optimizer and layout form a table group. Each step needs one id exchange, one vector
    exchange and one gradient exchange per group, for any number of features.

    The rows are not parameters of the module. Backward delivers their gradients to the rank that owns them, and a
    sparse optimizer of `embedtrain.optim` applies them.

    Collective: every rank creates the collection.

    Args:
        tables: at least one table; names must be unique.
        features: the features that `forward` accepts; None for one unpooled feature per table, named as the table.
        device: device of this rank's rows; None for the CPU.
        ranks: the ranks that share the tables; None for all ranks of the job. `embedtrain.ranks_of` makes this from a
            process group.
        seed: seed of the initial values.
        wire_dtype: dtype of vectors and gradients that are sent between ranks, float32 or bfloat16. None sends vectors
            in the table's dtype and gradients in float32.
        placement: memory that stores the rows and their optimizer state. With "host", a GPU copies the rows of each
            step from host memory. "auto" is "host" if the device has too little free memory, else "device". `Auto` is
            "auto" that also reserves device memory for saves.
        cache_bytes: device memory for copies of hot rows that are stored on the host; None for half of the free memory.
            Results do not depend on it.

    Attributes:
        ranks: the ranks that share the tables.
        table_groups: the table groups; an optimizer updates one or several of them.

    Raises:
        ValueError: a name repeats, a table's name is a state dict entry of another table, a feature names a table that
            does not exist, or an option has an invalid value.
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
        """This rank's shard of each table, by name; call `write_back` before reading rows that are on the host."""
        return {shard.spec.name: shard for group in self.table_groups for shard in group.shards}

    def write_back(self) -> None:
        """Copies updated rows from the device's cache to host memory, before other code reads or writes the rows."""
        for group in self.table_groups:
            group.access.let_go()

    def watch(self, watcher: Callable[[Mapping[int, Tensor]], None]) -> None:
        """Calls a function with the keys of each later batch of this rank, [n] int64 by index of the table group."""
        self._watchers.append(watcher)

    def trained_by(self, optimizer: str) -> TableGroups:
        """Returns the tables whose `TableSpec.optimizer` is this name, as the argument of an optimizer.

        Raises:
            ValueError: no table has this name.
        """
        named: dict[str, list[TableGroup]] = {}
        for group in self.table_groups:
            named.setdefault(group.shards[0].spec.optimizer, []).append(group)
        if optimizer not in named:
            raise ValueError(f"no table is trained by {optimizer!r}; the names are {', '.join(map(repr, named))}")
        return TableGroups(named[optimizer])

    def requires_grad_(self, requires_grad: bool = True, *, tables: Sequence[str] | None = None) -> Self:
        """Freezes tables, or trains them again. Frozen rows get no gradients.

        Collective: every rank, with the same arguments.

        Args:
            requires_grad: whether the rows are trained.
            tables: names of the tables to change; None for all tables and the parameters of the module itself.

        Raises:
            ValueError: a table does not exist.
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
        """Removes the delivered gradients of the rows, and the gradients of the module's own parameters."""
        for group in self.table_groups:
            group.clear_gradient()
        super().zero_grad(set_to_none)

    def extra_repr(self) -> str:
        """Returns one line per table."""
        lines = [line for group in self.table_groups for line in _lines_of(group, self.features.values())]
        return "\n".join([f"rank {self.ranks.rank} of {self.ranks.size}, device {self.device}", *lines])

    def forward(self, batch: Mapping[str, Jagged | Tensor]) -> dict[str, Tensor]:
        """Looks up the features of this rank's batch.

        Collective: every rank, with the same features. Batches may differ in size and may be empty. If gradients are
        enabled, every rank must also run backward.

        Args:
            batch: per feature a `Jagged` or a tensor of ids, int64 or int32. Ids [n] are n bags of one id, and ids
                [n, k] are n bags of k ids.

        Returns:
            Float32 vectors per feature: [num_bags, dim] with pooling; without pooling [num_values, dim], or [n, k, dim]
            for ids [n, k].

        Raises:
            BadIdError: an id on any rank is outside its table, and its feature has `invalid_ids="error"`.
            ValueError: a batch on any rank names a feature that does not exist. Both errors are raised on every rank.
        """
        asked = self.ask(batch)
        return output_dist(asked, lookup(asked))

    def ask(self, batch: Mapping[str, Jagged | Tensor], *, is_ahead: bool = False) -> Asked:
        """Exchanges the ids of a batch, for a later `look_up` or `distinct_rows`; reads no rows.

        Collective: every rank, with the same features. Raises the exceptions of `forward`.

        Args:
            batch: see `forward`. In host memory, ids are range-checked without a device sync.
            is_ahead: whether the previous step is still running. On GPUs, ids then do not wait for its rows.
        """
        asked, keys = self._input_dist.ask(batch, is_ahead=is_ahead)
        if not is_ahead:
            self._take_choices(asked)
        for watcher in self._watchers:
            watcher(keys)
        return asked

    def look_up(self, asked: Asked) -> dict[str, Tensor]:
        """Returns what `forward` returns, for a batch of `ask`. Collective: every rank, in the order of `ask`."""
        self._take_choices(asked)
        return output_dist(asked, lookup(asked))

    @property
    def pooling_choices(self) -> dict[str, Any]:
        """Whether owners or examples pool the bags of each feature with `pool_at="auto"`, as a JSON value.

        The ranks decide from the first batch, and again when the mean bag size has doubled or halved. The choice
        changes the rounding of sums. A resumed run that sets the saved choices therefore repeats the same bits; without
        them it decides again. Choices of another number of ranks are ignored.
        """
        return {"num_ranks": self.ranks.size, "features": {name: [*choice] for name, choice in self._choices.items()}}

    @pooling_choices.setter
    def pooling_choices(self, saved: Mapping[str, Any]) -> None:
        choices = saved["features"] if saved["num_ranks"] == self.ranks.size else {}
        self._choices = {name: PoolingChoice(*choices[name]) for name in choices if name in self.features}
        self._input_dist.choices = self._choices

    def _take_choices(self, asked: Asked) -> None:
        """Adopts the pooling choices that follow from a batch; called in the order of steps."""
        if torch.is_grad_enabled():
            if asked.choices is not self._choices:  # because setting an attribute of a module takes microseconds
                self._choices = asked.choices
            # The next batch without gradients begins a new evaluation.
            self._input_dist.choices_of_evaluation = {}

    def distinct_rows(self, asked: Asked, *, counts: Tensor | None = None) -> Tensor:
        """Fetches each distinct row of a batch once, for models that compute on distinct rows.

        Collective: every rank, in the order of their calls of `ask`. `counts` must be given on every rank or on none.

        Args:
            asked: the batch, from `ask`.
            counts: [num_distinct or more] float32; number of terms of the loss that use each row. It is sent to the
                rows' owners with the gradient, for an optimizer with `optim.CurvatureDamping`.

        Returns:
            [num_distinct, dim] float32; `Asked.places` gives the index of each value's row.

        Raises:
            ValueError: the features' tables differ in dim, a feature is pooled, or the counts have another dtype.
        """
        return fetch_distinct(asked, counts)

    def own_rows(self, name: str) -> Tensor:
        """Returns the rows of a table that this rank owns, for models that score all rows.

        Backward delivers the gradients of these rows to the optimizer, with those of look-ups. The next step then
        updates every row. Not a collective: nothing is sent.

        Returns:
            [num_slots, dim] float32 in the order of `TableShard.slots`; may share memory with the table.
        """
        (group,) = [group for group in self.table_groups if name in group.table_names]
        return fetch_own(group, self.shards[name])

    def bring_rows(self, asked: Asked) -> None:
        """Prefetches the rows that a batch reads from this rank, if they are stored in host memory."""
        for part in asked.parts:
            part.bring_rows()

    def gather_table(self, name: str, state: str = "weight") -> Tensor:
        """Returns a whole table, or its state of a name such as "accumulator", in the order of ids, on every rank.

        Collective: every rank. The table must fit into the memory of each rank.
        """
        for group in self.table_groups:
            group.access.write_back()
        shard = self.shards[name]
        return shard.gather(self.ranks, state)

    def shard_views(self) -> list[ShardView]:
        """Returns this rank's weights and optimizer state as views that a checkpoint saves and loads.

        Collective: every rank, because it calls the optimizer's `settle`, whose exceptions it raises.
        """
        return [view for group in self.table_groups for view in group.views()]

    def __getstate__(self) -> dict[str, Any]:
        """Returns the attributes of a copy: all but the watchers and what `_begin` derives from the tables."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_input_dist", "_watchers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the rows and the module's own parameters to a device, as `to` asks; refuses another dtype.

        Raises:
            ValueError: rows would be stored in another dtype, or on a device without memory.
        """
        for group in self.table_groups:
            made = fn(torch.empty(0, dtype=group.weight.dtype, device=self.device))
            if made.dtype != group.weight.dtype:
                raise ValueError(
                    f"the rows of {', '.join(group.table_names)} are stored as {group.weight.dtype} and looked up as "
                    f"torch.float32; they cannot be converted to {made.dtype}. {_OF_ANOTHER_DTYPE}"
                )
            if made.device.type == "meta":
                raise ValueError("tables cannot live on the meta device, because their rows get values when created")
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
        """Adds weights, optimizer state and step counts: "item.weight", "item.accumulator", "item.step".

        Rows are DTensors in the order of slots that share memory with the tables. So torch's distributed checkpoint
        can save them, and load them in place. A step count is a copy, which `load_state_dict` writes back.
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
        """Loads the entries of `_save_to_state_dict`, or whole tensors in the order of slots."""
        for group in self.table_groups:
            group.changes.before_update_of_all()
        views = self.shard_views()
        rest = take_entries(state_dict, prefix, views, missing_keys, error_msgs)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Points torch's distributed checkpoint to `_entries` for tables, which are not attributes."""
        return dict.fromkeys(vars(self._entries), "_entries")

    @property
    def _entries(self) -> SimpleNamespace:
        return as_attributes(self.shard_views())


def _lines_of(group: TableGroup, features: Collection[FeatureSpec]) -> Iterator[str]:
    """Yields one line per table."""
    for spec in group.specs:
        frozen = ", frozen" if spec.name in group.frozen else ""
        dtype = str(spec.dtype).removeprefix("torch.")
        names = [feature.name for feature in features if feature.table_name == spec.name]
        yield (
            f"({spec.name}): {spec.num_rows:,} rows of {spec.dim} {dtype}, trained by {spec.optimizer!r}"
            f"{frozen}, features {', '.join(names) or 'none'}"
        )
