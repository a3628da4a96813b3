"""The rows that one rank owns: weights and optimizer state of a group of tables."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embedtrain.distributed.ranks import Ranks
from embedtrain.embedding.cache import WEIGHT, RowAccess, RowCache, RowsOnDevice
from embedtrain.embedding.gradients import GradientMailbox
from embedtrain.embedding.init import initial_rows
from embedtrain.embedding.placement import DEVICE, Placement, hot_rows
from embedtrain.embedding.row_changes import RowChanges
from embedtrain.embedding.shard_view import ShardView, StepCount
from embedtrain.ops._backend.mix import mix64
from embedtrain.ops._backend.row_memory import allocate_rows
from embedtrain.ops.row_gradient import RowGradient, Run
from embedtrain.optim.optimizer import SparseOptimizer
from embedtrain.optim.stores import RowsToUpdate
from embedtrain.sharding.layout import Layout, layout_of
from embedtrain.spec import TableSpec


@dataclass(frozen=True)
class TableShard:
    """Holds one table's rows on this rank: a range of slots of the weights and of each state tensor.

    Attributes:
        spec: declaration of the table.
        layout: maps ids to slots.
        slots: half-open range of slots that this rank owns; may be empty if there are more ranks than rows.
        first_row: index of the range's first slot in the local tensors of the group.
        weight: [num_slots, dim]; view of the group's weights.
        state: optimizer state by name, [num_slots, ...]; views of the group's state.
        changes: object of the group that gets the optimizer's updates.
        steps: step count of the group's optimizer.
    """

    spec: TableSpec
    layout: Layout
    slots: tuple[int, int]
    first_row: int
    weight: Tensor
    state: dict[str, Tensor]
    changes: RowChanges
    steps: StepCount

    def views(self) -> list[ShardView]:
        """Returns views of the weights and of each state, with their names in a checkpoint."""
        return [
            ShardView(
                name=f"{self.spec.name}/{name}",
                global_shape=(self.spec.num_rows, *tensor.shape[1:]),
                offset=self.slots[0],
                tensor=tensor,
                layout=self.layout.description,
                changes=self.changes,
                first_row=self.first_row,
                steps=self.steps,
            )
            for name, tensor in (("weight", self.weight), *self.state.items())
        ]

    def gather(self, ranks: Ranks, state: str = "weight") -> Tensor:
        """Returns the whole table, or a state of it, in the order of ids. Collective: every rank."""
        local = self.weight if state == "weight" else self.state[state]
        sizes = [stop - start for start, stop in map(self.layout.shard_range, range(ranks.size))]
        copies = local.repeat(ranks.size, *[1] * (local.dim() - 1))
        slots = ranks.all_to_all(copies, [local.shape[0]] * ranks.size, sizes)
        return slots[self.layout.slot_of(torch.arange(self.spec.num_rows, device=slots.device))]


class TableGroups(NamedTuple):
    """Holds the table groups of a collection that one optimizer trains."""

    table_groups: list[TableGroup]


class TableGroup:
    """Holds tables of equal dim, dtype, optimizer and layout, whose local rows are stored in one tensor.

    The tables follow one another in the tensor. Every rank reserves `rows_per_rank` rows per table, so that the index
    of a row is the same arithmetic on every owner. The last ranks may have reserved rows that are never used.

    Attributes:
        weight: [num_local_rows, dim].
        state: optimizer state by name, [num_local_rows] or [num_local_rows, dim] float32; see `allocate_state`.
        shards: this rank's shard of each table, in order.
        changes: gets the rows that the optimizer updates; background saves depend on it.
        num_local_rows: number of rows reserved on each rank.
        ranks: the ranks that share the tables.
        vector_wire_dtype: dtype of vectors that are sent between ranks; by default the dtype of the weights.
        gradient_wire_dtype: dtype of gradients that are sent between ranks; by default float32.
        gradients: mailbox of the gradients that no step has applied yet.
        access: reads and updates the rows, on the device or in host memory.
        steps: step count of the optimizer.
        frozen: names of the tables that get no gradients.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        *,
        seed: int,
        device: torch.device,
        ranks: Ranks,
        wire_dtype: torch.dtype | None = None,
        placement: Placement = DEVICE,
    ) -> None:
        self.specs = specs
        self.device = device
        self.ranks = ranks
        self.vector_wire_dtype = wire_dtype or specs[0].dtype
        self.gradient_wire_dtype = wire_dtype or torch.float32
        self.placement = placement
        self.steps = StepCount()
        self.frozen: frozenset[str] = frozenset()
        layouts = self._layouts()
        self.num_local_rows = sum(layout.rows_per_rank for layout in layouts)
        self._hold(self._allocate((self.num_local_rows, specs[0].dim), 0.0, specs[0].dtype), {})
        for shard in self.shards:
            shard.weight.copy_(initial_rows(shard.spec, *shard.slots, seed))

    def _layouts(self) -> list[Layout]:
        return [layout_of(spec.num_rows, self.ranks.size, spec.layout) for spec in self.specs]

    def _hold(self, weight: Tensor, state: dict[str, Tensor]) -> None:
        """Sets the weights and the state, and creates all objects that refer to them."""
        self.weight, self.state = weight, state
        self.changes = RowChanges({WEIGHT: weight, **state})
        num_rows, dim = weight.shape
        self.gradients = GradientMailbox(num_rows, dim, self.device, self.ranks.size, self.table_names)
        self.shards: list[TableShard] = []
        layouts, first_row = self._layouts(), 0
        for spec, layout in zip(self.specs, layouts, strict=True):
            start, stop = layout.shard_range(self.ranks.rank)
            rows = slice(first_row, first_row + stop - start)
            views = {name: tensor[rows] for name, tensor in state.items()}
            shard = TableShard(spec, layout, (start, stop), first_row, weight[rows], views, self.changes, self.steps)
            self.shards.append(shard)
            first_row += layout.rows_per_rank
        first_rows = [shard.first_row for shard in self.shards]
        self._ranges = [(shard.first_row, shard.layout.rows_per_rank) for shard in self.shards]
        self._key_map = layouts[0].key_map(layouts, first_rows, self.num_local_rows)
        starts = [first_rows, [shard.slots[0] for shard in self.shards]]
        keys_of = _RoundingKeys(torch.tensor(starts, device=self.device))
        self._keys_of = keys_of
        self.access: RowAccess = RowsOnDevice(self.changes, state, keys_of)
        if self.placement.is_host:
            pieces = [(shard.layout, shard.slots, shard.first_row) for shard in self.shards]
            choose = functools.partial(hot_rows, pieces, self.placement.cache_bytes, self.ranks.size)
            self.access = RowCache(self.changes, self.device, choose, keys_of)

    def move(self, device: torch.device) -> None:
        """Moves the rows, their state and the delivered gradients to a device."""
        earlier = self.gradients
        self.__setstate__({**self.__getstate__(), "device": device})
        self.gradients.take_over(earlier)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the attributes of a copy. A copy has no delivered gradients and no optimizer."""
        self.settle()
        self.access.write_back()
        names = ("specs", "device", "ranks", "vector_wire_dtype", "gradient_wire_dtype", "placement", "num_local_rows")
        return {name: getattr(self, name) for name in (*names, "steps", "frozen", "weight", "state")}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update({name: value for name, value in saved.items() if name not in ("weight", "state")})
        self._hold(self._own(saved["weight"]), {name: self._own(tensor) for name, tensor in saved["state"].items()})
        self.freeze(self.frozen)

    def _own(self, rows: Tensor) -> Tensor:
        """Returns a copy of rows in the kind of memory in which this group stores its rows."""
        return self._allocate(tuple(rows.shape), 0.0, rows.dtype).copy_(rows)

    def keys_of(self, tables: Sequence[int], ids: Sequence[Tensor]) -> tuple[Tensor, list[int] | Tensor]:
        """Returns a key per id, `owner * num_local_rows + local row`, of several features, feature after feature.

        Equal keys are equal rows, and sorted keys are grouped by owner.

        Args:
            tables: per feature, the position of its table in the group.
            ids: per feature, [n] int64 or int32.

        Returns:
            The keys; and per feature the number of ids outside its table, whose keys are undefined. For ids on a GPU
            the numbers are a tensor on the device.
        """
        return self._key_map(tables, ids)

    def gradient_buffer(self, num_rows: int) -> Tensor | None:
        """Returns memory for gradients [num_rows, dim] that will be sent home without a copy; None if there is none."""
        if self.gradient_wire_dtype != torch.float32:
            return None
        return self.ranks.lending_buffer(num_rows, self.weight.shape[1], self.device)

    def runs_of(self, tables: Sequence[int], num_values: Sequence[int]) -> list[Run]:
        """Returns the ranges of local rows to which the values of features belong; equal tables share a range.

        Args:
            tables: per feature, the position of its table in the group; ascending.
            num_values: per feature, its number of values.
        """
        runs: list[Run] = []
        latest = -1
        for table, count in zip(tables, num_values, strict=True):
            first_row, num_rows = self._ranges[table]
            if table == latest:
                count += runs.pop().num_values
            runs.append(Run(count, first_row, num_rows))
            latest = table
        return runs

    @property
    def table_names(self) -> list[str]:
        """Names of the tables, in order."""
        return [spec.name for spec in self.specs]

    @property
    def optimizer(self) -> object | None:
        """The optimizer that applies the gradients; None if there is none or it was deleted."""
        return None if self.gradients.optimizer is None else self.gradients.optimizer()

    def take(self, optimizer: object, settings: dict[str, Any]) -> None:
        """See `RowStore`."""
        self.gradients.optimizer = weakref.ref(optimizer)
        self.steps.settings = settings

    def views(self) -> list[ShardView]:
        """Returns views of the shards' weights and states, after writing back the cache and calling `settle`."""
        self.access.write_back()
        self.settle()
        return [view for shard in self.shards for view in shard.views()]

    def settle(self) -> None:
        """Makes `steps` exact: the optimizer's `settle` finds out whether its last step was applied."""
        optimizer = self.optimizer
        if isinstance(optimizer, SparseOptimizer):
            optimizer.settle()

    def freeze(self, names: Collection[str]) -> None:
        """Freezes the tables with these names, and unfreezes all others. Frozen tables get no gradients."""
        self.frozen = frozenset(names)
        ranges = [(shard.first_row, shard.first_row + len(shard.weight)) for shard in self.shards]
        is_frozen = [name in self.frozen for name in self.table_names]
        self.gradients.anchor.requires_grad_(not all(is_frozen))
        self.gradients.frozen = [rows for rows, is_own in zip(ranges, is_frozen, strict=True) if is_own]

    def forget_state(self) -> None:
        """See `RowStore`."""
        for state in (self.state, *(shard.state for shard in self.shards)):
            state.clear()
        self.changes.tensors = {WEIGHT: self.weight}

    def allocate_state(self, name: str, fill: float, per_element: bool = False) -> Tensor:
        """Allocates optimizer state of one float32 per row, or per element, in the same memory as the weights."""
        assert name not in self.state, f"two states are called {name!r}"
        shape = self.weight.shape if per_element else self.weight.shape[:1]
        whole = self._allocate(tuple(shape), fill, torch.float32)
        self.state[name] = self.changes.tensors[name] = whole
        for shard in self.shards:
            shard.state[name] = whole[shard.first_row : shard.first_row + shard.weight.shape[0]]
        return whole

    def fill_state(self, name: str, value: float) -> None:
        """Sets a state of all rows to `value`."""
        self.access.write_back()
        self.changes.before_update_of_all()
        self.state[name].fill_(value)

    def waiting_gradient(self, *, is_padded: bool = False) -> RowGradient:
        """See `GradientMailbox.waiting`, and `RowGradient.padded`."""
        if self.access.is_on_host:
            self.access.join_copies()  # the host waits for the step's finite check, which is computed after this
        gradient = self.gradients.waiting()
        takes_padded = is_padded and not self.access.is_on_host and not self.changes.is_watched
        return gradient.padded() if takes_padded else gradient

    def clear_gradient(self) -> None:
        """Removes all delivered gradients."""
        self.gradients.clear()

    def open_rows(self, gradient: RowGradient) -> tuple[RowsToUpdate, RowGradient]:
        """See `RowAccess.open`."""
        return self.access.open(gradient)

    def close_rows(self) -> None:
        """Ends the update that `open_rows` began."""
        self.access.close()
        self.gradients.was_applied = True

    def _allocate(self, shape: tuple[int, ...], fill: float, dtype: torch.dtype) -> Tensor:
        # Host memory is not pinned, because pinning could double the memory of a table: rows use pinned buffers.
        return allocate_rows(shape, fill, dtype, torch.device("cpu") if self.placement.is_host else self.device)

    def tables_of(self, rows: Tensor) -> Tensor:
        """See `RowStore`."""
        return self._keys_of.tables_of(rows)

    def describe(self, row: int) -> str:
        """Returns the names of the table and the row of a local row, for messages."""
        shard = max((s for s in self.shards if s.first_row <= row), key=lambda s: s.first_row)
        slot = torch.tensor(shard.slots[0] + row - shard.first_row)
        return f"table {shard.spec.name!r}, row {int(shard.layout.id_of(slot))}"

    def rounding_keys(self, gradient: RowGradient, step: int) -> Tensor | None:
        """Returns a key for stochastic rounding per row of the gradient; None for float32 weights."""
        return self._keys_of(gradient.rows, step) if self.weight.dtype == torch.bfloat16 else None


class _RoundingKeys:
    """Computes keys for stochastic rounding from table, slot and step, so that rounding is equal for every world size.

    Args:
        starts: [2, num_tables] int64; per table, its first local row and its first slot on this rank.
    """

    def __init__(self, starts: Tensor) -> None:
        self._starts = starts

    def __call__(self, rows: Tensor, step: int) -> Tensor:
        """Returns a key per local row for a step."""
        firsts, starts = self._starts
        table = self.tables_of(rows)
        slots = rows - firsts[table] + starts[table]
        keys: Tensor = mix64(mix64(torch.full_like(table, step)) + table) + slots
        return keys

    def tables_of(self, rows: Tensor) -> Tensor:
        """Returns the position of each local row's table."""
        return torch.bucketize(rows, self._starts[0, 1:], right=True)
