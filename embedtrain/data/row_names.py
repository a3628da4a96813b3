"""The names of a table's rows: words, raw ids, values, or hash buckets.

A checkpoint says under `STATE_KEY` where the names of each table are: in a file of the run folder, or in the row
numbers. `vocabulary_source`, `values_source`, `IDS` and `HASHES` build these entries; `read_row_names` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from embedtrain import storage
from embedtrain.data.token_hash import hashed_rows, text_bytes
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.errors import CorruptCheckpointError, UserError
from embedtrain.schema import SchemaError, parse

STATE_KEY = "row_names"
VOCABULARY_NAME = "vocabulary.tsv"
FEATURES_NAME = "features"

Source = Mapping[str, str]
"""Says where the names of a table's rows are, as JSON."""

IDS: Source = {"encoding": "id", "noun": "id"}
"""Row numbers are raw ids."""

HASHES: Source = {"encoding": "hash", "noun": "value"}
"""Row numbers are hash buckets of values."""

_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
_FILE = re.compile(rf"[^/]+\.tsv|{FEATURES_NAME}/[^/]+\.parquet")


class Numbered(Sequence[str]):
    """A sequence of names made from row numbers on demand.

    Args:
        rows: the row numbers.
        begin: text before each number.
        end: text after each number.
    """

    def __init__(self, rows: range, begin: str = "", end: str = "") -> None:
        self._rows, self._begin, self._end = rows, begin, end

    @property
    def affixes(self) -> tuple[str, str]:
        """The texts before and after each number."""
        return self._begin, self._end

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Numbered: ...
    def __getitem__(self, index: int | slice) -> str | Numbered:
        if isinstance(index, slice):
            return Numbered(self._rows[index], self._begin, self._end)
        return f"{self._begin}{self._rows[index]}{self._end}"

    def __contains__(self, word: object) -> bool:
        return isinstance(word, str) and self._place(word) is not None

    def __eq__(self, other: object) -> bool:
        is_alike = isinstance(other, Numbered) and (self._begin, self._end) == (other._begin, other._end)
        return is_alike and self._rows == other._rows  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]

    def _place(self, word: str) -> int | None:
        if not (word.startswith(self._begin) and word.endswith(self._end)):
            return None
        number = word[len(self._begin) : len(word) - len(self._end)]
        return self._rows.index(int(number)) if _NUMBER.fullmatch(number) and int(number) in self._rows else None

    def index(self, word: str, start: int = 0, stop: int | None = None) -> int:
        """Returns the row named `word`, without a search."""
        place = self._place(word)
        if place is None:
            raise ValueError(f"no row {word!r}")
        return place


class RowsByNumber(Mapping[str, int]):
    """Maps each name of `Numbered` to its row, without a dictionary."""

    def __init__(self, names: Numbered) -> None:
        self._names = names

    def __getitem__(self, name: str) -> int:
        if name not in self._names:
            raise KeyError(name)
        return self._names.index(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, eq=False)
class RowNames:
    """Holds the names of a table's rows.

    Attributes:
        words: the names of the first rows; rows after them are never looked up.
        counts: [len(words)] int64; how often each name occurs in the data; None if unknown.
        noun: what a row stands for: "word", "user" or "value".
        find: returns the row of any text; None unless the table is hashed.
        has_others: whether row 0 stands for all values out of the vocabulary.
    """

    words: Sequence[str]
    counts: NDArray[np.int64] | None = None
    noun: str = "word"
    find: Callable[[str], int] | None = None
    has_others: bool = False

    @property
    def is_numbered(self) -> bool:
        """Whether the names are just row numbers, because the real names are unknown."""
        return isinstance(self.words, Numbered)

    @property
    def rows(self) -> Mapping[str, int]:
        """Maps each name to its row."""
        if isinstance(self.words, Numbered):
            return RowsByNumber(self.words)
        return {name: row for row, name in enumerate(self.words)}


def rows_among(names: Sequence[str] | pa.Array | pa.ChunkedArray, others: Sequence[str]) -> NDArray[np.int64]:
    """Returns [n] int64: the place of each of [n] names in a list of distinct names; -1 if it is not in the list."""
    asked = names if isinstance(names, pa.Array | pa.ChunkedArray) else pa.array(names, pa.large_string())
    found = pc.index_in(asked, value_set=pa.array(others, pa.large_string())).fill_null(-1)
    return np.asarray(found).astype(np.int64)


def of_values(values: pa.Table, *, has_others: bool, noun: str = "value") -> RowNames:
    """Returns the row names of a column with a vocabulary.

    Args:
        values: the columns `word` and `count`, in row order.
        has_others: whether row 0 stands for all values out of the vocabulary.
        noun: what a row stands for.
    """
    words: list[str] = values["word"].cast(pa.large_string()).to_pylist()
    counts = np.asarray(values["count"], np.int64)
    if has_others:
        words, counts = [_name_of_others(words), *words], np.concatenate([[0], counts])
    return RowNames(words, counts, noun, has_others=has_others)


def _name_of_others(values: Sequence[str]) -> str:
    """Returns a name for the row of values out of the vocabulary that is not itself a value."""
    name = "<unk>"
    taken = set(values) if name in values else set()
    while name in taken:
        name = f"<{name}>"
    return name


def of_hashes(num_rows: int) -> RowNames:
    """Returns the names of hash buckets: `hash:7/1000` for the values whose hash modulo 1000 is 7."""
    names = Numbered(range(num_rows), "hash:", f"/{num_rows}")

    def find(text: str) -> int:
        if text in names:
            return names.index(text)
        return int(hashed_rows(pa.array([text], pa.large_string()), num_rows)[0])

    return RowNames(names, None, "value", find)


def of_ids(num_rows: int) -> RowNames:
    """Returns the names of rows whose numbers are raw ids."""
    return RowNames(Numbered(range(num_rows)), None, "id")


def values_file(table: str) -> str:
    """Returns the name of the run folder's file that holds the values of a table's rows."""
    # A column name may contain a slash.
    return f"{FEATURES_NAME}/{table.replace('%', '%25').replace('/', '%2F')}.parquet"


def vocabulary_source(name: str, vocabulary: Vocabulary, noun: str = "word") -> Source:
    """Returns the checkpoint's entry for names in a file that `Vocabulary.save` writes."""
    return {"file": name, "noun": noun, "fingerprint": vocabulary.fingerprint}


def values_source(table: str, values: pa.Table, noun: str = "value") -> Source:
    """Returns the checkpoint's entry for names in a file that `write_values` writes."""
    return {"file": values_file(table), "noun": noun, "fingerprint": fingerprint_of(values["word"])}


def write_values(run_path: str, table: str, values: pa.Table, *, has_others: bool) -> None:
    """Writes the values of a table's rows to the run folder, as a Parquet file.

    Args:
        run_path: the run folder.
        table: its name.
        values: the columns `word` and `count`, in row order.
        has_others: see `of_values`.
    """
    first = int(has_others)
    rows = pa.array(range(first, first + len(values)), pa.int64())
    buffer = pa.BufferOutputStream()
    value = values["word"].cast(pa.large_string())
    pq.write_table(pa.table({"row": rows, "value": value, "count": values["count"]}), buffer)
    url = storage.join(run_path, values_file(table))
    storage.make_folder(url.rpartition("/")[0])
    storage.replace(url, buffer.getvalue().to_pybytes(), f"{url}.tmp")


@dataclass(frozen=True)
class TableFacts:
    """Holds what a checkpoint's state says about its tables.

    Attributes:
        export_table: the default table of exports; None if there is none.
        row_names: per table, where the names of its rows are.
    """

    export_table: str | None = None
    row_names: Mapping[str, Source] = field(default_factory=dict)


def read_table_facts(state: Mapping[str, Any], where: str) -> TableFacts:
    """Reads what the state of a checkpoint says about its tables.

    Args:
        state: state of the checkpoint.
        where: the checkpoint or its run, for messages.

    Raises:
        CorruptCheckpointError: the state is invalid.
    """
    try:
        return parse(TableFacts, dict(state))
    except SchemaError as error:
        raise CorruptCheckpointError(f"{where}: the state in its checkpoint: {error}") from error


def read_row_names(run_path: str, state: Mapping[str, Any], table: str, num_rows: int) -> RowNames:
    """Returns the names of a table's rows.

    Args:
        run_path: run folder of the checkpoint.
        state: of the checkpoint.
        table: its name.
        num_rows: its rows.

    Raises:
        UserError: the file of names is missing, unreadable, or not the file that the run was trained with.
        CorruptCheckpointError: the state's entry for the names is invalid.
    """
    said = read_table_facts(state, run_path)
    source = said.row_names.get(table)
    if source is None:
        return _of_other_runs(run_path, said.export_table, table, num_rows)
    encoding, name, noun = source.get("encoding"), source.get("file"), source.get("noun", "word")
    if encoding == "id":
        return of_ids(num_rows)
    if encoding == "hash":
        return of_hashes(num_rows)
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        raise UserError(f"{run_path}: the checkpoint says {source!r} of the names of table {table!r}, which names none")
    url = storage.join(run_path, name)
    try:
        names, fingerprint = _read_vocabulary(url, noun) if name.endswith(".tsv") else _read_values(url, noun)
    except FileNotFoundError as error:
        raise UserError(f"table {table!r} needs the file of its row names {url}, which does not exist") from error
    if len(names.words) > num_rows or source.get("fingerprint", fingerprint) != fingerprint:
        raise UserError(
            f"{url} does not hold the names that table {table!r} was trained with: {len(names.words):,} for "
            f"{num_rows:,} rows. Bring back the file of this run, or give the training command again, which writes it "
            "anew"
        )
    return names


def _of_other_runs(run_path: str, export_table: str | None, table: str, num_rows: int) -> RowNames:
    """Returns the names of a table without an entry in the checkpoint, for example of a user's own model.

    `vocabulary.tsv` names the rows of the export table, and of other tables with the same number of rows.
    """
    url = storage.join(run_path, VOCABULARY_NAME)
    try:
        names, _ = _read_vocabulary(url, "word")
    except FileNotFoundError:
        names = None
    if names is not None and len(names.words) == num_rows:
        return names
    if table == export_table:
        found = "there is none" if names is None else f"it has {len(names.words):,} words"
        raise UserError(f"table {table!r} needs {num_rows:,} words in {url}, but {found}")
    return RowNames(Numbered(range(num_rows)), None, "row")


def _read_vocabulary(url: str, noun: str) -> tuple[RowNames, str]:
    vocabulary = Vocabulary.load(url)
    return RowNames(vocabulary.words, vocabulary.counts, noun), vocabulary.fingerprint


def _read_values(url: str, noun: str) -> tuple[RowNames, str]:
    try:
        found = pq.read_table(pa.BufferReader(storage.read(url)), columns=["row", "value", "count"])
        first = found["row"][0].as_py() if len(found) else 1
        values = pa.table([found["value"], found["count"]], names=["word", "count"])
        return of_values(values, has_others=first == 1, noun=noun), fingerprint_of(found["value"])
    except (pa.ArrowException, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{url} is not a valid file of row names: {' '.join(str(error).split())}") from error


def fingerprint_of(words: pa.ChunkedArray) -> str:
    """Returns a hash of texts and their boundaries."""
    parts = [text_bytes(chunk) for chunk in words.cast(pa.large_binary()).chunks]
    digest = xxhash.xxh3_128()
    for _, lengths, _ in parts:
        digest.update(lengths.tobytes())
    for _, _, data in parts:
        digest.update(data.data)
    return digest.hexdigest()
