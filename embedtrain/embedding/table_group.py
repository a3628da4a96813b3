"""The rows that one rank holds: weights and optimizer state side by side."""

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
    """One table's rows on this rank: a range of slots of the weights and of each state tensor.

    Attributes:
        spec: the table.
        layout: where its ids lie.
        slots: half-open range of slots held here; empty where the ranks outnumber the rows.
        first_row: where the range begins in the group's local tensors.
        weight: [slots, dim], a view of the group's.
        state: name -> [slots, ...], views of the group's.
        changes: the group's, which the optimizer tells of its updates.
        steps: the group's count of the steps that its optimizer did.
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
        """Returns the weight and the states under their names in a checkpoint."""
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
        """Returns the whole table, or an optimizer's state of it, in order of id. Collective: every rank."""
        local = self.weight if state == "weight" else self.state[state]
        sizes = [stop - start for start, stop in map(self.layout.shard_range, range(ranks.size))]
        copies = local.repeat(ranks.size, *[1] * (local.dim() - 1))
        slots = ranks.all_to_all(copies, [local.shape[0]] * ranks.size, sizes)
        return slots[self.layout.slot_of(torch.arange(self.spec.num_rows, device=slots.device))]


class TableGroups(NamedTuple):
    """Some of the groups of a collection, to be trained by one optimizer."""

    table_groups: list[TableGroup]


class TableGroup:
    """Tables of one dim, dtype and optimizer, whose local rows lie one table after the other in one tensor.

    Every rank reserves `rows_per_rank` rows a table, so a row's place is the same arithmetic for every owner;
    the few rows that the last ranks do not fill are never asked for.

    Attributes:
        weight: [num_local_rows, dim].
        state: name -> [num_local_rows] or [num_local_rows, dim] float32; an optimizer's, allocated by `allocate_state`.
        shards: the tables, in order.
        changes: told by the optimizer which rows it updates; a save in the background relies on it.
        num_local_rows: rows reserved on each rank.
        ranks: the ranks that share the tables.
        vector_wire_dtype: in which vectors travel between ranks: the storage's unless chosen.
        gradient_wire_dtype: in which gradients do: float32 unless chosen.
        gradients: those that wait for an optimizer.
        access: reads and updates the rows, wherever they live.
        steps: how many steps the optimizer did.
        frozen: names of the tables whose rows no gradient reaches.
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
        """Takes weights and state for its own, and makes everything that refers to them."""
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
        """Moves the rows, their state and the gradients that wait."""
        earlier = self.gradients
        self.__setstate__({**self.__getstate__(), "device": device})
        self.gradients.take_over(earlier)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy is made of. It has no gradients that wait, and no optimizer until one takes it."""
        self.settle()
        self.access.write_back()
        names = ("specs", "device", "ranks", "vector_wire_dtype", "gradient_wire_dtype", "placement", "num_local_rows")
        return {name: getattr(self, name) for name in (*names, "steps", "frozen", "weight", "state")}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update({name: value for name, value in saved.items() if name not in ("weight", "state")})
        self._hold(self._own(saved["weight"]), {name: self._own(tensor) for name, tensor in saved["state"].items()})
        self.freeze(self.frozen)

    def _own(self, rows: Tensor) -> Tensor:
        """Returns a copy of rows in memory of the kind that this group's rows have."""
        return self._allocate(tuple(rows.shape), 0.0, rows.dtype).copy_(rows)

    def keys_of(self, tables: Sequence[int], ids: Sequence[Tensor]) -> tuple[Tensor, list[int] | Tensor]:
        """Returns a key per id of several features, `owner * num_local_rows + local row`, feature after feature.

        Sorted keys are in order of owner; equal keys are the same row.

        Args:
            tables: per feature, the position of its table in the group.
            ids: per feature [n] int64 or int32.

        Returns:
            The keys, and per feature how many ids are not rows of its table; keys of those mean nothing. The numbers
            are on the device for ids of a GPU.
        """
        return self._key_map(tables, ids)

    def runs_of(self, tables: Sequence[int], num_values: Sequence[int]) -> list[Run]:
        """Returns where the local rows of features lie, whose tables, one a feature, are in ascending order."""
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
        """The tables, in order."""
        return [spec.name for spec in self.specs]

    @property
    def optimizer(self) -> object | None:
        """The optimizer that takes the gradients; None if there is none or it was deleted."""
        return None if self.gradients.optimizer is None else self.gradients.optimizer()

    def take(self, optimizer: object, settings: dict[str, Any]) -> None:
        """See `RowStore`."""
        self.gradients.optimizer = weakref.ref(optimizer)
        self.steps.settings = settings

    def views(self) -> list[ShardView]:
        """Returns the shards' weights and states, which are up to date and whose steps are settled; see `settle`."""
        self.access.write_back()
        self.settle()
        return [view for shard in self.shards for view in shard.views()]

    def settle(self) -> None:
        """Has the optimizer find out whether its last step was applied, so that `steps` is right. See its `settle`."""
        optimizer = self.optimizer
        if isinstance(optimizer, SparseOptimizer):
            optimizer.settle()

    def freeze(self, names: Collection[str]) -> None:
        """Has no gradient reach the rows of some of the tables, and those of the others again."""
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
        """Gives every row, or every element of it, one float32 of optimizer state, where the weights are."""
        assert name not in self.state, f"two states are called {name!r}"
        shape = self.weight.shape if per_element else self.weight.shape[:1]
        whole = self._allocate(tuple(shape), fill, torch.float32)
        self.state[name] = self.changes.tensors[name] = whole
        for shard in self.shards:
            shard.state[name] = whole[shard.first_row : shard.first_row + shard.weight.shape[0]]
        return whole

    def fill_state(self, name: str, value: float) -> None:
        """Sets a state of all rows."""
        self.access.write_back()
        self.changes.before_update_of_all()
        self.state[name].fill_(value)

    def waiting_gradient(self, *, is_padded: bool = False) -> RowGradient:
        """See `GradientMailbox.waiting`, and `RowGradient.padded`."""
        if self.access.is_on_host:
            self.access.join_copies()  # the step's verdict, which the host waits for, is computed after this
        gradient = self.gradients.waiting()
        takes_padded = is_padded and not self.access.is_on_host and not self.changes.is_watched
        return gradient.padded() if takes_padded else gradient

    def clear_gradient(self) -> None:
        """Forgets all gradients delivered."""
        self.gradients.clear()

    def open_rows(self, gradient: RowGradient) -> tuple[RowsToUpdate, RowGradient]:
        """See `RowAccess.open`."""
        return self.access.open(gradient)

    def close_rows(self) -> None:
        """Ends an update of rows that were opened."""
        self.access.close()
        self.gradients.was_applied = True

    def _allocate(self, shape: tuple[int, ...], fill: float, dtype: torch.dtype) -> Tensor:
        # Rows in host memory travel through buffers of their own: to pin a table would take twice its memory.
        return allocate_rows(shape, fill, dtype, torch.device("cpu") if self.placement.is_host else self.device)

    def tables_of(self, rows: Tensor) -> Tensor:
        """See `RowStore`."""
        return self._keys_of.tables_of(rows)

    def describe(self, row: int) -> str:
        """Names the table and the id of a local row, for messages."""
        shard = max((s for s in self.shards if s.first_row <= row), key=lambda s: s.first_row)
        slot = torch.tensor(shard.slots[0] + row - shard.first_row)
        return f"table {shard.spec.name!r}, row {int(shard.layout.id_of(slot))}"

    def rounding_keys(self, gradient: RowGradient, step: int) -> Tensor | None:
        """Returns a key per row of the gradient and step for stochastic rounding; None for float32 weights."""
        return self._keys_of(gradient.rows, step) if self.weight.dtype == torch.bfloat16 else None


class _RoundingKeys:
    """Keys for stochastic rounding: they depend on table, slot and step alone, so every world size rounds alike.

    Args:
        starts: [2, num_tables] int64; where tables begin among the local rows and the slots.
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
        return torch.searchsorted(self._starts[0], rows, right=True) - 1
