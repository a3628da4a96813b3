"""Builds the sparse and dense optimizers from their sections of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from embedtrain import optim
from embedtrain.config.optimizer import DenseOptimizerConfig, OptimizerConfig
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.embedding.table_group import TableGroup, TableGroups
from embedtrain.errors import UserError
from embedtrain.optim.damping import has_row_rates
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.optim.stores import HasTableGroups
from embedtrain.spec import DEFAULT_OPTIMIZER, TableSpec


def optimizer_names(section: OptimizerConfig) -> dict[str, str]:
    """Returns the `TableSpec.optimizer` of each table in `optimizer.tables`; tables with equal options share a name."""
    labels: dict[str, str] = {repr(sorted(section.row_options().items())): DEFAULT_OPTIMIZER}
    names = {}
    for table in section.tables:
        own = repr(sorted(section.of_table(table).row_options().items()))
        names[table] = labels.setdefault(own, f"of {table}")
    return names


def build_optimizer(section: OptimizerConfig, tables: EmbeddingCollection) -> optim.SparseOptimizer:
    """Returns the optimizer of tables, whose specs must have the names of `optimizer_names`.

    Raises:
        UserError: a hyperparameter is out of range.
        ValueError: a table has another `TableSpec.optimizer`.
    """
    names = optimizer_names(section)
    for table, shard in tables.shards.items():
        if shard.spec.optimizer != (expected := names.get(table, DEFAULT_OPTIMIZER)):
            raise ValueError(
                f"table {table!r}: expected TableSpec.optimizer={expected!r}, got {shard.spec.optimizer!r}; make the "
                "tables of a recipe with table_spec"
            )
    together: dict[str, Any] = {"max_grad_norm": section.max_grad_norm, "nonfinite": section.nonfinite}
    trained = {shard.spec.optimizer for shard in tables.shards.values()}
    if trained == {DEFAULT_OPTIMIZER}:
        return _make(section, tables, "optimizer", together)
    sections = {DEFAULT_OPTIMIZER: ("optimizer", section)}
    for table, name in names.items():
        sections.setdefault(name, (f"optimizer.tables.{table}", section.of_table(table)))
    parts = [
        _make(own, tables.trained_by(name), where, {}) for name, (where, own) in sections.items() if name in trained
    ]
    try:
        return optim.Combined(*parts, **together)
    except ValueError as error:
        raise UserError(f"optimizer: {error}") from error


def states_of_row(section: OptimizerConfig, dtype: torch.dtype) -> list[Tensor]:
    """Returns the state that an optimizer allocates for a table of one row and one column. Not a collective.

    Raises:
        UserError: a hyperparameter is out of range.
    """
    return list(_probe(section, dtype, "optimizer", {}).state.values())


def check_optimizers(section: OptimizerConfig) -> None:
    """Checks the hyperparameters of a section by creating its optimizers for a table of one row.

    Raises:
        UserError: a hyperparameter is out of range; the message names its key.
    """
    together = {"max_grad_norm": section.max_grad_norm, "nonfinite": section.nonfinite}
    _probe(section, torch.float32, "optimizer", together)
    for table in section.tables:
        _probe(section.of_table(table), torch.float32, f"optimizer.tables.{table}", {})


def cannot_damp(section: OptimizerConfig) -> str | None:
    """Returns the setting of the first optimizer that does not support `CurvatureDamping`; None if all do."""
    sections = {"optimizer": section, **{f"optimizer.tables.{t}": section.of_table(t) for t in section.tables}}
    for where, own in sections.items():
        if not has_row_rates(_make(own, TableGroups([_probe_group(torch.float32)]), where, {})):
            return f"{where}.name={own.name}"
    return None


def _probe(section: OptimizerConfig, dtype: torch.dtype, where: str, together: Mapping[str, Any]) -> TableGroup:
    group = _probe_group(dtype)
    _make(section, TableGroups([group]), where, together)
    return group


def _probe_group(dtype: torch.dtype) -> TableGroup:
    return TableGroup([TableSpec("probe", 1, 1, dtype=dtype)], seed=0, device=torch.device("cpu"), ranks=ONE_PROCESS)


def _make(
    section: OptimizerConfig, tables: HasTableGroups, where: str, together: Mapping[str, Any]
) -> optim.SparseOptimizer:
    options = section.row_options()
    kind = optim.OPTIMIZERS[options.pop("name")]
    try:
        return kind(tables, **options, **together)
    except ValueError as error:
        # A message that begins with the name of an option becomes one that begins with the full key.
        is_of_option = str(error).partition(" ")[0] in {**options, **together}
        raise UserError(f"{where}{'.' if is_of_option else ': '}{error}") from error


def build_dense_optimizer(
    section: DenseOptimizerConfig, module: nn.Module, tables: EmbeddingCollection
) -> DenseOptimizer:
    """Returns the optimizer of a model's dense part, which averages gradients over the ranks of the tables.

    Collective: every rank.

    Raises:
        UserError: a hyperparameter is out of range.
    """
    try:
        return DenseOptimizer(module, ranks=tables.ranks, **vars(section))
    except ValueError as error:
        raise UserError(f"dense_optimizer: {error}") from error
