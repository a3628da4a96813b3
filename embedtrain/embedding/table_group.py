"""The rows that one rank holds: weights and optimizer state side by side."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from embedtrain.distributed.ranks import Ranks
from embedtrain.embedding.cache import RowCache
from embedtrain.embedding.init import initial_rows
from embedtrain.embedding.placement import DEVICE, Placement, hot_rows
from embedtrain.embedding.row_changes import RowChanges
from embedtrain.embedding.shard_view import ShardView
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.mix import mix64
from embedtrain.ops.row_gradient import Delivery, RowGradient, Run
from embedtrain.ops.row_memory import allocate_rows
from embedtrain.ops.spread_keys import SpreadTable, spread_keys
from embedtrain.optim.sparse import RowsToUpdate
from embedtrain.sharding.layout import SpreadLayout
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
    """

    spec: TableSpec
    layout: SpreadLayout
    slots: tuple[int, int]
    first_row: int
    weight: Tensor
    state: dict[str, Tensor]
    changes: RowChanges

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
            )
            for name, tensor in (("weight", self.weight), *self.state.items())
        ]


class TableGroups(NamedTuple):
    """Some of the groups of a collection, to be trained by one optimizer."""

    row_groups: list[TableGroup]


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
        anchor: an empty leaf that look-ups hang on to.
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
        self.device = device
        self.ranks = ranks
        self.vector_wire_dtype = wire_dtype or specs[0].dtype
        self.gradient_wire_dtype = wire_dtype or torch.float32
        self.state: dict[str, Tensor] = {}
        layouts = [SpreadLayout(spec.num_rows, ranks.size) for spec in specs]
        self.num_local_rows = sum(layout.rows_per_rank for layout in layouts)
        self._home = torch.device("cpu") if placement.is_host else device
        self.weight = self._allocate((self.num_local_rows, specs[0].dim), 0.0, specs[0].dtype)
        self.changes = RowChanges({"weight": self.weight})
        self.shards: list[TableShard] = []
        self._spread: list[SpreadTable] = []
        # Rows are not leaves of the graph: this one makes autograd call the look-up's backward, which delivers theirs.
        self.anchor = torch.empty(0, device=device, requires_grad=True)
        self._deliveries: list[Delivery] = []
        self._waiting: RowGradient | None = None
        first_row = 0
        for spec, layout in zip(specs, layouts, strict=True):
            start, stop = layout.shard_range(ranks.rank)
            weight = self.weight[first_row : first_row + stop - start]
            weight.copy_(initial_rows(spec, start, stop, seed))
            self.shards.append(TableShard(spec, layout, (start, stop), first_row, weight, {}, self.changes))
            self._spread.append(
                SpreadTable(spec.num_rows, layout.multiplier, layout.rows_per_rank, first_row, layout.block_rows)
            )
            first_row += layout.rows_per_rank
        starts = [[shard.first_row for shard in self.shards], [shard.slots[0] for shard in self.shards]]
        self._starts = torch.tensor(starts, device=device)  # where tables begin among the local rows and the slots
        pieces = [(shard.layout, shard.slots, shard.first_row) for shard in self.shards]
        choose = functools.partial(hot_rows, pieces, placement.cache_bytes, ranks.size)
        self._host = RowCache(self.changes, device, choose, self._rounding_keys) if placement.is_host else None

    def keys_of(self, tables: Sequence[int], ids: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Returns a key per id of several features, `owner * num_local_rows + local row`, feature after feature.

        Sorted keys are in order of owner; equal keys are the same row.

        Args:
            tables: per feature, the position of its table in the group.
            ids: per feature [n] int64 or int32.

        Returns:
            The keys, and per feature how many ids are not rows of its table; keys of those mean nothing.
        """
        return spread_keys(ids, [self._spread[table] for table in tables], self.num_local_rows)

    def runs_of(self, tables: Sequence[int], num_values: Sequence[int]) -> list[Run]:
        """Returns where the local rows of features lie, whose tables, one a feature, are in ascending order."""
        of_table: dict[int, int] = {}
        for table, count in zip(tables, num_values, strict=True):
            of_table[table] = of_table.get(table, 0) + count
        places = ((self._spread[table], count) for table, count in of_table.items())
        return [Run(count, place.first_row, place.rows_per_rank) for place, count in places]

    @property
    def table_names(self) -> list[str]:
        """The tables, in order."""
        return [shard.spec.name for shard in self.shards]

    def allocate_state(self, name: str, fill: float, per_element: bool = False) -> Tensor:
        """Gives every row, or every element of it, one float32 of optimizer state, where the weights are."""
        if name in self.state:
            raise ValueError(f"the tables hold state {name!r} already: one optimizer at a time may own it")
        shape = self.weight.shape if per_element else self.weight.shape[:1]
        whole = self._allocate(tuple(shape), fill, torch.float32)
        self.state[name] = self.changes.tensors[name] = whole
        for shard in self.shards:
            shard.state[name] = whole[shard.first_row : shard.first_row + shard.weight.shape[0]]
        return whole

    def fill_state(self, name: str, value: float) -> None:
        """Sets a state of all rows."""
        self.write_back()
        self.changes.before_update_of_all()
        self.state[name].fill_(value)

    def deliver(self, delivery: Delivery) -> None:
        """Adds gradients of local rows that one backward left; they wait here for the optimizer, not yet summed."""
        self._deliveries.append(delivery)
        self._waiting = None

    def waiting_gradient(self) -> RowGradient:
        """Returns the gradient of the global mean loss as it was delivered.

        Losses are means over the local batch; the gradient of the mean over the global batch is the sum of what the
        ranks delivered divided by the world size, which happens here and nowhere else.
        """
        if self._waiting is None:
            dim, device = self.weight.shape[1], self.device
            if self._deliveries:
                factor = 1.0 / self.ranks.size
                self._waiting = RowGradient(self._deliveries, num_rows=self.num_local_rows, dim=dim, factor=factor)
            else:
                no_rows = torch.zeros(0, dtype=torch.int64, device=device)
                self._waiting = RowGradient.of_rows(no_rows, torch.zeros(0, dim, device=device), self.num_local_rows)
        return self._waiting

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Returns the touched rows [n] int64, unique and ascending, and [n, dim] float32, the gradient of each."""
        waiting = self.waiting_gradient()
        return waiting.rows, waiting.values

    def rows_to_pool(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights that hold the local rows [n], on the device, and the rows' places in them."""
        return (self.weight, rows) if self._host is None else self._host.look_up(rows)

    @property
    def is_on_host(self) -> bool:
        """Whether the rows live in host memory, though the device computes on them."""
        return self._host is not None

    def read(self, rows: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Returns the weights [n, dim] of local rows [n], on the device; None for the dtype of the storage."""
        return gather_rows(self.weight, rows, dtype) if self._host is None else self._host.read(rows, dtype)

    def bring_ahead(self, rows: Tensor) -> None:
        """Copies rows that the next step reads to the device, where they are not there anyway."""
        if self._host is not None:
            self._host.bring_ahead(rows)

    def open_rows(self, gradient: RowGradient) -> tuple[RowsToUpdate, RowGradient]:
        """Returns what holds the gradient's rows for an update, and the gradient by their places in it.

        `close_rows` follows the update.
        """
        if self._host is not None:
            opened, num_rows = self._host.open(gradient.rows), gradient.rows.numel()
            places = torch.arange(num_rows, device=self.device)
            return opened, RowGradient.of_rows(places, gradient.values, num_rows)
        if self.changes.is_watched:
            self.changes.before_update(gradient.rows)
        return self, gradient

    def close_rows(self) -> None:
        """Ends an update of rows that were opened."""
        if self._host is not None:
            self._host.close()

    def write_back(self) -> None:
        """Brings rows in host memory up to date with the device's copies, which it lets go of."""
        if self._host is not None:
            self._host.write_back()

    def _allocate(self, shape: tuple[int, ...], fill: float, dtype: torch.dtype) -> Tensor:
        if self._home != self.device:
            return torch.full(shape, fill, dtype=dtype, pin_memory=True)
        return allocate_rows(shape, fill, dtype, self.device)

    def clear_gradient(self) -> None:
        """Forgets all gradients delivered."""
        self._deliveries = []
        self._waiting = None

    def describe(self, row: int) -> str:
        """Names the table and the id of a local row, for messages."""
        shard = max((s for s in self.shards if s.first_row <= row), key=lambda s: s.first_row)
        slot = torch.tensor(shard.slots[0] + row - shard.first_row)
        return f"table {shard.spec.name!r}, row {int(shard.layout.id_of(slot))}"

    def rounding_keys(self, gradient: RowGradient, step: int) -> Tensor | None:
        """Returns a key per row of the gradient and step for stochastic rounding; None for float32 weights.

        The key depends on table, slot and step alone, so every world size rounds alike.
        """
        return self._rounding_keys(gradient.rows, step) if self.weight.dtype == torch.bfloat16 else None

    def _rounding_keys(self, rows: Tensor, step: int) -> Tensor:
        firsts, starts = self._starts
        table = torch.searchsorted(firsts, rows, right=True) - 1
        slots = rows - firsts[table] + starts[table]
        keys: Tensor = mix64(mix64(torch.full_like(table, step)) + table) + slots
        return keys
