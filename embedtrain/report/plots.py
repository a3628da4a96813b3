"""The pictures of a report, as SVG that stands in the page itself."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embedtrain.errors import UserError, printable
from embedtrain.export import unit_rows
from embedtrain.export.vectors import FloatRows
from embedtrain.report.facts import MEMORY, STAGE

_COUNTERS = {"epoch", "seconds", "skipped_steps"}
_WIDTH, _HEIGHT = 5.2, 3.0
"""Inches of one picture."""


def curve_svgs(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> dict[str, str]:
    """Returns a picture per number that was logged more than once, its values over the steps.

    Counters, the most memory so far, and what has a table of its own, the stages, have none.
    """
    counters = _COUNTERS | {name for name in curves if f"{name}_per_second" in curves}
    pictures = {}
    for name, (steps, values) in curves.items():
        if len(steps) > 1 and name not in counters and not name.startswith((STAGE, MEMORY)):
            figure, axes = _figure(_WIDTH, _HEIGHT)
            axes.plot(steps, values, linewidth=1.4)
            axes.set_xlabel("step")
            axes.set_ylabel(name.replace("_", " "))
            axes.grid(alpha=0.3)
            pictures[name] = _svg(figure)
    return pictures


def map_svg(rows: FloatRows, words: Sequence[str]) -> str:
    """Returns a map of vectors: their directions projected on the two that differ most.

    Args:
        rows: [n, dim].
        words: of the rows.
    """
    points = project(rows)
    figure, axes = _figure(2 * _WIDTH, 1.3 * _WIDTH)
    axes.scatter(points[:, 0], points[:, 1], s=4, alpha=0.4)
    for (x, y), word in zip(points, words, strict=True):
        # A word is no formula, whatever dollar signs are in it.
        axes.annotate(printable(word), (x, y), fontsize=6, parse_math=False)
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second principal component")
    return _svg(figure)


def project(rows: FloatRows) -> FloatRows:
    """Returns [n, 2]: the directions of rows [n, dim] on their first two principal components, signs fixed."""
    unit = unit_rows(rows)
    _, _, axes = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
    first_two = np.zeros((2, rows.shape[1]), dtype=np.float32)
    first_two[: min(2, len(axes))] = axes[:2]
    # A component is known up to its sign: its largest part is made positive, for the same picture every time.
    largest = np.take_along_axis(first_two, np.abs(first_two).argmax(axis=1, keepdims=True), axis=1)
    points: FloatRows = unit @ np.where(largest < 0, -first_two, first_two).T
    return points


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a report needs matplotlib: pip install 'embedtrain[plots]'") from error
    # Without pyplot: no display is looked for, and nothing is kept from one picture to the next.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    picture = text.getvalue()
    return picture[picture.index("<svg") :]
