"""What owners do for a look-up: rows are found where they live, and sums of bags are made there."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from embedtrain.embedding.input_dist import Asked
from embedtrain.embedding.requests import Vectors


class Found(NamedTuple):
    """What this rank owes others of one group of tables.

    Attributes:
        rows: those asked for, where they lie: they are copied when they travel, once.
        sums: [num_sums, dim] of the bags that this rank pools; None if no rank wants any.
    """

    rows: Vectors
    sums: Tensor | None


def lookup(asked: Asked) -> list[Found]:
    """Returns what this rank has for the ranks that asked, per group of tables."""
    return [
        Found(Vectors(*part.group.access.look_up(part.rows.rows)), None if part.sums is None else part.sums.pool())
        for part in asked.parts
    ]
