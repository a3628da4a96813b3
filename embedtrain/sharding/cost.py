"""Bytes that look-ups move between ranks: arithmetic that both a step and `embedtrain plan` use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wire:
    """Sizes of what travels for one group of tables.

    Attributes:
        id_bytes: size of a row number.
        vector_bytes: size of one value of a row.
        gradient_bytes: size of one value of a gradient, or of a sum of rows.
        has_gradients: whether gradients travel at all.
    """

    id_bytes: int = 4
    vector_bytes: int = 4
    gradient_bytes: int = 4
    has_gradients: bool = True


def bytes_of_rows(num_rows: int, dim: int, wire: Wire) -> int:
    """Returns the bytes of distinct rows that travel to the examples: ids out, rows back, gradients home."""
    return num_rows * (wire.id_bytes + dim * (wire.vector_bytes + wire.has_gradients * wire.gradient_bytes))


def bytes_of_sums(num_ids: int, num_sums: int, dim: int, wire: Wire, *, is_weighted: bool = False) -> int:
    """Returns the bytes of pooling at the owners: all ids out, one sum per owner and bag back, its gradient home."""
    of_ids = num_ids * wire.id_bytes * (2 if is_weighted else 1)
    return of_ids + num_sums * dim * wire.gradient_bytes * (1 + wire.has_gradients)
