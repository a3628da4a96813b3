"""The arithmetic of planning: memory per rank, bytes exchanged, and a lower bound of the step time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from embedtrain.recipes.workload import TableLoad, Workload
from embedtrain.sharding.cost import Wire, bytes_of_rows, bytes_of_sums
from embedtrain.sharding.layout import layout_of

_ID_BUFFERS_BYTES = 64
"""Scratch memory of a step per id: its key, sorted copies and positions, eight 64-bit words."""
_POOL_FACTOR = 4 / 3
"""Buffers are rounded up to 3/4 of a power of two or to a power of two, so they may be 4/3 too large."""
_MOST_WAITING = 17
"""Maximum number of micro-batches whose gradients are held before they are summed per row."""
_BATCHES_ALIVE = 2
"""The batch of this step, and the next batch, which may be prefetched."""


@dataclass(frozen=True)
class Memory:
    """Holds the bytes that the rank with the most rows needs.

    Attributes:
        weights: the rank's rows.
        state: optimizer state of these rows.
        dense: replicated parameters with their gradients.
        buffers: batches and buffers of a step, as if all were alive at once.
        save: maximum for copies of changed rows during a background save.
    """

    weights: int
    state: int
    dense: int
    buffers: int
    save: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.state + self.dense + self.buffers + self.save


@dataclass(frozen=True)
class Exchange:
    """Holds the mean number of bytes that a rank sends to other ranks per step.

    Attributes:
        ids: row numbers, to the owners of the rows.
        vectors: rows or sums of rows, to the ranks that requested them.
        gradients: gradients of rows or sums, to the owners.
        dense: all-reduce of replicated values such as dense gradients.
        at_owner: names of the tables whose bags are pooled at the owners.
    """

    ids: int
    vectors: int
    gradients: int
    dense: int
    at_owner: tuple[str, ...]

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.ids + self.vectors + self.gradients + self.dense


@dataclass(frozen=True)
class _Step:
    """Holds the load of one table on one rank in a step or a micro-batch.

    Attributes:
        table: the table.
        ids: number of ids in this rank's batch.
        distinct: number of distinct rows that this rank looks up.
        away: number of distinct rows that other ranks own.
        owned: number of distinct rows that this rank updates.
        sums: number of sums that this rank receives; 0 if rows are sent instead of sums.
        bags: number of bags in this rank's batch.
        wire: sizes of values on the wire.
    """

    table: TableLoad
    ids: float
    distinct: float
    away: float
    owned: float
    sums: float
    bags: float
    wire: Wire

    @property
    def moved(self) -> float:
        """Number of rows or sums that this rank receives; on average it sends the same number."""
        return self.sums or self.distinct


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second of one rank while all ranks work.

    Attributes:
        memory: bytes read plus bytes written; None if unknown.
        exchange: bytes sent to other ranks; None if unknown.
    """

    memory: float | None = None
    exchange: float | None = None


def memory_of(workload: Workload, world_size: int) -> Memory:
    """Returns the memory of the rank with the most rows."""
    rows = [(table, layout_of(table.num_rows, world_size).rows_per_rank) for table in workload.tables]
    weights = sum(count * table.weight_bytes for table, count in rows)
    state = sum(count * table.state_bytes for table, count in rows)
    save = weights + state if workload.save_bytes is None else min(workload.save_bytes, weights + state)
    buffers = 0.0
    num_waiting = min(workload.accumulate_steps, _MOST_WAITING) - 1
    for step, whole in zip(_micro_steps(workload, world_size), _steps(workload, world_size), strict=True):
        vector_bytes = step.table.dim * 4
        # Received and sent vectors, their gradients and summed gradients; pooled vectors and their gradients.
        rows_alive = (2 + num_waiting) * step.moved + step.distinct * (not step.sums) + whole.owned * 2
        buffers += step.ids * _ID_BUFFERS_BYTES + rows_alive * vector_bytes + 2 * step.bags * vector_bytes
    batches = math.ceil(_BATCHES_ALIVE * workload.batch_bytes / world_size)
    dense = workload.dense_bytes + workload.reduced_bytes
    return Memory(weights, state, dense, batches + math.ceil(buffers * _POOL_FACTOR), save)


def exchange_of(workload: Workload, world_size: int) -> Exchange:
    """Returns the mean number of bytes that a rank sends per step."""
    others = (world_size - 1) / world_size
    ids = vectors = gradients = 0.0
    micro_steps = _micro_steps(workload, world_size)
    for step in micro_steps:
        out_bytes = step.wire.gradient_bytes if step.sums else step.wire.vector_bytes
        sent = step.sums * others or step.away
        ids += (step.ids * others if step.sums else step.away) * step.wire.id_bytes
        vectors += sent * step.table.dim * out_bytes
        gradients += sent * step.table.dim * step.wire.gradient_bytes
    at_owner = tuple(step.table.name for step in micro_steps if step.sums)
    dense = 2 * others * workload.reduced_bytes
    ids, vectors, gradients = (sent * workload.accumulate_steps for sent in (ids, vectors, gradients))
    return Exchange(round(ids), round(vectors), round(gradients), round(dense), at_owner)


def checkpoint_bytes(workload: Workload) -> int:
    """Returns the size of one full checkpoint over all ranks."""
    return workload.dense_bytes + sum(
        table.num_rows * (table.weight_bytes + table.state_bytes) for table in workload.tables
    )


def traffic_bytes(workload: Workload, world_size: int) -> int:
    """Returns the mean minimum of bytes that a rank reads and writes for its rows per step.

    Weights and optimizer state of each distinct row are read once and written once.
    """
    return round(
        sum(
            2 * step.owned * (step.table.weight_bytes + step.table.state_bytes) for step in _steps(workload, world_size)
        )
    )


def least_seconds(workload: Workload, world_size: int, bandwidths: Bandwidths) -> dict[str, float]:
    """Returns lower bounds, in seconds, of the sequential parts of a step.

    "rows" is reading and writing rows, "exchange" is sending to other ranks. Parts with an unknown bandwidth and all
    other work of a step are left out.
    """
    parts = {
        "rows": (traffic_bytes(workload, world_size), bandwidths.memory),
        "exchange": (exchange_of(workload, world_size).total, bandwidths.exchange),
    }
    return {name: size / bandwidth for name, (size, bandwidth) in parts.items() if bandwidth is not None}


@dataclass(frozen=True)
class Remedy:
    """A change that makes a plan fit into memory.

    Attributes:
        change: description of the change.
        total_bytes: bytes per rank after the change.
    """

    change: str
    total_bytes: int


def remedies(workload: Workload, world_size: int, memory_bytes: int) -> list[Remedy]:
    """Returns the single changes, if any, that make the workload fit into each rank's memory."""
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


def _micro_steps(workload: Workload, world_size: int) -> list[_Step]:
    return [_step_of(table.of_part(workload.accumulate_steps), world_size) for table in workload.tables]


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
        # Expected number of ranks that own rows of a bag.
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
    """Returns the smallest number in [low, high] that is enough, or None; larger numbers must be enough too."""
    if low > high or not is_enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low
