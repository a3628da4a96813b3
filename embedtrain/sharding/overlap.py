"""Arithmetic on half-open row intervals: what resharding comes down to."""

from __future__ import annotations


def overlap(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int] | None:
    """Returns the rows that two half-open intervals `[start, stop)` share, or None."""
    start, stop = max(first[0], second[0]), min(first[1], second[1])
    return (start, stop) if start < stop else None
