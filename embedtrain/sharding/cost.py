"""Bytes that a lookup moves between ranks, as used by both the training step and `embedtrain plan`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wire:
    """Holds the sizes of values on the wire for one table group.

    Attributes:
        id_bytes: bytes per row number.
        vector_bytes: bytes per value of a row.
        gradient_bytes: bytes per value of a gradient or of a sum of rows.
        has_gradients: whether gradients are sent.
    """

    id_bytes: int = 4
    vector_bytes: int = 4
    gradient_bytes: int = 4
    has_gradients: bool = True


def bytes_of_rows(num_rows: int, dim: int, wire: Wire) -> int:
    """Returns the bytes if bags are pooled on the rank of their batch: ids to owners, rows back, gradients back."""
    return num_rows * (wire.id_bytes + dim * (wire.vector_bytes + wire.has_gradients * wire.gradient_bytes))


def bytes_of_sums(num_ids: int, num_sums: int, dim: int, wire: Wire, *, is_weighted: bool = False) -> int:
    """Returns the bytes if bags are pooled at the owners of rows.

    All ids (and weights) go to the owners. One sum per owner and bag comes back, and its gradient goes to the owner.
    """
    of_ids = num_ids * wire.id_bytes * (2 if is_weighted else 1)
    return of_ids + num_sums * dim * wire.gradient_bytes * (1 + wire.has_gradients)
