"""Drafts a configuration of retrieval for data files with columns."""

from __future__ import annotations

from collections.abc import Iterator

from embedtrain.data.survey import Survey
from embedtrain.recipes.draft import commented, head
from embedtrain.recipes.interactions_draft import data_section, events_of


def draft(path: str, found: Survey, label: str | None) -> Iterator[str]:
    """Yields the lines of a configuration; see `Recipe.draft`."""
    events = events_of(path, found, label, "retrieval")
    yield from head("retrieval", path, found)
    yield from data_section(path, found, events)
    yield "table:"
    yield f"  dim: {32 if found.is_all else 64}"
    yield ""
    yield "train:"
    yield commented("  epochs: 20", "passes over the data")
    yield commented(
        f"  global_batch_size: {64 if events.user.num_values < 5000 else 512}", "users per step, over all ranks"
    )
