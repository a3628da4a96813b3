"""The numbers that stand out: the measure that the run is judged by first, each with its best."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from embedtrain.checkpoint.retention import mode_of_best
from embedtrain.errors import UserError
from embedtrain.metrics.names import as_words, counters_of, is_plumbing, quality_names, split_name
from embedtrain.report.curves import RunCurves
from embedtrain.report.page import Card, number

MAX_CARDS = 6

Mode = Literal["min", "max"]


def best_metric(settings: Mapping[str, Any]) -> str:
    """Returns the measure that a run is judged by: `checkpoint.best_metric`."""
    return str((settings.get("checkpoint") or {}).get("best_metric", "loss"))


def mode_of(name: str, settings: Mapping[str, Any]) -> Mode | None:
    """Returns whether a measure's smallest or largest values are its best; None if its name does not tell."""
    mode: Literal["auto", "min", "max"] = "auto"
    if name == best_metric(settings):
        mode = (settings.get("checkpoint") or {}).get("best_mode", "auto")
    with contextlib.suppress(UserError):
        return mode_of_best(name, mode)
    return None


def headline_names(logged: RunCurves, settings: Mapping[str, Any]) -> list[str]:
    """Returns the measures in order: the one that the run is judged by, then held-out ones, and the loss.

    A training measure whose held-out twin is there is left out.
    """
    names = quality_names(logged.curves)
    judged = best_metric(settings)
    held_out = [name for name in names if name in logged.evaluated or split_name(name)[1] != "training"]
    twins = {split_name(name)[0] for name in held_out}
    training = [name for name in names if name not in held_out and (name not in twins or name == "loss")]
    # The loss is what runs are judged by if nothing is said: held-out measures say more.
    first = [judged] if judged in names and judged != "loss" else []
    return list(dict.fromkeys([*first, *held_out, *sorted(training, key=lambda name: name != "loss")]))


def cards_of(logged: RunCurves, settings: Mapping[str, Any], extra: Mapping[str, float]) -> list[Card]:
    """Returns the numbers at the top of a page.

    Args:
        logged: what the run has logged.
        settings: its configuration.
        extra: measures by name that are not logged.
    """
    cards = []
    for name in headline_names(logged, settings):
        steps, values = logged.curves[name]
        mode = mode_of(name, settings)
        best = None if mode is None else (min if mode == "min" else max)(values)
        detail = ""
        if best is not None and len(values) > 1 and name != "loss":
            is_last = best == values[-1]
            detail = "its best" if is_last else f"best {number(best)} at step {steps[values.index(best)]:,}"
        base, data = split_name(name)
        twin = logged.curves.get(base) if data != "training" else None
        if twin is not None and base != name:
            detail += f"{', ' if detail else ''}training {number(twin[1][-1])}"
        cards.append(Card(as_words(name), number(values[-1]), detail))
    added = [Card(as_words(name), number(value)) for name, value in extra.items()]
    return [*cards[: max(MAX_CARDS - len(added), 0)], *added]


def last_values(logged: RunCurves) -> Sequence[tuple[str, float]]:
    """Returns the last value of every number but those of the machinery."""
    curves = logged.curves
    plain = [name for name in curves if not is_plumbing(name)]
    counters = counters_of(curves)
    return [(as_words(name), curves[name][1][-1]) for name in sorted(plain, key=lambda name: name in counters)]
