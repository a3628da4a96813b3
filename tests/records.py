"""Records of metrics.jsonl, for tests that compare runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
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


def contents(folder: Path) -> dict[str, str]:
    """Returns a hash of every file of a folder, by its path there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
