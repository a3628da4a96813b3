"""What is known of users and items beside who turned to what: a bag of categories for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedtrain import storage
from embedtrain.data.bags import Bags
from embedtrain.data.columns import read_columns
from embedtrain.data.events import Ids
from embedtrain.data.readers import AUTO, Layout
from embedtrain.data.row_names import rows_among
from embedtrain.data.sources import Source
from embedtrain.data.vocabulary import COUNTS_SCHEMA, Vocabulary
from embedtrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SideOptions:
    """Where the categories of the users, or of the items, are.

    Attributes:
        path: files with a row for each, as `expand_sources` takes them; None for no features.
        format: as in `read_columns`.
        layout: of lines of text, as in `read_columns`.
        id_column: name of the column of ids.
        separators: by column, what parts the categories of a cell; None for one category a cell.
        base_vocabulary: a file of ids that have a row whether they are among the interactions or not, and whose counts
            are added to theirs; None for none.
        base_categories: by column, a file of categories, as `write_values` writes one, likewise.
    """

    path: str | Sequence[str] | None = None
    format: str = AUTO
    layout: Layout = field(default_factory=Layout)
    id_column: str = "id"
    separators: Mapping[str, str | None] = field(default_factory=dict)
    base_vocabulary: str | None = None
    base_categories: Mapping[str, str] = field(default_factory=dict)


def give_rows(ids: Ids, base: Vocabulary | None = None, takes_new: bool = True) -> tuple[Vocabulary, NDArray[np.int64]]:
    """Gives each distinct id a row, the most frequent first; returns the ids by row, and the row of each.

    The ids of `base` have a row too, and count as often as it says besides. Without `takes_new` no others have one, and
    -1 stands for them.
    """
    counts = np.bincount(ids.codes, minlength=len(ids.names))
    table = pa.table([ids.names.cast(pa.large_binary()), pa.array(counts, pa.int64())], schema=COUNTS_SCHEMA)
    # Names that no row has get none.
    vocabulary = (
        Vocabulary.build(table, 1, None) if base is None else base.extended(table, 1, None, takes_new=takes_new)
    )
    return vocabulary, rows_among(ids.names, vocabulary.words)[ids.codes]


def read_features(
    options: SideOptions,
    sources: list[Source],
    vocabulary: Vocabulary,
    left_out: dict[str, int],
    side: str,
    takes_new: bool,
) -> list[tuple[str, Bags, Vocabulary]]:
    """Returns name, categories of each row, and the categories themselves, for each feature."""
    if options.path is None:
        return []
    names = list(options.separators)
    wanted = [options.id_column, *names]
    keys = {**dict.fromkeys(names, f"{side}.features"), options.id_column: f"{side}.id_column"}
    batches = [
        rows.columns for rows in read_columns(sources, wanted, options.format, options.layout, options.separators, keys)
    ]
    urls = ", ".join(source.url for source in sources)
    if not batches:
        raise UserError(f"{urls}: there are no rows: expected one for each of the {side}, or leave out {side}.path")
    rows = np.concatenate([rows_among(batch[0], vocabulary.words) for batch in batches])
    described, times = np.unique(rows[rows >= 0], return_counts=True)
    if len(times) and times.max() > 1:
        repeated = vocabulary.words[described[times.argmax()]]
        raise UserError(f"{options.path}: the id {repeated!r} of {side} has {times.max()} rows: expected one each")
    left_out[f"{side}_without_features"] = len(vocabulary) - len(described)
    found = []
    for place, name in enumerate(names, start=1):
        cells = [split_categories(batch[place], options.separators[name]) for batch in batches]
        lengths = np.concatenate([lengths for lengths, _ in cells])
        if not lengths.any():
            raise UserError(f"{urls}: no row has a value in column {name!r}: leave out {side}.features.{name}")
        values = Ids.read([values.dictionary_encode() for _, values in cells])
        categories, category_rows = give_rows(values, _base_of(options.base_categories.get(name)), takes_new)
        of_row = np.repeat(rows, lengths)
        is_known = (of_row >= 0) & (category_rows >= 0)
        order = np.argsort(of_row[is_known], kind="stable")
        bags = Bags.from_rows(of_row[is_known][order], category_rows[is_known][order], len(vocabulary))
        found.append((name, bags, categories))
    return found


def _base_of(path: str | None) -> Vocabulary | None:
    if path is None:
        return None
    values = pq.read_table(pa.BufferReader(storage.read(path)), columns=["value", "count"])
    return Vocabulary(values["value"].to_pylist(), np.asarray(values["count"], np.int64))


def split_categories(column: pa.Array, separator: str | None) -> tuple[NDArray[np.int64], pa.Array]:
    """Returns how many categories each cell has, and all of them; an empty cell has none."""
    if pa.types.is_large_string(column.type):
        if separator is None:
            is_given = pc.not_equal(column, "").fill_null(False)
            return np.asarray(is_given).astype(np.int64), column.filter(is_given)
        column = pc.split_pattern(column, separator)
    lengths = np.asarray(pc.list_value_length(column).fill_null(0)).astype(np.int64)
    values = pc.list_flatten(column)
    is_empty = np.asarray(pc.equal(values, "").fill_null(True))
    of_cell = np.repeat(np.arange(len(lengths)), lengths)
    lengths = np.bincount(of_cell[~is_empty], minlength=len(lengths))
    return lengths, values.filter(pa.array(~is_empty))
