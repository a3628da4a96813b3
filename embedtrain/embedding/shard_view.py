"""`ShardView`: what a checkpoint sees of a model, a named range of rows of a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from embedtrain.embedding.row_changes import RowChanges
from embedtrain.optim.stores import STEP


@dataclass(eq=False)
class StepCount:
    """How many steps the optimizer of some tables did: Adam's next step depends on it, and the rounding of bfloat16.

    Attributes:
        settings: the optimizer's parameter group, whose `step` it is; None before there is an optimizer.
    """

    settings: dict[str, Any] | None = None

    @property
    def value(self) -> int | None:
        """The count; None before there is an optimizer."""
        return None if self.settings is None else int(self.settings[STEP])

    def restore(self, value: int) -> None:
        """Sets the count, if there is an optimizer."""
        if self.settings is not None:
            self.settings[STEP] = value


def table_steps(views: Iterable[ShardView]) -> dict[str, int]:
    """Returns, by table, the steps that its optimizer did; nothing of tables without an optimizer."""
    found = {view.table: view.steps.value for view in views if view.steps is not None}
    return {table: value for table, value in found.items() if value is not None}


@dataclass(frozen=True)
class ShardView:
    """Rows `[offset, offset + len(tensor))` of the global tensor `name`, held by this rank.

    Attributes:
        name: the tensor's name in the checkpoint, a public format: "item/weight", "item/accumulator".
        global_shape: shape of the whole tensor over all ranks.
        offset: the global tensor's row that is row 0 of `tensor`.
        tensor: [rows, *global_shape[1:]] on any device; shares memory with what is trained. Rows may be 0.
        layout: JSON that says which row of the table each row of the tensor is, as
            {"kind": "spread", "multiplier": 199}; tensors of another layout are not loaded.
        changes: what an optimizer reports its updates to; None where nobody does. `tensor` is then rows of
            the tensor that `changes` knows by the last part of `name`.
        first_row: the row among those of `changes` that is row 0 of `tensor`.
        steps: the steps that the table's optimizer did, saved and loaded with it; None of what no optimizer trains.

    Raises:
        ValueError: the rows do not lie inside the global tensor, or their shape is not its.
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
                f"{self.name}: the shard's rows have shape {tuple(self.tensor.shape[1:])}, "
                f"the tensor's {self.global_shape[1:]}"
            )
        if not 0 <= self.offset <= self.stop <= self.global_shape[0]:
            raise ValueError(
                f"{self.name}: rows [{self.offset}, {self.stop}) do not lie in a tensor of {self.global_shape[0]} rows"
            )

    @property
    def table(self) -> str:
        """Returns the name of the table."""
        return self.name.rpartition("/")[0]

    @property
    def stop(self) -> int:
        """Returns the global row after this shard's last."""
        return self.offset + len(self.tensor)
