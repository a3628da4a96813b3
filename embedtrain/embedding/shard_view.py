"""`ShardView`, a named range of rows of a tensor: the form in which checkpoints save and load a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from embedtrain.embedding.row_changes import RowChanges
from embedtrain.optim.stores import STEP


@dataclass(eq=False)
class StepCount:
    """Refers to the number of steps that an optimizer has made on some tables.

    It is saved because Adam's bias correction and the stochastic rounding of bfloat16 depend on it.

    Attributes:
        settings: the optimizer's parameter group, which has the count as `step`; None before there is an optimizer.
    """

    settings: dict[str, Any] | None = None

    @property
    def value(self) -> int | None:
        """The count; None before there is an optimizer."""
        return None if self.settings is None else int(self.settings[STEP])

    def restore(self, value: int) -> None:
        """Sets the count; no-op if there is no optimizer."""
        if self.settings is not None:
            self.settings[STEP] = value


def table_steps(views: Iterable[ShardView]) -> dict[str, int]:
    """Returns the number of optimizer steps by table; tables without an optimizer are left out."""
    found = {view.table: view.steps.value for view in views if view.steps is not None}
    return {table: value for table, value in found.items() if value is not None}


@dataclass(frozen=True)
class ShardView:
    """Holds the rows `[offset, offset + len(tensor))` of the global tensor `name`, which this rank owns.

    Attributes:
        name: name of the tensor in the checkpoint, a public format: "item/weight", "item/accumulator".
        global_shape: shape of the whole tensor over all ranks.
        offset: row of the global tensor that is row 0 of `tensor`.
        tensor: [num_rows, *global_shape[1:]] on any device; shares memory with the trained tensor. May have no rows.
        layout: JSON that maps rows of the tensor to rows of the table, such as {"kind": "spread", "multiplier": 199};
            a tensor with another layout is not loaded.
        changes: gets the updates of the optimizer; None if no optimizer reports updates. `tensor` is a range of rows of
            the tensor that `changes` has under the last part of `name`.
        first_row: row of that tensor which is row 0 of `tensor`.
        steps: step count of the table's optimizer, saved and loaded with the tensor; None if no optimizer trains it.

    Raises:
        ValueError: the rows do not lie inside the global tensor, or have another shape than its rows.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: int
    tensor: Tensor
    layout: Mapping[str, Any] = field(default_factory=dict)
    changes: RowChanges | None = None
    first_row: int = 0
    steps: StepCount | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_shape", tuple(self.global_shape))
        if not self.global_shape or self.tensor.dim() != len(self.global_shape):
            raise ValueError(
                f"{self.name}: a shard of shape {tuple(self.tensor.shape)} cannot be rows of a tensor "
                f"of shape {self.global_shape}"
            )
        if tuple(self.tensor.shape[1:]) != self.global_shape[1:]:
            raise ValueError(
                f"{self.name}: expected rows of shape {self.global_shape[1:]}, got {tuple(self.tensor.shape[1:])}"
            )
        if not 0 <= self.offset <= self.stop <= self.global_shape[0]:
            raise ValueError(
                f"{self.name}: rows [{self.offset}, {self.stop}) do not lie in a tensor of {self.global_shape[0]} rows"
            )

    @property
    def table(self) -> str:
        """Name of the table."""
        return self.name.rpartition("/")[0]

    @property
    def stop(self) -> int:
        """Row of the global tensor after the last row of this shard."""
        return self.offset + len(self.tensor)
