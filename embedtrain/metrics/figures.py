"""Charts and tables about a trained model as plain data: a recipe makes them, and the report draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: stands in the legend.
        x: [n], rising.
        y: [n].
        is_dashed: whether it is drawn dashed, as a reference or as a second kind of data.
        color: number of the colour, from 0; None for the place of the line in its chart.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_dashed: bool = False
    color: int | None = None


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis.

    Attributes:
        title: of the chart.
        lines: at least one.
        x_label: what the axis counts.
        y_label: what the lines show.
        note: how to read it, one or two sentences; may be empty.
        synced: charts of one name share the position of the mouse and the zoom; empty for none.
    """

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    y_label: str = ""
    note: str = ""
    synced: str = ""


@dataclass(frozen=True)
class Bars:
    """A number for each of some names, drawn as bars in a table.

    Attributes:
        title: of the table.
        names: [n].
        values: [n].
        note: how to read it; may be empty.
        name_label: heading of the names.
        value_label: heading of the values.
        format: Python's format of a value, such as ".1%".
        details: [n] texts beside the values; none if empty.
    """

    title: str
    names: Sequence[str]
    values: Sequence[float]
    note: str = ""
    name_label: str = ""
    value_label: str = ""
    format: str = ".4g"
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """Rows of texts and numbers.

    Attributes:
        title: of the table.
        header: the headings; numbers stand right.
        rows: each as long as the header; None is an empty cell.
        note: how to read it; may be empty.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    note: str = ""


@dataclass(frozen=True)
class PointMap:
    """Named points on a plane, which a reader can search.

    Attributes:
        title: of the map.
        names: [n].
        x: [n].
        y: [n].
        note: how to read it; may be empty.
        x_label: of the axis.
        y_label: of the axis.
        weights: [n] at least 0, such as counts; larger ones make larger points. All are alike if empty.
        has_labels: whether names are drawn beside the points that have room for one.
    """

    title: str
    names: Sequence[str]
    x: Sequence[float]
    y: Sequence[float]
    note: str = ""
    x_label: str = ""
    y_label: str = ""
    weights: Sequence[float] = ()
    has_labels: bool = True


@dataclass(frozen=True)
class Text:
    """A text whose lines are kept as they are.

    Attributes:
        title: of the text.
        text: the lines.
    """

    title: str
    text: str


Part = Chart | Bars | Table | PointMap | Text


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading of its own.

    Attributes:
        title: the heading.
        parts: charts and tables, in order.
        note: what they were computed on; may be empty.
        measures: numbers that stand out, by name.
    """

    title: str
    parts: Sequence[Part]
    note: str = ""
    measures: Mapping[str, float] = field(default_factory=dict)
