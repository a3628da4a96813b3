"""Describes what a run needs of its machines: tables, the look-ups of a step, the dense part and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from embedtrain.config.optimizer import DenseOptimizerConfig
from embedtrain.config.sections import Config
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import UserError
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.recipes.optimizers import states_of_row
from embedtrain.sharding.layout import MAX_ROWS

_EXACT_RANKS = 1000
_BLOCK_RATIO = 1.02


@dataclass(frozen=True)
class IdDistribution:
    """Holds the probability with which each row of a table is looked up. Equally likely rows form a block.

    Attributes:
        shares: [num_blocks]; probability of each single row of a block.
        num_rows: [num_blocks]; number of rows in each block.
    """

    shares: NDArray[np.float64]
    num_rows: NDArray[np.float64]

    @classmethod
    def of_weights(cls, weights: NDArray[np.float64], num_rows: NDArray[np.float64]) -> IdDistribution:
        """Returns the distribution whose probabilities are proportional to `weights`."""
        return cls(weights / np.dot(weights, num_rows), num_rows)

    @classmethod
    def zipf(cls, num_rows: int, exponent: float) -> IdDistribution:
        """Returns Zipf's law: row r, counted from 1, has the weight `r ** -exponent`; exponent 0 is uniform.

        The first 1,000 rows are exact. Later rows are grouped in blocks, so that ten billion rows need only a few
        hundred blocks.
        """
        first = np.arange(1, min(num_rows, _EXACT_RANKS) + 1, dtype=np.float64)
        if num_rows <= _EXACT_RANKS:
            return cls.of_weights(first**-exponent, np.ones_like(first))
        num_blocks = math.ceil(math.log(num_rows / _EXACT_RANKS, _BLOCK_RATIO))
        edges = np.geomspace(_EXACT_RANKS + 0.5, num_rows + 0.5, num_blocks + 1)
        middles = np.sqrt(edges[1:] * edges[:-1])
        ranks, sizes = np.concatenate([first, middles]), np.concatenate([np.ones_like(first), np.diff(edges)])
        return cls.of_weights(ranks**-exponent, sizes)

    def thinned(self, keep: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> tuple[IdDistribution, float]:
        """Returns the distribution after random draws are dropped, and the share of draws that is kept.

        Args:
            keep: returns the probability that a draw of a row is kept, given the row's share of all draws.
        """
        kept = self.shares * keep(self.shares)
        return IdDistribution.of_weights(kept, self.num_rows), float(np.dot(kept, self.num_rows))


Draws = tuple[float, IdDistribution]
"""The number of ids that a step draws over all ranks, and their distribution."""


@dataclass(frozen=True)
class TableLoad:
    """Describes a table and the ids that a step looks up in it, over all ranks.

    Attributes:
        name: name of the table.
        num_rows: number of rows.
        dim: length of the vectors.
        value_bytes: size of one stored value.
        state_row_bytes: size of the optimizer state per row.
        state_value_bytes: size of the optimizer state per value of a row.
        draws: ids of a step.
        wire_bytes: size of one value of a vector or gradient that is sent between ranks; None for `value_bytes` per
            value of a vector and 4 bytes per value of a gradient.
        num_bags: number of bags in a step; None if each id gives a vector.
        home_draws: ids that a rank draws from one of `home_parts` equal parts of the table. If the number of ranks
            divides the number of parts, the rank owns its part.
        home_parts: number of these parts.
        is_scored_whole: whether each rank scores all its rows in a step, and so updates all of them.
    """

    name: str
    num_rows: int
    dim: int
    value_bytes: int
    state_row_bytes: int
    state_value_bytes: int
    draws: tuple[Draws, ...]
    wire_bytes: int | None = None
    num_bags: float | None = None
    home_draws: tuple[Draws, ...] = ()
    home_parts: int = 1
    is_scored_whole: bool = False

    @property
    def weight_bytes(self) -> int:
        """Size of the weights of one row."""
        return self.dim * self.value_bytes

    @property
    def state_bytes(self) -> int:
        """Size of the optimizer state of one row."""
        return self.state_row_bytes + self.dim * self.state_value_bytes

    @property
    def num_ids(self) -> float:
        """Number of ids in a step over all ranks."""
        return sum(number for number, _ in (*self.draws, *self.home_draws))

    @property
    def num_distinct(self) -> float:
        """Expected number of distinct rows that a step touches over all ranks."""
        return float(self.num_rows) if self.is_scored_whole else self._expected(1.0, 1.0)

    def distinct_of_rank(self, world_size: int) -> tuple[float, float]:
        """Returns the expected number of distinct rows that a rank looks up in a step, and that other ranks own."""
        parts = min(world_size, self.home_parts)
        home = self._expected(1 / world_size, parts / world_size) / parts
        others = self._expected(1 / world_size, 0.0) * (1 - 1 / parts)
        return home + others, others + home * (1 - parts / world_size)

    def of_part(self, num_parts: int) -> TableLoad:
        """Returns the load of one of `num_parts` micro-batches."""
        return replace(
            self,
            draws=tuple((number / num_parts, ids) for number, ids in self.draws),
            home_draws=tuple((number / num_parts, ids) for number, ids in self.home_draws),
            num_bags=None if self.num_bags is None else self.num_bags / num_parts,
        )

    def _expected(self, share: float, home_share: float) -> float:
        """Returns the expected number of distinct rows in these shares of a step's draws and home draws."""
        draws = [(number * share, ids) for number, ids in self.draws]
        draws += [(number * home_share, ids) for number, ids in self.home_draws]
        if not draws:
            return 0.0
        intensity = sum(number * ids.shares for number, ids in draws)
        return float(np.dot(-np.expm1(-intensity), draws[0][1].num_rows))


@dataclass(frozen=True)
class Workload:
    """Describes what a run needs of its machines.

    Attributes:
        tables: the sharded tables.
        dense_bytes: size of the parameters and optimizer state that are replicated on every rank.
        reduced_bytes: size of the tensors that all ranks sum in a step, such as the gradients of the dense part.
        batch_bytes: size of the batch of a step, over all ranks.
        save_bytes: maximum memory of a background save on a rank; None for no limit.
        num_checkpoints: maximum number of checkpoints in the run folder, including one that is being written.
        accumulate_steps: number of micro-batches per step. `tables` holds the look-ups of all of them together;
            `reduced_bytes` are sent once per step.
    """

    tables: tuple[TableLoad, ...]
    dense_bytes: int = 0
    reduced_bytes: int = 0
    batch_bytes: int = 0
    save_bytes: int | None = 0
    num_checkpoints: int = 1
    accumulate_steps: int = 1


class UnknownRowsError(UserError):
    """Raised if the number of rows of a table depends on data that were not read."""

    def __init__(self, table: str) -> None:
        super().__init__(f"the rows of table {table!r} come from the data")
        self.table = table


class UnknownBagLengthError(UserError):
    """Raised if the mean number of ids per bag depends on data that were not read."""

    def __init__(self, table: str) -> None:
        super().__init__(f"the number of ids in a bag of {table!r} comes from the data")
        self.table = table


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of tables that depend on the data: measured, taken from a run, or assumed.

    Attributes:
        num_rows: number of rows by table, if known.
        bag_lengths: mean number of ids per bag by table, if known.
        default_num_rows: number of rows of all other tables; None if unknown.
        default_bag_length: mean number of ids per bag of all other tables; None if unknown.
        rows_of_run: number of rows by table in a checkpoint; used for tables without `num_rows` if there is no
            `default_num_rows`.
        exponent: exponent of Zipf's law, which the ids follow; 0 is uniform.
    """

    num_rows: Mapping[str, int] = field(default_factory=dict)
    bag_lengths: Mapping[str, float] = field(default_factory=dict)
    default_num_rows: int | None = None
    default_bag_length: float | None = None
    rows_of_run: Mapping[str, int] = field(default_factory=dict)
    exponent: float = 1.0

    def rows_of(self, table: str) -> int:
        """Returns the number of rows of a table.

        Raises:
            UnknownRowsError: the number is unknown.
            UserError: the number is too large.
        """
        if table in self.num_rows:
            return _at_most_all(self.num_rows[table], table)
        if self.default_num_rows is not None:
            return _at_most_all(self.default_num_rows, table)
        if table not in self.rows_of_run:
            raise UnknownRowsError(table)
        return self.rows_of_run[table]

    def ids_of(self, table: str) -> IdDistribution:
        """Returns the distribution of the ids that are looked up in a table.

        Raises:
            UnknownRowsError: the number of rows is unknown.
        """
        return IdDistribution.zipf(self.rows_of(table), self.exponent)

    def bag_length_of(self, table: str) -> float:
        """Returns the mean number of ids per bag of a table.

        Raises:
            UnknownBagLengthError: the number is unknown.
        """
        if table in self.bag_lengths:
            return self.bag_lengths[table]
        if self.default_bag_length is None:
            raise UnknownBagLengthError(table)
        return self.default_bag_length

    def require_known(self, tables: Sequence[str]) -> None:
        """Refuses row counts for tables that the model does not have.

        Raises:
            UserError: `num_rows` has such a table.
        """
        unknown = sorted(self.num_rows.keys() - set(tables))
        if unknown:
            raise UserError(f"there is no table {', '.join(unknown)}; the tables are {', '.join(tables)}")


def _at_most_all(num_rows: int, table: str) -> int:
    if num_rows > MAX_ROWS:
        raise UserError(f"expected at most {MAX_ROWS:,} rows in table {table!r}, got {num_rows:,}")
    return num_rows


def table_load(
    config: Config,
    name: str,
    num_rows: int,
    draws: tuple[Draws, ...],
    *,
    dim: int | None = None,
    num_bags: float | None = None,
) -> TableLoad:
    """Returns the load of a table with the dtypes and the optimizer of a configuration.

    Args:
        config: configuration of the run.
        name: name of the table.
        num_rows: number of rows.
        draws: ids of a step.
        dim: length of the vectors; None for `table.dim`.
        num_bags: number of bags in a step; None if each id gives a vector.
    """
    dtype = getattr(torch, config.table.dtype)
    state = states_of_row(config.optimizer.of_table(name), dtype)
    return TableLoad(
        name,
        num_rows,
        config.table.dim if dim is None else dim,
        dtype.itemsize,
        state_row_bytes=sum(tensor.itemsize for tensor in state if tensor.dim() == 1),
        state_value_bytes=sum(tensor.itemsize for tensor in state if tensor.dim() == 2),
        draws=draws,
        wire_bytes=None if config.table.wire_dtype is None else getattr(torch, config.table.wire_dtype).itemsize,
        num_bags=num_bags,
    )


def dense_sizes(modules: list[nn.Module], section: DenseOptimizerConfig) -> tuple[int, int]:
    """Returns the bytes of the modules' parameters and optimizer state, and the bytes of their gradients.

    The modules may be on the device "meta", where parameters take no memory.
    """
    num_values = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return 4 * num_values * (1 + _states_of_value(section.name)), 4 * num_values


def _states_of_value(name: str) -> int:
    """Returns the number of state values per parameter value of a dense optimizer, found by a trial step."""
    probe = nn.Linear(1, 1, bias=False)
    optimizer = DenseOptimizer(probe, name=name, ranks=ONE_PROCESS)
    probe.weight.grad = torch.ones_like(probe.weight)
    optimizer.step(1.0)
    # Counts only tensors shaped like the parameter, because step counts are scalars; 1 is the parameter itself.
    return sum(tensor.dim() == 2 for tensor in optimizer.tensors().values()) - 1
