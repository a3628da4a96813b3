"""The schema of a click log: its label, dense and categorical columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from embedtrain.data.readers import Layout, require_format
from embedtrain.data.readers.rows import Uses
from embedtrain.errors import UserError

CRITEO = "criteo"
Encoding = Literal["vocabulary", "hash", "id"]
DenseTransform = Literal["log1p", "none"]

_COLUMN_FACTS = ("name", "num_rows", "encoding", "min_count", "is_bag", "separator")
_SCHEMA_FACTS = ("file_format", "label", "dense", "categorical", "positive", "columns", "delimiter", "dense_transform")

CRITEO_LABEL = "label"
CRITEO_DENSE = tuple(f"I{i}" for i in range(1, 14))
CRITEO_CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))


@dataclass(frozen=True, kw_only=True)
class CategoricalColumn:
    """Describes a column whose values are looked up in a table.

    Attributes:
        name: name of the column and of the feature.
        num_rows: rows of its table; None (only with a vocabulary) for one row per distinct value.
        encoding: how a value becomes a row: "vocabulary" (row 0 stands for all values out of the vocabulary),
            "hash" (hash of the value's text modulo `num_rows`) or "id" (the value is the row number).
        min_count: values seen less often are not part of the vocabulary.
        is_bag: whether an example has any number of values: a list in Parquet, or text with separators.
        separator: separates the values of a bag in a text file.

    Raises:
        UserError: an option is out of range, or contradicts another.
    """

    name: str
    num_rows: int | None = None
    encoding: Encoding = "vocabulary"
    min_count: int = 1
    is_bag: bool = False
    separator: str = "|"

    def __post_init__(self) -> None:
        if self.encoding not in get_args(Encoding):
            raise UserError(f"feature {self.name}: encoding must be one of {get_args(Encoding)}, got {self.encoding!r}")
        if self.num_rows is None and self.encoding != "vocabulary":
            raise UserError(f"feature {self.name}: encoding {self.encoding!r} needs num_rows")
        if self.num_rows is not None and self.num_rows < 1:
            raise UserError(f"feature {self.name}: num_rows must be at least 1, got {self.num_rows}")
        if self.min_count < 1:
            raise UserError(f"feature {self.name}: min_count must be at least 1, got {self.min_count}")
        if not self.separator:
            raise UserError(f"feature {self.name}: the separator of a bag must not be empty")


@dataclass(frozen=True, kw_only=True)
class ClickSchema:
    """Describes the columns of a click log.

    Attributes:
        file_format: a name in `FORMATS`, or "criteo": tab-separated lines without a header of a label, 13 integers
            (`I1` to `I13`) and 26 tokens of hexadecimal digits (`C1` to `C26`), any of which may be missing.
        label: the column to predict; None if the rows have no label, such as rows to score.
        positive: the label's value that counts as 1, any other as 0; None for labels that are 0 or 1.
        dense: columns of numbers.
        categorical: columns to look up; a column may also be dense, for example an age.
        columns: column names of text files, in order; None if each file's first line names them.
        delimiter: separates the fields of text files.
        quote: quotes fields; see `Layout.quote`.
        dense_transform: "log1p" is `sign(x) * log(1 + |x|)`, which is defined for negative numbers too; "none" keeps
            numbers. Afterwards numbers are normalised to mean 0 and variance 1.

    Raises:
        UserError: a column is named twice or is not in `columns`, or there is no feature.
    """

    file_format: str
    label: str | None
    dense: tuple[str, ...] = ()
    categorical: tuple[CategoricalColumn, ...] = ()
    positive: str | None = None
    columns: tuple[str, ...] | None = None
    delimiter: str = ","
    quote: str | None = "auto"
    dense_transform: DenseTransform = "log1p"

    def __post_init__(self) -> None:
        require_format(self.file_format, (CRITEO,), "data.format", with_names=True)
        if self.dense_transform not in get_args(DenseTransform):
            raise UserError(f"dense_transform must be one of {get_args(DenseTransform)}, got {self.dense_transform!r}")
        if not self.categorical:
            raise UserError(
                "a click log needs at least one categorical column, because tables hold the rows of categorical columns"
            )
        _refuse_repeats("the label and the dense columns", (*self._labels, *self.dense))
        _refuse_repeats("the label and the categorical columns", (*self._labels, *(c.name for c in self.categorical)))
        if self.columns is not None:
            _refuse_repeats("columns", self.columns)
            require_columns(self.used_columns, self.columns, "data.columns")
        Layout(self.columns, self.delimiter, self.quote)  # Constructing the layout checks delimiter and quote.

    @classmethod
    def criteo(cls, categorical: Sequence[CategoricalColumn], dense_transform: DenseTransform = "log1p") -> ClickSchema:
        """Returns the schema of the Criteo layout; `categorical` are columns among `C1` to `C26`."""
        return cls(
            file_format=CRITEO,
            label=CRITEO_LABEL,
            dense=CRITEO_DENSE,
            categorical=tuple(categorical),
            columns=(CRITEO_LABEL, *CRITEO_DENSE, *CRITEO_CATEGORICAL),
            delimiter="\t",
            quote=None,
            dense_transform=dense_transform,
        )

    @property
    def reader(self) -> str:
        """The name in `FORMATS` of the reader of the files."""
        return "tsv" if self.file_format == CRITEO else self.file_format

    @property
    def keys(self) -> dict[str, str]:
        """The setting that names each used column."""
        looked_up = {column.name: "data.categorical" for column in self.categorical}
        labels = dict.fromkeys(self._labels, "data.label")
        return {**looked_up, **dict.fromkeys(self.dense, "data.dense"), **labels}

    @property
    def layout(self) -> Layout:
        """The layout of the rows in text files."""
        return Layout(self.columns, self.delimiter, self.quote)

    @property
    def uses(self) -> Uses:
        """The uses of the columns, for the reader of the files."""
        looked_up = {column.name for column in self.categorical}
        parsed = frozenset(self.dense) - looked_up
        label = set(self._labels) if self.positive is None else set()
        numbers = parsed | label
        ids = {column.name for column in self.categorical if column.encoding == "id"}
        return Uses(numbers, parsed, {column.name: column.separator for column in self.bags}, numbers | ids)

    @property
    def facts(self) -> str:
        """A text that is equal for schemas of equal meaning, to be hashed into fingerprints.

        Its form must not change, because checkpoints hold such hashes: a new field is included only if it is not at its
        default.
        """
        columns = [_facts_of(column, _COLUMN_FACTS) for column in self.categorical]
        categorical = f"({', '.join(columns)}{',' if len(columns) == 1 else ''})"
        quote = "" if self.quote == "auto" or self.file_format == CRITEO else f" quote={self.quote!r}"
        return _facts_of(self, _SCHEMA_FACTS, {"categorical": categorical}) + quote

    @property
    def used_columns(self) -> tuple[str, ...]:
        """The label, the dense and the categorical columns, in this order, each once."""
        return tuple(dict.fromkeys((*self._labels, *self.dense, *(column.name for column in self.categorical))))

    @property
    def _labels(self) -> tuple[str, ...]:
        return () if self.label is None else (self.label,)

    @property
    def single(self) -> tuple[CategoricalColumn, ...]:
        """The categorical columns with one value per example."""
        return tuple(column for column in self.categorical if not column.is_bag)

    @property
    def bags(self) -> tuple[CategoricalColumn, ...]:
        """The categorical columns with any number of values per example."""
        return tuple(column for column in self.categorical if column.is_bag)


def _facts_of(whole: object, names: Sequence[str], spelled: Mapping[str, str] | None = None) -> str:
    facts = {name: repr(getattr(whole, name)) for name in names} | dict(spelled or {})
    return f"{type(whole).__name__}({', '.join(f'{name}={value}' for name, value in facts.items())})"


def require_columns(wanted: Sequence[str], existing: Sequence[str], where: str) -> None:
    """Raises UserError if `where` lacks a wanted column."""
    missing = [name for name in wanted if name not in existing]
    if missing:
        raise UserError(f"{where}: there is no column {', '.join(missing)}; there are {', '.join(existing)}")


def _refuse_repeats(what: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{what} name {', '.join(repeated)} more than once")
