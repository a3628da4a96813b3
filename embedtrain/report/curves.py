"""The numbers of `metrics.jsonl` as charts: thinned, put in groups, and without the last partial steps."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embedtrain.metrics.figures import Chart, Line
from embedtrain.metrics.names import as_words, counters_of, is_plumbing, is_progress, split_name

STAGE, MEMORY, IDS = "stage/", "memory/", "ids/"
BUSIEST_RANK = f"{STAGE}busiest_rank"

MAX_POINTS = 800
"""Points of a line; of more, the lowest and the highest of each stretch are kept."""

Curves = Mapping[str, tuple[list[int], list[float]]]

_SYNC = "step"


@dataclass(frozen=True)
class RunCurves:
    """What a run has logged.

    Attributes:
        curves: by the name of a number, its steps and values.
        evaluated: names of the numbers that an evaluation has logged, not the training.
    """

    curves: Curves
    evaluated: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Groups:
    """The charts of a run by what they are for.

    Attributes:
        quality: losses and measures of the model.
        progress: speed and learning rates.
        plumbing: times of stages, bytes and ids.
    """

    quality: Sequence[Chart]
    progress: Sequence[Chart]
    plumbing: Sequence[Chart]


def curves_of(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Returns the steps and values of each number of the records; nulls and texts are left out."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    return curves


def evaluated_names(records: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Returns the names of the numbers that stand in records without a training loss alone: those of evaluations."""
    trained = {name for record in records if "loss" in record for name in record}
    return frozenset({name for record in records if "loss" not in record for name in record} - trained)


def without_partial(logged: RunCurves) -> dict[str, tuple[list[int], list[float]]]:
    """Returns the curves without the points that stand for less than the others do.

    The last record of the training covers fewer steps than `log.every_steps` if the run ended between two; and the
    numbers of ids are those of one step, which is smaller at the end of an epoch.
    """
    steps, _ = logged.curves.get("loss", ([], []))
    gaps = Counter(b - a for a, b in itertools.pairwise([0, *steps]))
    is_short = len(steps) > 2 and steps[-1] - steps[-2] < max(gaps, key=lambda gap: (gaps[gap], gap))
    last = steps[-1] if is_short else None
    ends = {step for step, epoch in zip(*logged.curves.get("epoch", ([], [])), strict=True) if epoch == int(epoch)}
    kept = {}
    for name, (at, values) in logged.curves.items():
        dropped = ends if name.startswith(IDS) else set()
        is_trained = name not in logged.evaluated
        points = [
            (step, value)
            for step, value in zip(at, values, strict=True)
            if step not in dropped and not (is_trained and step == last)
        ]
        kept[name] = ([step for step, _ in points], [value for _, value in points]) if points else (at, values)
    return kept


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Returns at most about `MAX_POINTS` points of a line: ends, and the lowest and highest of each stretch."""
    num = len(steps)
    if num <= MAX_POINTS:
        return list(steps), list(values)
    array = np.asarray(values)
    kept = {0, num - 1}
    edges = np.linspace(0, num, MAX_POINTS // 2).astype(int).tolist()
    for start, stop in itertools.pairwise(edges):
        kept |= {start + int(array[start:stop].argmin()), start + int(array[start:stop].argmax())}
    places = sorted(kept)
    return [steps[place] for place in places], [values[place] for place in places]


def charts_of(runs: Mapping[str, RunCurves]) -> Groups:
    """Returns charts of the curves of one or more runs, by the name of the run.

    Training and validation stand in one chart, and so do the lengths of a list: recall@5 and recall@20. A line of the
    training is dashed if the chart has others.
    """
    lines: dict[tuple[str, str], list[Line]] = {}
    for number, (run, logged) in enumerate(runs.items()):
        color = number if len(runs) > 1 else None
        counters = counters_of(logged.curves)
        for name, (steps, values) in without_partial(logged).items():
            if len(steps) < 2 or name in counters or name.startswith((BUSIEST_RANK, MEMORY)):
                continue
            base, data = split_name(name)
            data = "held-out data" if data == "training" and name in logged.evaluated else data
            chart, _, length = base.partition("@")
            group = "plumbing" if is_plumbing(name) else "progress" if is_progress(name) else "quality"
            words = [run] if len(runs) > 1 else []
            words += [f"@{length}"] if length else []
            words += [data] if group == "quality" else []
            is_dashed = data == "training" and group == "quality"
            line = Line(", ".join(words) or as_words(chart), *thinned(steps, values), is_dashed, color)
            lines.setdefault((group, chart), []).append(line)
    groups: dict[str, list[Chart]] = {"quality": [], "progress": [], "plumbing": []}
    for (group, chart), found in lines.items():
        has_both = len({line.is_dashed for line in found}) > 1
        solid = [line if has_both else replace(line, is_dashed=False) for line in found]
        groups[group].append(Chart(as_words(chart), solid, "step", synced=_SYNC))
    return Groups(_in_order(groups["quality"]), groups["progress"], groups["plumbing"])


def _in_order(charts: list[Chart]) -> list[Chart]:
    """Puts the loss first, then the charts of several lines, and otherwise leaves the order of the records."""
    return sorted(charts, key=lambda chart: (chart.title != "loss", len(chart.lines) < 2))
