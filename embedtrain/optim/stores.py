"""What an optimizer knows of tables, and what makes it one of torch's: parameter groups, state dicts, copies."""

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
"""The key of a parameter group, and the name in state dicts, of the number of steps done."""
_RESERVED = (STEP, "weight")


@dataclass(frozen=True)
class RowState:
    """A tensor of optimizer state, float32, that lies beside the rows and is saved with them.

    Attributes:
        name: in a checkpoint: "item/accumulator" for the table "item".
        per_element: whether it has one number per element, [num_rows, dim], or one per row, [num_rows].
        fill: its first value.
    """

    name: str
    per_element: bool = False
    fill: float = 0.0

    def __post_init__(self) -> None:
        if self.name in _RESERVED:
            raise ValueError(f"a state cannot be called {self.name!r}: checkpoints have something else of this name")


class RowsToUpdate(Protocol):
    """Rows and their state, or copies of the rows that a step touched."""

    weight: Tensor
    state: dict[str, Tensor]

    def rounding_keys(self, gradient: RowGradient, step: int) -> Tensor | None:
        """Returns keys of the gradient's rows for stochastic rounding, or None for float32 rows."""


class RowStore(RowsToUpdate, Protocol):
    """Rows with their state and the gradients that wait for them: an optimizer's view of a group of tables."""

    ranks: Ranks
    device: torch.device

    @property
    def table_names(self) -> list[str]:
        """The tables, in order."""

    @property
    def optimizer(self) -> object | None:
        """The optimizer that takes the gradients; None if there is none or it was deleted."""

    def take(self, optimizer: object, settings: dict[str, Any]) -> None:
        """Notes which optimizer takes the gradients, and its parameter group, whose `step` is saved with the rows."""

    def forget_state(self) -> None:
        """Lets go of the state that an earlier optimizer left."""

    def allocate_state(self, name: str, fill: float, per_element: bool) -> Tensor:
        """Gives every row, or every element of it, one float32 of state."""

    def fill_state(self, name: str, value: float) -> None:
        """Sets a state of all rows."""

    def waiting_gradient(self, *, is_padded: bool) -> RowGradient:
        """Returns the gradient of the touched rows.

        Args:
            is_padded: whether rows outside the table may follow them; see `RowGradient.padded`.
        """

    def open_rows(self, gradient: RowGradient) -> tuple[RowsToUpdate, RowGradient]:
        """Returns what holds the gradient's rows for an update, and the gradient by their places in it."""

    def close_rows(self) -> None:
        """Ends the update."""

    def clear_gradient(self) -> None:
        """Forgets the gradients."""

    def tables_of(self, rows: Tensor) -> Tensor:
        """Returns [n] int64, the position among `table_names` of each local row's table."""

    def describe(self, row: int) -> str:
        """Names the table and the id of a row."""


class HasTableGroups(Protocol):
    """A collection of tables, or some of its groups."""

    @property
    def table_groups(self) -> Sequence[RowStore]:
        """The groups of tables, in the same order on every rank."""


class StoreOptimizer(torch.optim.Optimizer):
    """An optimizer of torch whose parameter groups are groups of tables.

    A parameter group's `tables` names them, and its `params` is empty: rows are no parameters of torch. The state of
    the rows lies beside the rows, which save it.

    Args:
        collection: the tables.
        defaults: hyperparameters.
        states: what the formula keeps for each row.

    Attributes:
        states: what the formula keeps for each row.
        stores: the groups of tables.
        takes_over: whether the tables may have an optimizer already, whose place this one takes, and its state.

    Raises:
        TypeError: `collection` is something else.
        ValueError: a table has an optimizer already.
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
        """Refuses: the parameter groups are the groups of tables of the collection.

        Raises:
            ValueError: always, once the optimizer is made.
        """
        if self._is_made:
            raise ValueError(
                f"{type(self).__name__} takes no further parameter group: it has one per group of tables. Give dense "
                "parameters to an optimizer of torch.optim, and declare further tables when the collection is made"
            )
        _without_compiler(torch.optim.Optimizer.add_param_group)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns hyperparameters and counts of steps, as JSON takes them; the rows' state is the collection's."""
        return {**_without_compiler(torch.optim.Optimizer.state_dict)(self), "state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            ValueError: it is of other tables, or of an optimizer with other hyperparameters.
        """
        saved = state_dict["param_groups"]
        found, expected = ([group.get("tables") for group in groups] for groups in (saved, self.param_groups))
        if found != expected:
            raise ValueError(
                f"the state dict is not of this optimizer's tables: it has the groups {found}, not {expected}. With "
                "torch.distributed.checkpoint, save and load this optimizer apart from others"
            )
        for settings, own in zip(saved, self.param_groups, strict=True):
            if settings.keys() - {"initial_lr"} != own.keys() - {"initial_lr"}:  # which schedulers add
                raise ValueError(
                    f"the state dict is not of {type(self).__name__}: it has {sorted(settings.keys() - own.keys())} "
                    f"and lacks {sorted(own.keys() - settings.keys())}"
                )
        _without_compiler(torch.optim.Optimizer.load_state_dict)(self, {**state_dict, "state": {}})

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy is made of: all but hooks, and the `step` that a scheduler put in the place of ours."""
        left_out = ("step", "_step_supports_amp_scaling")
        return {k: v for k, v in self.__dict__.items() if k not in left_out and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_stores()

    def _take_stores(self) -> None:
        # To torch's distributed checkpoint an optimizer without state is new, and it makes a step of its own with it.
        self.state["rows"] = {}  # type: ignore[index]
        for store, settings in zip(self.stores, self.param_groups, strict=True):
            store.take(self, settings)


def _without_compiler(method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method of torch's optimizers without its wrapper, which imports torch's compiler to keep out of it.

    That import takes a process over two seconds, and nobody compiles these methods.
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
        f"expected the tables, an EmbeddingCollection or what its trained_by returns, and got {written}{inner}. "
        f"Write et.optim.{name}(model.tables, ...); rows are no parameters, and torch.optim takes all other parameters"
    )


def _check_free(store: RowStore) -> None:
    if store.optimizer is not None:
        gc.collect()  # torch's schedulers and their optimizer refer to each other
    if store.optimizer is not None:
        raise ValueError(
            f"the tables {', '.join(store.table_names)} have an optimizer already, "
            f"{type(store.optimizer).__name__}, and a table has one: change its param_groups, or delete it and what "
            "refers to it, such as its scheduler, first"
        )
