"""What a run needs on each rank, and what a step costs: pure arithmetic, no rank and no table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from embedtrain.sharding.cost import Wire, bytes_of_rows, bytes_of_sums
from embedtrain.sharding.layout import layout_of
from embedtrain.sharding.machine import Machine

_EXACT_RANKS = 1000
_BLOCK_RATIO = 1.02
_ID_BUFFERS_BYTES = 64
"""A step's scratch for each id: the key, its sorted copies and their positions, eight words of 64 bits."""
_POOL_FACTOR = 4 / 3
"""Buffers are kept in sizes of two or three quarters of a power of two."""

ROW_STAGES = ("sort", "gather", "exchange", "sum", "update")
"""Stages of a step in which rows are handled."""


@dataclass(frozen=True)
class Law:
    """How often each row is drawn: blocks of rows that are drawn alike.

    Attributes:
        shares: [n] of all draws that fall on each row of a block.
        num_rows: [n] rows of each block.
    """

    shares: NDArray[np.float64]
    num_rows: NDArray[np.float64]

    @classmethod
    def of_weights(cls, weights: NDArray[np.float64], num_rows: NDArray[np.float64]) -> Law:
        """Returns the law of rows drawn in proportion to weights."""
        return cls(weights / np.dot(weights, num_rows), num_rows)

    @classmethod
    def zipf(cls, num_rows: int, exponent: float) -> Law:
        """Returns the law by which the r-th row is drawn in proportion to `r ** -exponent`; 0 is uniform."""
        first = np.arange(1, min(num_rows, _EXACT_RANKS) + 1, dtype=np.float64)
        if num_rows <= _EXACT_RANKS:
            return cls.of_weights(first**-exponent, np.ones_like(first))
        num_blocks = math.ceil(math.log(num_rows / _EXACT_RANKS, _BLOCK_RATIO))
        edges = np.geomspace(_EXACT_RANKS + 0.5, num_rows + 0.5, num_blocks + 1)
        middles = np.sqrt(edges[1:] * edges[:-1])
        ranks, sizes = np.concatenate([first, middles]), np.concatenate([np.ones_like(first), np.diff(edges)])
        return cls.of_weights(ranks**-exponent, sizes)

    def thinned(self, keep: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> tuple[Law, float]:
        """Returns the law of the draws that are kept with a probability of their row's share, and their share."""
        kept = self.shares * keep(self.shares)
        return Law.of_weights(kept, self.num_rows), float(np.dot(kept, self.num_rows))


@dataclass(frozen=True)
class TableLoad:
    """A table and what a step asks of it, over all ranks.

    Attributes:
        name: of the table.
        num_rows: rows.
        dim: columns.
        value_bytes: of each place of a row as it is stored.
        state_row_bytes: of optimizer state that each row has.
        state_value_bytes: of optimizer state that each place of a row has.
        wire_bytes: of each place of a vector or gradient that travels; None as it is stored, and 4.
        draws: how many ids of which law.
        home_draws: likewise, of those that a rank draws from one of `home_parts` parts of the table, which it owns
            where the ranks divide the parts.
        home_parts: how many.
        num_bags: of pooled features; None where each id has a vector of its own.
    """

    name: str
    num_rows: int
    dim: int
    value_bytes: int
    state_row_bytes: int
    state_value_bytes: int
    draws: tuple[tuple[float, Law], ...]
    wire_bytes: int | None = None
    num_bags: float | None = None
    home_draws: tuple[tuple[float, Law], ...] = ()
    home_parts: int = 1

    @property
    def weight_bytes(self) -> int:
        """Of one row."""
        return self.dim * self.value_bytes

    @property
    def state_bytes(self) -> int:
        """Of one row."""
        return self.state_row_bytes + self.dim * self.state_value_bytes

    @property
    def num_ids(self) -> float:
        """Of a step, over all ranks."""
        return sum(number for number, _ in (*self.draws, *self.home_draws))

    @property
    def num_distinct(self) -> float:
        """How many distinct rows a step is expected to touch, over all ranks."""
        return self._expected(1.0, 1.0)

    def distinct_of_rank(self, world_size: int) -> tuple[float, float]:
        """Returns how many distinct rows a rank is expected to look up in a step, and how many lie elsewhere."""
        parts = min(world_size, self.home_parts)
        home = self._expected(1 / world_size, parts / world_size) / parts
        others = self._expected(1 / world_size, 0.0) * (1 - 1 / parts)
        return home + others, others + home * (1 - parts / world_size)

    def _expected(self, share: float, home_share: float) -> float:
        """Returns how many distinct rows of the table shares of a step's draws are expected to touch."""
        laws = [(number * share, law) for number, law in self.draws]
        laws += [(number * home_share, law) for number, law in self.home_draws]
        if not laws:
            return 0.0
        intensity = sum(number * law.shares for number, law in laws)
        return float(np.dot(-np.expm1(-intensity), laws[0][1].num_rows))


@dataclass(frozen=True)
class Arithmetic:
    """What a part of a model computes in a step on whole tensors, forward, backward and optimizer together.

    Attributes:
        ops: operations that each rank starts.
        step_values: numbers that they return on each rank, whatever its share of the examples.
        values: those for the examples, over all ranks.
        products: multiply-adds of matrix products, over all ranks.
        batched_products: those of many small products at once, over all ranks.
    """

    ops: float = 0.0
    step_values: float = 0.0
    values: float = 0.0
    products: float = 0.0
    batched_products: float = 0.0

    def __add__(self, other: Arithmetic) -> Arithmetic:
        return Arithmetic(
            self.ops + other.ops,
            self.step_values + other.step_values,
            self.values + other.values,
            self.products + other.products,
            self.batched_products + other.batched_products,
        )


@dataclass(frozen=True)
class Workload:
    """A model as the plan sees it.

    Attributes:
        tables: what is sharded.
        num_features: looked up in a step.
        dense_bytes: parameters and optimizer state that every rank has whole.
        dense_gradient_bytes: of their gradients, which are averaged over the ranks.
        dense_collectives: that a step needs for what is not rows.
        draws: words and negatives drawn from a text in a step, over all ranks.
        positives: interactions of a step, over all ranks.
        records: examples of a click log that are read for a step, over all ranks.
        record_values: numbers and rows that these hold.
        skipgram_scores: of contexts and words in a step of word2vec, over all ranks.
        skipgram_products: multiply-adds of these, forward and backward.
        dense: layers and their optimizer.
        scores: of users and candidates, and the loss of them.
        save_bytes: most memory that a save in the background takes on a rank; None for no bound.
        num_checkpoints: that lie in the run folder at most, one that is being written included.
    """

    tables: tuple[TableLoad, ...]
    num_features: int
    dense_bytes: int = 0
    dense_gradient_bytes: int = 0
    dense_collectives: int = 0
    draws: float = 0.0
    positives: float = 0.0
    records: float = 0.0
    record_values: float = 0.0
    skipgram_scores: float = 0.0
    skipgram_products: float = 0.0
    dense: Arithmetic = Arithmetic()
    scores: Arithmetic = Arithmetic()
    save_bytes: int | None = 0
    num_checkpoints: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank.

    Attributes:
        weights: of the tables.
        state: of their optimizer.
        dense: of what every rank has whole.
        buffers: of a step, at most.
        save: of rows that change while a checkpoint is written, at most.
    """

    weights: int
    state: int
    dense: int
    buffers: int
    save: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.state + self.dense + self.buffers + self.save


@dataclass(frozen=True)
class Exchange:
    """Bytes that a rank sends to others in a step.

    Attributes:
        ids: row numbers.
        vectors: rows, or sums of rows, to those who asked.
        gradients: back to the owners.
        dense: gradients of what every rank has whole, out to be added up and back.
        at_owner: tables whose bags their owners pool.
    """

    ids: int
    vectors: int
    gradients: int
    dense: int
    at_owner: tuple[str, ...]

    @property
    def total(self) -> int:
        """All of it."""
        return self.ids + self.vectors + self.gradients + self.dense


@dataclass(frozen=True)
class _Step:
    """One table's step on one rank: what it looks up and what it is asked."""

    table: TableLoad
    ids: float
    distinct: float  # rows that this rank looks up
    away: float  # of those, the ones that lie elsewhere
    owned: float  # distinct rows that this rank updates
    sums: float  # 0 where rows travel
    bags: float
    wire: Wire

    @property
    def moved(self) -> float:
        """Rows or sums of this rank's examples, from all ranks; on average it hands out as many."""
        return self.sums or self.distinct


def memory_of(workload: Workload, world_size: int) -> Memory:
    """Returns what the fullest of so many ranks needs."""
    rows = [(table, layout_of(table.num_rows, world_size).rows_per_rank) for table in workload.tables]
    weights = sum(count * table.weight_bytes for table, count in rows)
    state = sum(count * table.state_bytes for table, count in rows)
    save = weights + state if workload.save_bytes is None else min(workload.save_bytes, weights + state)
    buffers = 0.0
    for step in _steps(workload, world_size):
        vector_bytes = step.table.dim * 4
        # What came, what is handed on, what goes home and what is summed up; pooled vectors and their gradients.
        rows_alive = 2 * step.moved + step.distinct * (not step.sums) + step.owned * 2
        buffers += step.ids * _ID_BUFFERS_BYTES + rows_alive * vector_bytes + 2 * step.bags * vector_bytes
    dense = workload.dense_bytes + workload.dense_gradient_bytes
    return Memory(weights, state, dense, math.ceil(buffers * _POOL_FACTOR), save)


def exchange_of(workload: Workload, world_size: int) -> Exchange:
    """Returns what a rank sends in a step, on average."""
    others = (world_size - 1) / world_size
    ids = vectors = gradients = 0.0
    for step in _steps(workload, world_size):
        out_bytes = step.wire.gradient_bytes if step.sums else step.wire.vector_bytes
        sent = step.sums * others or step.away
        ids += (step.ids * others if step.sums else step.away) * step.wire.id_bytes
        vectors += sent * step.table.dim * out_bytes
        gradients += sent * step.table.dim * step.wire.gradient_bytes
    at_owner = tuple(step.table.name for step in _steps(workload, world_size) if step.sums)
    dense = 2 * others * workload.dense_gradient_bytes
    return Exchange(round(ids), round(vectors), round(gradients), round(dense), at_owner)


def checkpoint_bytes(workload: Workload) -> int:
    """Returns the size of one whole checkpoint, over all ranks."""
    return workload.dense_bytes + sum(
        table.num_rows * (table.weight_bytes + table.state_bytes) for table in workload.tables
    )


def seconds_of(workload: Workload, world_size: int, machine: Machine, num_hosts: int = 1) -> dict[str, float]:
    """Returns the seconds of a step on one rank, by stage, which follow one another.

    Small messages to many peers are counted one after the other, which is the slowest that they can be.
    """
    steps = _steps(workload, world_size)
    exchange = exchange_of(workload, world_size)
    # Optimizers are told apart by what they keep.
    num_groups = len({(t.dim, t.value_bytes, t.state_row_bytes, t.state_value_bytes) for t in workload.tables})
    gathered = sum((step.ids if step.sums else step.distinct) * step.table.weight_bytes for step in steps)
    summed = sum((step.ids if step.sums else step.moved) * step.table.dim * 4 for step in steps)
    updated = sum(step.owned * (step.table.weight_bytes + step.table.state_bytes) for step in steps)
    away_hosts = (num_hosts - 1) / num_hosts * world_size / max(world_size - 1, 1)
    between_hosts = exchange.total * away_hosts if num_hosts > 1 else 0.0
    network = machine.network_bytes_per_second or machine.exchange_bytes_per_second * world_size / num_hosts
    # Ids, vectors and gradients for each group; the counts and the optimizer's agreement once.
    num_collectives = 3 * num_groups + 2 + workload.dense_collectives
    latency = machine.collective_seconds * (world_size - 1) * num_collectives
    parts = {
        "sample": _sample_seconds(workload, world_size, machine),
        "sort": sum(step.ids + step.moved * (world_size > 1) for step in steps) / machine.sort_ids_per_second,
        "gather": gathered / machine.gather_bytes_per_second,
        "exchange": (exchange.total - between_hosts) / machine.exchange_bytes_per_second
        + between_hosts * (world_size / num_hosts) / network
        + latency,
        "model": workload.skipgram_scores / world_size / machine.skipgram_scores_per_second
        + workload.skipgram_products / world_size / machine.skipgram_products_per_second
        + _arithmetic_seconds(workload.dense, world_size, machine.values_per_second, machine)
        + _arithmetic_seconds(workload.scores, world_size, machine.score_values_per_second, machine),
        "sum": (summed * (world_size > 1)) / machine.sum_bytes_per_second,
        "update": updated / machine.update_bytes_per_second,
        "rest": machine.step_seconds + machine.feature_seconds * (workload.num_features - 1),
    }
    of_rows = machine.seconds_per_predicted_second
    return {name: seconds * (of_rows if name in ROW_STAGES else 1.0) for name, seconds in parts.items()}


def _sample_seconds(workload: Workload, world_size: int, machine: Machine) -> float:
    of_all = (
        workload.draws / machine.sample_draws_per_second
        + workload.records / machine.records_per_second
        + workload.record_values / machine.record_values_per_second
    )
    # Every rank draws the positives of the whole step: those of others are among its candidates.
    return of_all / world_size + workload.positives / machine.positives_per_second


def _arithmetic_seconds(work: Arithmetic, world_size: int, values_per_second: float, machine: Machine) -> float:
    values = work.step_values + work.values / world_size
    return (
        work.ops * machine.op_seconds
        + values / values_per_second
        + work.products / world_size / machine.dense_products_per_second
        + work.batched_products / world_size / machine.batched_products_per_second
    )


@dataclass(frozen=True)
class Remedy:
    """A change that makes a plan fit.

    Attributes:
        change: in words.
        total_bytes: that a rank needs then.
    """

    change: str
    total_bytes: int


def remedies(workload: Workload, world_size: int, memory_bytes: int) -> list[Remedy]:
    """Returns single changes that make the workload fit into each rank's memory, those that exist."""
    found = []
    halved = _with_tables(workload, lambda table: replace(table, value_bytes=2))
    if any(table.value_bytes > 2 for table in workload.tables):
        found.append(Remedy("rows in bfloat16", memory_of(halved, world_size).total))
    ranks = _first(lambda count: memory_of(workload, count).total <= memory_bytes, world_size, 1 << 20)
    if ranks is not None:
        found.append(Remedy(f"{ranks:,} ranks", memory_of(workload, ranks).total))
    largest = max(table.dim for table in workload.tables)
    shrunk = _first(
        lambda less: memory_of(_narrowed(workload, largest - less), world_size).total <= memory_bytes, 1, largest - 1
    )
    if shrunk is not None:
        dim = largest - shrunk
        found.append(Remedy(f"dim {dim}", memory_of(_narrowed(workload, dim), world_size).total))
    return [remedy for remedy in found if remedy.total_bytes <= memory_bytes]


def _steps(workload: Workload, world_size: int) -> list[_Step]:
    return [_step_of(table, world_size) for table in workload.tables]


def _step_of(table: TableLoad, world_size: int) -> _Step:
    rows_per_rank = layout_of(table.num_rows, world_size).rows_per_rank
    wire = Wire(
        id_bytes=4 if rows_per_rank < 1 << 31 else 8,
        vector_bytes=table.wire_bytes or table.value_bytes,
        gradient_bytes=table.wire_bytes or 4,
    )
    ids, bags = table.num_ids / world_size, (table.num_bags or 0.0) / world_size
    distinct, away = table.distinct_of_rank(world_size)
    sums = 0.0
    if bags and world_size > 1:
        # A bag of n ids has rows on so many of the ranks.
        sums = bags * world_size * -math.expm1(ids / bags * math.log1p(-1 / world_size))
        is_cheaper = bytes_of_sums(round(ids), round(sums), table.dim, wire) < bytes_of_rows(
            round(distinct), table.dim, wire
        )
        sums = sums if is_cheaper else 0.0
    return _Step(table, ids, distinct, away, table.num_distinct / world_size, sums, bags, wire)


def _with_tables(workload: Workload, change: Callable[[TableLoad], TableLoad]) -> Workload:
    return replace(workload, tables=tuple(change(table) for table in workload.tables))


def _narrowed(workload: Workload, dim: int) -> Workload:
    return _with_tables(workload, lambda table: replace(table, dim=min(table.dim, dim)))


def _first(is_enough: Callable[[int], bool], low: int, high: int) -> int | None:
    """Returns the smallest number in [low, high] that is enough, where more is never less; None where none is."""
    if low > high or not is_enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low
