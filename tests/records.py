"""Records of metrics.jsonl, for tests that compare runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def without_costs(record: Mapping[str, Value]) -> dict[str, Value]:
    """Returns what was learned, without what it cost in time, memory and traffic, which no two runs share."""
    return {
        name: value
        for name, value in record.items()
        if name != "seconds" and not name.endswith("_per_second") and name.split("/")[0] not in _COSTS
    }


_COSTS = ("stage", "exchange", "memory")
