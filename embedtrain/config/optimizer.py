"""The optimizers' sections: `optimizer.name` chooses one, and with it the options that there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from embedtrain.errors import UserError


@dataclass
class OptimizerConfig:
    """What every optimizer of the tables takes; see `embedtrain.optim.SparseOptimizer`."""

    name: str = "???"
    lr: float = 0.01
    weight_decay: float = 0.0
    """L2 factor, of the rows that a step touches."""
    decoupled_weight_decay: bool = False
    """Take the decay from the row itself, not through the gradient."""
    maximize: bool = False
    max_row_grad_norm: float | None = None
    """Scale the gradient of each row down to this norm."""
    max_norm: float | None = None
    """Scale each row down to this norm after a step."""
    max_grad_norm: float | None = None
    """Scale the gradients of all tables and ranks down to this norm together."""
    nonfinite: Literal["error", "skip"] = "error"
    reset_state_from_step: int | None = None
    """Start the optimizer's state anew at this step, in a run under way too."""
    tables: dict[str, Any] = field(default_factory=dict)
    """What trains single tables, by their names: the `name` and options of an optimizer; where no name is given, this
    one with other options. A configuration that was loaded has the name and all options of each."""

    def of_table(self, table: str) -> OptimizerConfig:
        """Returns what trains a table, without what is for all tables together."""
        if table in self.tables:
            options = dict(self.tables[table])
            return OPTIMIZERS[options["name"]](**options)
        return type(self)(**self.row_options())

    def row_options(self) -> dict[str, Any]:
        """Returns the name and the options that may differ from table to table."""
        return {name: value for name, value in vars(self).items() if name not in FOR_ALL_TABLES}

    def check(self, table_names: Sequence[str]) -> None:
        """Checks the ranges that types cannot say, and the names of tables.

        Raises:
            UserError: a value is out of range, or there is no such table.
        """
        if unknown := [name for name in self.tables if name not in table_names]:
            raise UserError(
                f"optimizer.tables: there is no table {', '.join(unknown)}; the tables are {', '.join(table_names)}"
            )
        rates = {"optimizer.lr": self.lr, **{f"optimizer.tables.{n}.lr": own["lr"] for n, own in self.tables.items()}}
        for key, rate in rates.items():
            if not rate > 0:
                raise UserError(f"{key} must be positive, got {rate}")
        if self.reset_state_from_step is not None and self.reset_state_from_step < 0:
            raise UserError(f"optimizer.reset_state_from_step must be at least 0, got {self.reset_state_from_step}")


@dataclass
class RowwiseAdagradConfig(OptimizerConfig):
    """See `embedtrain.optim.RowwiseAdagrad`."""

    name: str = "rowwise_adagrad"
    lr: float = 0.6
    eps: float = 1e-10
    initial_accumulator_value: float = 100.0
    lr_decay: float = 0.0
    accumulator_decay: float | None = None
    """Make the accumulator an average that forgets; null sums."""


@dataclass
class AdagradConfig(OptimizerConfig):
    """See `embedtrain.optim.Adagrad`."""

    name: str = "adagrad"
    eps: float = 1e-10
    initial_accumulator_value: float = 0.0
    lr_decay: float = 0.0


@dataclass
class SGDConfig(OptimizerConfig):
    """See `embedtrain.optim.SGD`."""

    name: str = "sgd"


@dataclass
class AdamConfig(OptimizerConfig):
    """See `embedtrain.optim.Adam`."""

    name: str = "adam"
    lr: float = 0.001
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8


@dataclass
class RowwiseAdamConfig(AdamConfig):
    """See `embedtrain.optim.RowwiseAdam`."""

    name: str = "rowwise_adam"


@dataclass
class RMSpropConfig(OptimizerConfig):
    """See `embedtrain.optim.RMSprop`."""

    name: str = "rmsprop"
    alpha: float = 0.99
    eps: float = 1e-8


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "rowwise_adagrad": RowwiseAdagradConfig,
    "adagrad": AdagradConfig,
    "sgd": SGDConfig,
    "adam": AdamConfig,
    "rowwise_adam": RowwiseAdamConfig,
    "rmsprop": RMSpropConfig,
}
"""The section of each optimizer by its name, the value of `optimizer.name`."""

FOR_ALL_TABLES = ("max_grad_norm", "nonfinite", "reset_state_from_step", "tables")
"""Options of a step, which all tables take together or not at all."""

FOR_ALL_OPTIMIZERS = tuple(
    field.name for field in fields(OptimizerConfig) if field.name not in ("name", "lr", "tables")
)
"""Options that mean the same whichever the formula; a learning rate does not."""


@dataclass
class DenseOptimizerConfig:
    """torch's optimizer of the parameters that are not rows of tables."""

    name: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    lr: float = 1e-3
    """Falls with the same schedule as the tables'."""
    weight_decay: float = 0.0
