"""The page itself: one file of HTML with everything in it, whatever it is about."""

from __future__ import annotations

import importlib.resources
import json
import math
import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import jinja2

from embedtrain.checkpoint.writer import own_version
from embedtrain.errors import printable
from embedtrain.metrics.figures import Bars, Chart, Part, PointMap, Section, Table

_FILES = {"css": "page.css", "js": "page.js", "uplot_css": "uplot/uPlot.min.css", "uplot_js": "uplot/uPlot.iife.min.js"}
_DIGITS = 6
"""Significant ones of the numbers of charts."""


@dataclass(frozen=True)
class Card:
    """A number that stands out at the top of the page.

    Attributes:
        name: what it is.
        value: as a text.
        detail: a few words below it; may be empty.
    """

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Page:
    """What a page shows, from the top.

    Attributes:
        title: the name of the run, or of the runs.
        summary: one sentence.
        badge: one word on the state of the run; may be empty.
        cards: the numbers that stand out.
        advice: what to try next; may be empty.
        sections: open ones.
        folded: sections that the reader opens.
    """

    title: str
    summary: str
    badge: str = ""
    cards: Sequence[Card] = ()
    advice: Sequence[str] = ()
    sections: Sequence[Section] = ()
    folded: Sequence[Section] = field(default_factory=tuple)


def render(page: Page) -> str:
    """Returns the page as HTML, which needs no other file and no network."""
    folder = importlib.resources.files(__package__)
    files = {name: folder.joinpath(path).read_text(encoding="utf-8") for name, path in _FILES.items()}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_printable, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, slug=_slug)
    drawn: list[dict[str, Any]] = []

    def draw(part: Chart | PointMap) -> int:
        """Notes the data of a chart and returns their place."""
        drawn.append(_data_of(part))
        return len(drawn) - 1

    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    written = datetime.now(timezone.utc)
    return template.render(
        page=page,
        files=files,
        kind=lambda part: type(part).__name__,
        alt=alternative_text,
        draw=draw,
        cell=_cell,
        bars=_bars,
        drawn=lambda: script_data(drawn),
        written=written,
        version=own_version(),
    )


def number(value: float) -> str:
    """Returns a number as the page shows it: 12,345 or 0.12345."""
    if isinstance(value, int) or (abs(value) >= 1000 and math.isfinite(value)):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def script_data(value: Any) -> str:
    """Returns JSON that can stand in a script element: no text in it can end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def alternative_text(part: Part) -> str:
    """Returns what a chart shows, for readers who do not see it."""
    if isinstance(part, PointMap):
        return f"Map of {len(part.names):,} names{_of(part.title)}: {part.x_label} against {part.y_label}."
    assert isinstance(part, Chart)
    lines = [
        f"{line.name} from {number(line.y[0])} to {number(line.y[-1])}, lowest {number(min(line.y))}, "
        f"highest {number(max(line.y))}"
        for line in part.lines
    ]
    return f"Line chart of {part.title} by {part.x_label}: {'; '.join(lines)}."


def _of(title: str) -> str:
    return f" of {title}" if title else ""


def _data_of(part: Chart | PointMap) -> dict[str, Any]:
    if isinstance(part, PointMap):
        return {
            "kind": "map",
            "names": [printable(name) for name in part.names],
            "x": _rounded(part.x),
            "y": _rounded(part.y),
            "weights": _rounded(part.weights),
            "xLabel": part.x_label,
            "yLabel": part.y_label,
            "hasLabels": part.has_labels,
        }
    # A line that rises straight up, as a ROC curve does, has several points at one place of the axis.
    times = Counter[float]()
    for line in part.lines:
        times |= Counter(line.x)
    x = sorted(times.elements())
    aligned = []
    for line in part.lines:
        values: dict[float, deque[float]] = {}
        for at, value in zip(line.x, line.y, strict=True):
            values.setdefault(at, deque()).append(value)
        aligned.append(_rounded([values[at].popleft() if values.get(at) else None for at in x]))
    return {
        "kind": "lines",
        "x": _rounded(x),
        "lines": [
            {
                "name": printable(line.name),
                "dashed": line.is_dashed,
                "color": place if line.color is None else line.color,
            }
            for place, line in enumerate(part.lines)
        ],
        "values": aligned,
        "xLabel": part.x_label,
        "yLabel": part.y_label,
        "sync": part.synced,
    }


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None or not math.isfinite(value) else _short(value) for value in values]


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if value % 1 else int(value)


def _bars(part: Bars) -> list[Mapping[str, Any]]:
    """Returns the rows of a table of bars: name, width in percent, value and detail."""
    largest = max((value for value in part.values if math.isfinite(value)), default=0.0) or 1.0
    details = part.details or [""] * len(part.names)
    return [
        {
            "name": name,
            "width": f"{max(0.0, min(1.0, value / largest)) * 100 if math.isfinite(value) else 0:.1f}",
            "value": format(value, part.format),
            "detail": detail,
        }
        for name, value, detail in zip(part.names, part.values, details, strict=True)
    ]


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else number(value)


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _printable(value: Any) -> Any:
    """Shows control characters of names and paths as escapes; HTML cannot hold them."""
    return printable(value, keep="\n") if type(value) is str else value


__all__ = ["Card", "Page", "Table", "alternative_text", "number", "render", "script_data"]
