"""Drafts a configuration of SASRec for data files with columns."""

from __future__ import annotations

from collections.abc import Iterator

from embedtrain.data.survey import Survey
from embedtrain.recipes.draft import commented, head
from embedtrain.recipes.interactions_draft import data_section, events_of


def draft(path: str, found: Survey, label: str | None) -> Iterator[str]:
    """Yields the lines of a configuration; see `Recipe.draft`."""
    events = events_of(path, found, label, "sasrec")
    yield from head("sasrec", path, found)
    yield from data_section(path, found, events)
    yield "train:"
    yield commented("  epochs: 8", "passes over the data")
