"""Bytes that a step's look-ups move between ranks: pure arithmetic, shared by the step and by `plan`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wire:
    """Sizes of what travels for one group of tables.

    Attributes:
        id_bytes: of a row's number.
        vector_bytes: of each place of a row on its way out.
        gradient_bytes: of each place of a gradient on its way home, and of a sum of rows on its way out.
        has_gradients: whether gradients travel at all.
    """

    id_bytes: int = 4
    vector_bytes: int = 4
    gradient_bytes: int = 4
    has_gradients: bool = True


def bytes_of_rows(num_rows: int, dim: int, wire: Wire) -> int:
    """Returns what distinct rows cost that travel to the examples: the id out, the row back, its gradient home."""
    return num_rows * (wire.id_bytes + dim * (wire.vector_bytes + wire.has_gradients * wire.gradient_bytes))


def bytes_of_sums(num_ids: int, num_sums: int, dim: int, wire: Wire, *, is_weighted: bool = False) -> int:
    """Returns what pooling at the owners costs: every id of every bag out, a sum per owner and bag and its gradient."""
    of_ids = num_ids * wire.id_bytes * (2 if is_weighted else 1)
    return of_ids + num_sums * dim * wire.gradient_bytes * (1 + wire.has_gradients)
