"""What the rows of a table stand for: words, raw ids, values, or the values of a hash. Rows have no names but these.

A checkpoint says under `STATE_KEY` where the names of each table are: in a file of its run folder, or in the numbers of
its rows. `vocabulary_source`, `values_source`, `IDS` and `HASHES` make what it says, `read_row_names` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa
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
"""Where the names of a table's rows are, as JSON."""

IDS: Source = {"encoding": "id", "noun": "id"}
"""The row is the id itself."""

HASHES: Source = {"encoding": "hash", "noun": "value"}
"""The row is the hash of a value."""

_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
_FILE = re.compile(rf"[^/]+\.tsv|{FEATURES_NAME}/[^/]+\.parquet")


class Numbered(Sequence[str]):
    """The names of rows that are called by their numbers, made when they are asked for.

    Args:
        rows: the rows.
        begin: what stands before each number.
        end: what stands after it.
    """

    def __init__(self, rows: range, begin: str = "", end: str = "") -> None:
        self._rows, self._begin, self._end = rows, begin, end

    @property
    def affixes(self) -> tuple[str, str]:
        """What stands before each number, and after it."""
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
        """Returns the row called `word`, without a search."""
        place = self._place(word)
        if place is None:
            raise ValueError(f"no row {word!r}")
        return place


class RowsByNumber(Mapping[str, int]):
    """The row of each name of `Numbered`, without a dictionary."""

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
    """The names of a table's rows.

    Attributes:
        words: the name of each row, from the first on; further rows are never looked up.
        counts: [len(words)] int64, how often each occurs in the data; None if nobody counted.
        noun: what a row stands for: a word, a user, a value.
        find: returns the row of a text that need not be among `words`; None if only these have rows.
        has_others: whether row 0 stands for all values that have none of their own, whatever it is called.
    """

    words: Sequence[str]
    counts: NDArray[np.int64] | None = None
    noun: str = "word"
    find: Callable[[str], int] | None = None
    has_others: bool = False

    @property
    def is_numbered(self) -> bool:
        """Whether the rows are called by their numbers: nothing says whose they are."""
        return isinstance(self.words, Numbered)

    @property
    def rows(self) -> Mapping[str, int]:
        """The row of each name."""
        if isinstance(self.words, Numbered):
            return RowsByNumber(self.words)
        return {name: row for row, name in enumerate(self.words)}


def of_values(values: pa.Table, *, has_others: bool, noun: str = "value") -> RowNames:
    """Returns the names of rows that stand for the values of a column.

    Args:
        values: the columns `word` and `count`, in the order of the rows.
        has_others: whether row 0 stands for all values that have none of their own.
        noun: what a row stands for.
    """
    words: list[str] = values["word"].cast(pa.large_string()).to_pylist()
    counts = np.asarray(values["count"], np.int64)
    if has_others:
        words, counts = [_name_of_others(words), *words], np.concatenate([[0], counts])
    return RowNames(words, counts, noun, has_others=has_others)


def _name_of_others(values: Sequence[str]) -> str:
    """Returns the name of the row of all other values, as other programs call it unless a value is called so."""
    name = "<unk>"
    taken = set(values) if name in values else set()
    while name in taken:
        name = f"<{name}>"
    return name


def of_hashes(num_rows: int) -> RowNames:
    """Returns the names of rows that stand for hashes: `hash:7/1000` for the values whose hash modulo 1000 is 7."""
    names = Numbered(range(num_rows), "hash:", f"/{num_rows}")

    def find(text: str) -> int:
        if text in names:
            return names.index(text)
        return int(hashed_rows(pa.array([text], pa.large_string()), num_rows)[0])

    return RowNames(names, None, "value", find)


def of_ids(num_rows: int) -> RowNames:
    """Returns the names of rows that are the ids themselves."""
    return RowNames(Numbered(range(num_rows)), None, "id")


def values_file(table: str) -> str:
    """Returns the name of the file in a run folder that says which value each row of a table stands for."""
    # The name of a column may hold a slash.
    return f"{FEATURES_NAME}/{table.replace('%', '%25').replace('/', '%2F')}.parquet"


def vocabulary_source(name: str, vocabulary: Vocabulary, noun: str = "word") -> Source:
    """Returns what a checkpoint says of names in a file of the run folder that `Vocabulary.save` writes."""
    return {"file": name, "noun": noun, "fingerprint": vocabulary.fingerprint}


def values_source(table: str, values: pa.Table, noun: str = "value") -> Source:
    """Returns what a checkpoint says of names in a file of the run folder that `write_values` writes."""
    return {"file": values_file(table), "noun": noun, "fingerprint": _fingerprint(values["word"])}


def write_values(run_path: str, table: str, values: pa.Table, *, has_others: bool) -> None:
    """Writes which value each row of a table stands for to the run folder, as a Parquet file.

    Args:
        run_path: the run folder.
        table: its name.
        values: the columns `word` and `count`, in the order of the rows.
        has_others: as in `of_values`.
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
    """What a checkpoint's state says of its tables, if it says anything.

    Attributes:
        export_table: the table that holds the vectors; None if no table is the one.
        row_names: by table, where the names of its rows are.
    """

    export_table: str | None = None
    row_names: Mapping[str, Source] = field(default_factory=dict)


def read_table_facts(state: Mapping[str, Any], where: str) -> TableFacts:
    """Returns what the state of a checkpoint says of its tables.

    Args:
        state: of the checkpoint.
        where: the checkpoint or its run, for messages.

    Raises:
        CorruptCheckpointError: it says something else.
    """
    try:
        return parse(TableFacts, dict(state))
    except SchemaError as error:
        raise CorruptCheckpointError(f"{where}: the state in its checkpoint: {error}") from error


def read_row_names(run_path: str, state: Mapping[str, Any], table: str, num_rows: int) -> RowNames:
    """Returns the names of a table's rows.

    Args:
        run_path: the run folder that the checkpoint lies in.
        state: of the checkpoint.
        table: its name.
        num_rows: its rows.

    Raises:
        UserError: the file of names is missing, cannot be read, or is not the one that the run was trained with.
        CorruptCheckpointError: the state is not one that says where names are.
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
        raise UserError(f"table {table!r} needs the names of its rows in {url}, but there is none") from error
    if len(names.words) > num_rows or source.get("fingerprint", fingerprint) != fingerprint:
        raise UserError(
            f"{url} does not hold the names that table {table!r} was trained with: {len(names.words):,} for "
            f"{num_rows:,} rows. Bring back the file of this run, or give the training command again, which writes it "
            "anew"
        )
    return names


def _of_other_runs(run_path: str, export_table: str | None, table: str, num_rows: int) -> RowNames:
    """Returns the names of a table of which the checkpoint says nothing, such as that of a model of the user's own.

    `vocabulary.tsv` names the rows of the table that the checkpoint exports, and those of tables as long as it.
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
        return of_values(values, has_others=first == 1, noun=noun), _fingerprint(found["value"])
    except (pa.ArrowException, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{url} cannot be read as the names of rows: {' '.join(str(error).split())}") from error


def _fingerprint(words: pa.ChunkedArray) -> str:
    """Returns a hash of texts and of where each ends."""
    parts = [text_bytes(chunk) for chunk in words.cast(pa.large_binary()).chunks]
    digest = xxhash.xxh3_128()
    for _, lengths, _ in parts:
        digest.update(lengths.tobytes())
    for _, _, data in parts:
        digest.update(data.data)
    return digest.hexdigest()
