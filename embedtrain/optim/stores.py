"""The interface between optimizers and tables, and the base class that makes them `torch.optim` optimizers."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from embedtrain.distributed.ranks import Ranks
from embedtrain.ops.row_gradient import RowGradient

STEP = "step"
"""Key of the step count in parameter groups and state dicts."""
_RESERVED = (STEP, "weight")


@dataclass(frozen=True)
class RowState:
    """Declares a float32 state tensor of an optimizer, which lies beside the rows and is saved with them.

    Attributes:
        name: its name; a checkpoint calls it "item/accumulator" for the table "item" and the name "accumulator".
        per_element: whether it holds one number per element, [num_rows, dim], or one per row, [num_rows].
        fill: its initial value.
    """

    name: str
    per_element: bool = False
    fill: float = 0.0

    def __post_init__(self) -> None:
        if self.name in _RESERVED:
            raise ValueError(f"a state cannot be called {self.name!r}: checkpoints use this name for something else")


class RowsToUpdate(Protocol):
    """Holds rows and their states, or copies of the rows that a step touched."""

    weight: Tensor
    state: dict[str, Tensor]

    def rounding_keys(self, gradient: RowGradient, step: int) -> Tensor | None:
        """Returns a key per row of the gradient for stochastic rounding, [n] int64; None for float32 rows."""


class RowStore(RowsToUpdate, Protocol):
    """The optimizer's view of a table group: rows, their states and the gradients that backward delivered."""

    ranks: Ranks
    device: torch.device

    @property
    def table_names(self) -> list[str]:
        """Names of the tables, in order."""

    @property
    def optimizer(self) -> object | None:
        """The optimizer that trains the tables; None if there is none or it was deleted."""

    def take(self, optimizer: object, settings: dict[str, Any]) -> None:
        """Sets the optimizer that trains the tables, and its parameter group, whose `step` is saved with the rows."""

    def forget_state(self) -> None:
        """Drops the states that an earlier optimizer allocated."""

    def allocate_state(self, name: str, fill: float, per_element: bool) -> Tensor:
        """Allocates and returns a float32 state tensor, with one number per row or per element."""

    def fill_state(self, name: str, value: float) -> None:
        """Sets a state of all rows to a value."""

    def waiting_gradient(self, *, is_padded: bool) -> RowGradient:
        """Returns the gradient of the rows that were touched since the last step.

        Args:
            is_padded: whether row numbers outside the table may follow them; see `RowGradient.padded`.
        """

    def open_rows(self, gradient: RowGradient) -> tuple[RowsToUpdate, RowGradient]:
        """Prepares the gradient's rows for an update.

        Returns:
            The rows, and the gradient with its row numbers replaced by positions in them.
        """

    def close_rows(self) -> None:
        """Ends the update that `open_rows` began."""

    def clear_gradient(self) -> None:
        """Discards the gradients since the last step."""

    def tables_of(self, rows: Tensor) -> Tensor:
        """Returns the index into `table_names` of each local row's table, [n] int64."""

    def describe(self, row: int) -> str:
        """Returns the table and the id of a local row, for a message."""


class HasTableGroups(Protocol):
    """A collection of tables, or a part of it that consists of whole table groups."""

    @property
    def table_groups(self) -> Sequence[RowStore]:
        """The table groups, in the same order on every rank."""


class StoreOptimizer(torch.optim.Optimizer):
    """A `torch.optim` optimizer that has one parameter group per table group.

    A parameter group lists the table names in `tables`. Its `params` is empty, because rows are not torch parameters.
    The state of the rows lies beside the rows and is saved with them.

    Args:
        collection: the tables.
        defaults: hyperparameters.
        states: the state tensors that the formula needs.

    Attributes:
        states: the state tensors that the formula needs.
        stores: the table groups.
        takes_over: whether this optimizer replaces another optimizer of the tables and keeps its state.

    Raises:
        TypeError: `collection` is not a collection of tables.
        ValueError: a table already has an optimizer, and `takes_over` is False.
    """

    takes_over = False

    def __init__(self, collection: HasTableGroups, defaults: dict[str, Any], states: Sequence[RowState] = ()) -> None:
        _check_tables(type(self).__name__, collection)
        self.states = tuple(states)
        self.stores = list(collection.table_groups)
        self._is_made = False
        super().__init__([{"params": [], STEP: 0, "tables": store.table_names} for store in self.stores], defaults)
        self._is_made = True
        if not self.takes_over:
            for store in self.stores:
                _check_free(store)
            for store in self.stores:
                store.forget_state()
                for state in self.states:
                    store.allocate_state(state.name, state.fill, state.per_element)
        self._take_stores()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises an error: the parameter groups are the table groups of the collection, and none can be added.

        Raises:
            ValueError: always, after construction.
        """
        if self._is_made:
            raise ValueError(
                f"{type(self).__name__} has one parameter group per table group, and no other can be added. Give dense "
                "parameters to an optimizer of torch.optim, and declare all tables when you construct the collection"
            )
        _without_compiler(torch.optim.Optimizer.add_param_group)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns the hyperparameters and step counts, as JSON; the collection saves the state of the rows."""
        return {**_without_compiler(torch.optim.Optimizer.state_dict)(self), "state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a result of `state_dict`.

        Raises:
            ValueError: the state dict belongs to other tables, or to an optimizer with other hyperparameters.
        """
        saved = state_dict["param_groups"]
        found, expected = ([group.get("tables") for group in groups] for groups in (saved, self.param_groups))
        if found != expected:
            raise ValueError(
                f"the state dict does not belong to this optimizer's tables: it has the groups {found}, not "
                f"{expected}. With torch.distributed.checkpoint, save and load this optimizer apart from others"
            )
        for settings, own in zip(saved, self.param_groups, strict=True):
            if settings.keys() - {"initial_lr"} != own.keys() - {"initial_lr"}:  # schedulers add this key
                raise ValueError(
                    f"the state dict does not belong to {type(self).__name__}: it has "
                    f"{sorted(settings.keys() - own.keys())} and lacks {sorted(own.keys() - settings.keys())}"
                )
        _without_compiler(torch.optim.Optimizer.load_state_dict)(self, {**state_dict, "state": {}})

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for a copy or pickle, without hooks and without the `step` that a scheduler has wrapped."""
        left_out = ("step", "_step_supports_amp_scaling")
        return {k: v for k, v in self.__dict__.items() if k not in left_out and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_stores()

    def _take_stores(self) -> None:
        # torch.distributed.checkpoint runs a step of an optimizer whose state is empty, to initialise it. This entry
        # prevents that.
        self.state["rows"] = {}  # type: ignore[index]
        for store, settings in zip(self.stores, self.param_groups, strict=True):
            store.take(self, settings)


def _without_compiler(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method of `torch.optim.Optimizer` without the wrapper that excludes it from compilation.

    The wrapper imports torch's compiler, which takes over two seconds, and these methods are never compiled.
    """
    plain: Callable[..., Any] = inspect.unwrap(method)
    return plain


def _check_tables(name: str, collection: object) -> None:
    if hasattr(collection, "table_groups"):
        return
    written, inner = type(collection).__name__, ""
    if isinstance(collection, nn.Module):
        found = [path for path, module in collection.named_modules() if hasattr(module, "table_groups")]
        inner = f": this {written} has {' and '.join(f'.{path}' for path in found)}" if found else ""
    elif inspect.isgenerator(collection) or isinstance(collection, Sequence | Mapping):
        written = "parameters"
    raise TypeError(
        f"expected an EmbeddingCollection or a result of its trained_by, got {written}{inner}. "
        f"Write et.optim.{name}(model.tables, ...), and give all other parameters to an optimizer of torch.optim"
    )


def _check_free(store: RowStore) -> None:
    if store.optimizer is not None:
        gc.collect()  # a deleted optimizer stays alive in a reference cycle with its scheduler
    if store.optimizer is not None:
        raise ValueError(
            f"the tables {', '.join(store.table_names)} already have an optimizer, {type(store.optimizer).__name__}: "
            "change its param_groups, or first delete it and all references to it, such as its scheduler"
        )
