"""The sections of the optimizers: `optimizer.name` chooses one and thereby the available options.

A section's options are the keyword arguments of the optimizer's class, with their types and default values: to add an
optimizer is to write its class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from embedtrain import optim
from embedtrain.errors import UserError
from embedtrain.optim.dense import DenseOptions
from embedtrain.optim.optimizer import OF_A_STEP


@dataclass
class _Chosen:
    """The first keys of a section: name and learning rate of the optimizer."""

    name: str = "???"
    """Name of the optimizer."""
    lr: float = 0.01
    """Base of the learning rate; the default depends on the optimizer."""


@dataclass
class OptimizerConfig(optim.CommonOptions, _Chosen):
    """Options of all optimizers of tables; `section` makes the section of a particular optimizer."""

    reset_state_from_step: int | None = None
    """Reset the optimizer state at this step, also in a resumed run."""
    tables: dict[str, Any] = field(default_factory=dict)
    """Optimizers of single tables, by table name: the `name` and options of an optimizer. Without a `name`, the table
    uses this optimizer with other options."""
    # After loading, each entry has a name and all options.

    def of_table(self, table: str) -> OptimizerConfig:
        """Returns the optimizer of a table, without the options for all tables together."""
        if table in self.tables:
            return section(**self.tables[table])
        return type(self)(**self.row_options())

    def row_options(self) -> dict[str, Any]:
        """Returns the name and the options that may differ per table."""
        return {name: value for name, value in vars(self).items() if name not in FOR_ALL_TABLES}

    def check(self, table_names: Sequence[str]) -> None:
        """Checks ranges that types do not express, and the names of tables.

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


FOR_ALL_TABLES = (*OF_A_STEP, "reset_state_from_step", "tables")
"""Options that apply to all tables together."""

FOR_ALL_OPTIMIZERS = tuple(
    field.name for field in fields(OptimizerConfig) if field.name not in ("name", "lr", "tables")
)
"""Options with the same meaning for every formula, unlike the learning rate."""


class _Sections(Mapping[str, type[OptimizerConfig]]):
    def __getitem__(self, name: str) -> type[OptimizerConfig]:
        return _section_of(name)

    def __contains__(self, name: object) -> bool:
        return name in optim.OPTIMIZERS

    def __iter__(self) -> Iterator[str]:
        return iter(optim.OPTIMIZERS)

    def __len__(self) -> int:
        return len(optim.OPTIMIZERS)


OPTIMIZERS: Mapping[str, type[OptimizerConfig]] = _Sections()
"""The sections of the optimizers by `optimizer.name`."""


def section(name: str, **options: Any) -> OptimizerConfig:
    """Returns the section of an optimizer; other options have the default values of its class."""
    return OPTIMIZERS[name](**options)


@functools.cache
def _section_of(name: str) -> type[OptimizerConfig]:
    """Makes the section of an optimizer from its class.

    Raises:
        UserError: the class lacks the common options or a learning rate, or its arguments cannot be settings.
    """
    kind = optim.OPTIMIZERS[name]
    try:
        return _make_section(name, kind)
    except UserError:
        raise
    except Exception as error:  # A user's class may have arguments, annotations and defaults of any kind.
        raise UserError(
            f"the optimizer {name}: the arguments of {kind.__name__} cannot be settings: "
            f"{type(error).__name__}: {error}"
        ) from error


def _make_section(name: str, kind: type[optim.SparseOptimizer]) -> type[OptimizerConfig]:
    _, _, *parameters = inspect.signature(kind.__init__).parameters.values()
    own = [each for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if not any(each.kind is each.VAR_KEYWORD for each in parameters) or "lr" not in [each.name for each in own]:
        raise UserError(f"the optimizer {name}: {kind.__name__} must take lr, and **options for its base class")
    hints = _hints_of(kind)
    return make_dataclass(
        f"{kind.__name__}Config",
        [("name", str, name), *(_field_of(each, hints) for each in own)],
        bases=(OptimizerConfig,),
        namespace={
            "__doc__": f"See `{kind.__module__}.{kind.__name__}`.",
            "kind": kind,
            "__reduce__": _reduce,  # `pickle` cannot find the class in a module.
        },
    )


def _field_of(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> tuple[str, Any, Any]:
    default = "???" if parameter.default is parameter.empty else parameter.default
    hint = hints.get(parameter.name, Any if default in ("???", None) else type(default))
    if get_origin(hint) is not tuple:
        return parameter.name, hint, default
    # YAML has lists but no tuples, and an override replaces a whole list.
    element = next(iter(get_args(hint)), Any)
    return parameter.name, list[element], field(default_factory=lambda: list(default))  # type: ignore[valid-type]


def _hints_of(kind: type[optim.SparseOptimizer]) -> Mapping[str, Any]:
    try:
        return get_type_hints(kind.__init__)
    except NameError:  # The annotation is importable only for type checkers; the types of the default values suffice.
        return {}


def _reduce(self: OptimizerConfig) -> tuple[Any, ...]:
    return functools.partial(section, **vars(self)), ()


@dataclass
class DenseOptimizerConfig(DenseOptions):
    """The torch optimizer of the dense parameters."""

    def check(self) -> None:
        """Checks ranges that types do not express.

        Raises:
            UserError: a value is out of range.
        """
        for name in ("lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"dense_optimizer.{name} must be at least 0, got {getattr(self, name)}")
