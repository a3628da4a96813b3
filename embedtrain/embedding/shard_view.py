"""`ShardView`: what a checkpoint sees of a model, a named range of rows of a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from embedtrain.embedding.row_changes import RowChanges


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
    def stop(self) -> int:
        """Returns the global row after this shard's last."""
        return self.offset + len(self.tensor)
