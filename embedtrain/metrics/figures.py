"""Charts and tables about a trained model as plain data. A recipe makes them, and the report draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Line:
    """Describes one line of a chart.

    Attributes:
        name: text in the legend.
        x: [n], rising.
        y: [n].
        is_dashed: whether it is drawn dashed, as a reference or as a second kind of data.
        color: index of the colour, from 0; None for the index of the line in its chart.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_dashed: bool = False
    color: int | None = None


@dataclass(frozen=True)
class Chart:
    """Describes a chart of lines over a common axis.

    Attributes:
        title: title of the chart.
        lines: at least one line.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        note: one or two sentences on how to read the chart; may be empty.
        synced: name of a group of charts that share the cursor position and the zoom; empty for no group.
    """

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    y_label: str = ""
    note: str = ""
    synced: str = ""


@dataclass(frozen=True)
class Bars:
    """Describes a table of names with one number each, drawn as bars.

    Attributes:
        title: title of the table.
        names: [n].
        values: [n].
        note: how to read the table; may be empty.
        name_label: heading of the names.
        value_label: heading of the values.
        format: Python format of the values, such as ".1%".
        details: [n] texts beside the values; empty for none.
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
    """Describes a table of texts and numbers.

    Attributes:
        title: title of the table.
        header: headings of the columns; columns of numbers are aligned right.
        rows: cells of each row, as many as headings; None is an empty cell.
        note: how to read the table; may be empty.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    note: str = ""


@dataclass(frozen=True)
class PointMap:
    """Describes a searchable map of named points.

    Attributes:
        title: title of the map.
        names: [n].
        x: [n].
        y: [n].
        note: how to read the map; may be empty.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        weights: [n] numbers of at least 0, such as counts, that set the size of the points; empty for equal sizes.
        has_labels: whether names are drawn beside points if there is room.
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
    """Describes a preformatted text.

    Attributes:
        title: title of the text.
        text: the text; its line breaks are kept.
    """

    title: str
    text: str


Part = Chart | Bars | Table | PointMap | Text


@dataclass(frozen=True)
class Section:
    """Describes a section of the report.

    Attributes:
        title: heading of the section.
        parts: charts, tables, maps and texts, in order.
        note: the data that they were computed on; may be empty.
        measures: numbers to show large at the top of the section, by name.
    """

    title: str
    parts: Sequence[Part]
    note: str = ""
    measures: Mapping[str, float] = field(default_factory=dict)
