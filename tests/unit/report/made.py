"""Facts of a run that nobody trained."""

from __future__ import annotations

import dataclasses
from typing import Any

from embedtrain.report.curves import RunCurves
from embedtrain.report.facts import RunFacts, TableFacts


def made_facts(**changes: Any) -> RunFacts:
    """Returns the facts of a finished run of two tables without records, but for the changes."""
    known = RunFacts(
        path="runs/<x>",
        config="seed: 1\n",
        status={"state": "done"},
        step=1200,
        world_size=2,
        seconds=3.0,
        epochs=2.0,
        num_skipped=0,
        logged=RunCurves({}, frozenset()),
        tables=[TableFacts("word", 1000, 8, 3), TableFacts("other", 10, 8, None)],
    )
    return dataclasses.replace(known, **changes)
