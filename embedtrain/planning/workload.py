"""From a configuration to what the plan computes with: tables, and what a step asks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from embedtrain.build.optimizers import build_optimizer
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.config import Config, Word2VecConfig
from embedtrain.config.optimizer import OptimizerConfig
from embedtrain.config.sections import CheckpointConfig, TableConfig
from embedtrain.data.skipgram import keep_shares
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.errors import UserError
from embedtrain.models.word2vec import INPUT, OUTPUT
from embedtrain.sharding.plan import Law, TableLoad, Workload
from embedtrain.spec import TableSpec
from embedtrain.train.run_folder import RunFolder


@dataclass(frozen=True)
class RowCounts:
    """How many rows tables have, where the configuration leaves that to the data.

    Attributes:
        of_table: as the user says.
        of_others: of every other table, as the user says; None where they do not.
        run_path: a run's folder, whose newest checkpoint knows its tables.
    """

    of_table: Mapping[str, int] = field(default_factory=dict)
    of_others: int | None = None
    run_path: str | None = None

    def of(self, table: str) -> int:
        """Returns the rows of a table.

        Raises:
            UserError: nobody knows.
        """
        if table in self.of_table:
            return self.of_table[table]
        if self.of_others is not None:
            return self.of_others
        rows = self._of_run()
        if table not in rows:
            raise UserError(
                f"the rows of table {table!r} come from the data: give --rows {table}=N (or --rows N for all tables), "
                f"or a run.path with a checkpoint of this model ({self.run_path!r} has none with this table)"
            )
        return rows[table]

    def require_known(self, tables: list[str]) -> None:
        """Refuses rows of tables that the model does not have.

        Raises:
            UserError: there are such.
        """
        unknown = sorted(self.of_table.keys() - set(tables))
        if unknown:
            raise UserError(f"--rows names {', '.join(unknown)}; the tables are {', '.join(tables)}")

    def _of_run(self) -> dict[str, int]:
        path = None if self.run_path is None else latest_checkpoint(RunFolder(self.run_path).checkpoints_path)
        if path is None:
            return {}
        with CheckpointReader(path) as reader:
            return {
                name.removesuffix("/weight"): info.shape[0]
                for name, info in reader.tensors.items()
                if name.endswith("/weight")
            }


def workload_of(config: Config, rows: RowCounts, exponent: float) -> Workload:
    """Returns what a configuration asks of its machines.

    Args:
        config: the run's.
        rows: of its tables.
        exponent: ids are taken to be drawn by Zipf's law with it; 0 is uniform.

    Raises:
        UserError: the rows of a table are not known, or those of another are given.
    """
    for kind, of_kind in _WORKLOADS.items():
        if isinstance(config, kind):
            return of_kind(config, rows, exponent)
    raise UserError(f"plan does not know model {config.model!r} yet")


def _word2vec(config: Any, rows: RowCounts, exponent: float) -> Workload:
    assert isinstance(config, Word2VecConfig)
    rows.require_known([INPUT, OUTPUT])
    settings = config.word2vec
    words = float(config.train.words_per_step)
    num_rows = rows.of(INPUT)
    text = Law.zipf(num_rows, exponent)
    law, kept = text.thinned(lambda shares: keep_shares(shares, settings.sample))
    negatives = Law.of_weights(text.shares**settings.power, text.num_rows)
    words_kept = words * kept
    drawn = words_kept * settings.negatives
    sizes = _table_sizes(config.table, config.optimizer)
    if rows.of(OUTPUT) != num_rows:
        raise UserError("both tables of word2vec have a row a word: give the same --rows for both, or --rows N")
    contexts = min(settings.window + 1, config.train.block_words)
    predictions = words_kept * (contexts if settings.architecture == "skipgram" else 1)
    return Workload(
        tables=(
            TableLoad(INPUT, num_rows, draws=((words_kept, law),), **sizes),
            TableLoad(OUTPUT, num_rows, draws=((words_kept, law), (drawn, negatives)), **sizes),
        ),
        num_features=2,
        draws=words + drawn,
        # Each prediction meets the positive and the negatives: the score, and the gradients of both sides.
        skipgram_products=predictions * (1 + settings.negatives) * config.table.dim * 3,
        **_checkpoints(config.checkpoint),
    )


_WORKLOADS: dict[type[Config], Callable[[Any, RowCounts, float], Workload]] = {Word2VecConfig: _word2vec}
"""What each model asks, by its configuration."""


def _table_sizes(table: TableConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """Returns the sizes that all tables share, the optimizer's state among them."""
    dtype = getattr(torch, table.dtype)
    wire_bytes = None if table.wire_dtype is None else getattr(torch, table.wire_dtype).itemsize
    # The optimizer itself says what it keeps: of a table of one row.
    probe = EmbeddingCollection([TableSpec("probe", 1, table.dim, dtype=dtype)])
    build_optimizer(optimizer, probe)
    state = probe.row_groups[0].state.values()
    return {
        "dim": table.dim,
        "value_bytes": dtype.itemsize,
        "state_row_bytes": sum(tensor.itemsize for tensor in state if tensor.dim() == 1),
        "state_value_bytes": sum(tensor.itemsize for tensor in state if tensor.dim() == 2),
        "wire_bytes": wire_bytes,
    }


def _checkpoints(section: CheckpointConfig) -> dict[str, Any]:
    return {
        "save_bytes": section.max_extra_memory_bytes if section.mode == "async" else 0,
        "num_checkpoints": 1 + (section.keep_last or 1) + (section.keep_best or 0),
    }
