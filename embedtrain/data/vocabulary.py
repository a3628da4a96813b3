"""Vocabularies: the words of a text with their counts; a word's row is its place in the list."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from embedtrain import storage
from embedtrain.errors import UserError

COUNTS_SCHEMA = pa.schema([("word", pa.large_binary()), ("count", pa.int64())])
_MERGE_ROWS = 1 << 20
_COUNT = re.compile(r"[+-]?[0-9]{1,40}")
_MAX_TOTAL = 1 << 62
"""Bounds counts so that adding those of a base vocabulary does not overflow 64 bits."""


class WordCounts:
    """Counts words, in memory proportional to the number of distinct words."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._rows_after_merge = 0

    def add(self, words: pa.LargeBinaryArray) -> None:
        """Counts each of [n] words once."""
        values, counts = pc.value_counts(words).flatten()
        self.merge(pa.table([values, counts], schema=COUNTS_SCHEMA))

    def merge(self, counts: pa.Table) -> None:
        """Adds other counts: `COUNTS_SCHEMA`, each word once."""
        self._tables.append(counts)
        if sum(map(len, self._tables)) > 2 * self._rows_after_merge + _MERGE_ROWS:
            self._rows_after_merge = len(self.table())

    def table(self) -> pa.Table:
        """Returns the counts so far: `COUNTS_SCHEMA`, each word once, in no particular order."""
        tables = [table for table in self._tables if len(table)]
        if len(tables) > 1:
            tables = [_sums(pa.concat_tables(tables))]
        self._tables = tables or [COUNTS_SCHEMA.empty_table()]
        return self._tables[0]


def ordered(counts: pa.Table) -> pa.Table:
    """Sorts counts of `COUNTS_SCHEMA` by descending count, ties by word."""
    # UTF-8 bytes sort like code points, independently of the locale.
    return counts.sort_by([("count", "descending"), ("word", "ascending")])


def _sums(counts: pa.Table) -> pa.Table:
    """Adds up the counts per word; needs at least one row."""
    # Table.group_by is ten times slower: it has no fast path for large_binary keys.
    encoded = counts["word"].dictionary_encode()
    codes = np.concatenate([np.asarray(chunk.indices) for chunk in encoded.chunks])
    words = encoded.chunk(0).dictionary  # All chunks share one dictionary.
    sums = np.zeros(len(words), np.int64)
    np.add.at(sums, codes, np.asarray(counts["count"]))
    return pa.table([words, pa.array(sums)], schema=COUNTS_SCHEMA)


class WordRows:
    """Maps words to rows, which are their places in a list of distinct words.

    Args:
        words: the list; the first word has row 0.
    """

    def __init__(self, words: pa.LargeBinaryArray) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def of(self, words: pa.LargeBinaryArray) -> NDArray[np.int32]:
        """Returns [n] int32: the rows of [n] words; -1 for unknown words."""
        if len(self) <= len(words):
            rows: NDArray[np.int32] = np.asarray(pc.index_in(words, value_set=self.words).fill_null(-1))
            return rows
        # A dictionary hashes the list once; Arrow's index_in would hash it on every call.
        distinct = words.dictionary_encode()
        values = distinct.dictionary.to_pylist()
        rows_of_values = np.fromiter(map(self._rows.get, values, repeat(-1)), np.int32, len(values))
        rows = rows_of_values[np.asarray(distinct.indices)]
        return rows

    @cached_property
    def _rows(self) -> dict[bytes, int]:
        return {word: row for row, word in enumerate(self.words.to_pylist())}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Holds words by descending count, ties by code points.

    Attributes:
        words: [num_words]; a word's place is its row.
        counts: [num_words] int64.
    """

    words: list[str]
    counts: NDArray[np.int64]

    @classmethod
    def build(cls, counts: pa.Table, min_count: int, max_size: int | None) -> Vocabulary:
        """Returns the vocabulary of the `max_size` most frequent words seen at least `min_count` times.

        Args:
            counts: `COUNTS_SCHEMA`; each word once, any order.

        Raises:
            UserError: no word remains.
        """
        kept = ordered(counts.filter(pc.greater_equal(counts["count"], min_count))).slice(0, max_size)
        if len(counts) == 0:
            raise UserError("the vocabulary is empty: the text holds no words")
        if len(kept) == 0:
            first = ordered(counts).slice(0, 1)
            word, count = first["word"][0].as_py().decode(), first["count"][0].as_py()
            raise UserError(
                f"the vocabulary is empty: {len(counts)} distinct words were seen, the most frequent "
                f"({word!r}) {count} times, and min_count is {min_count}"
            )
        words = kept["word"].cast(pa.large_string()).to_pylist()
        return cls(words, kept["count"].to_numpy())

    def extended(self, counts: pa.Table, min_count: int, max_size: int | None, *, takes_new: bool = True) -> Vocabulary:
        """Returns a vocabulary of these words and the new words that `build` would keep, with added counts.

        Args:
            counts: see `build`; counts of existing words are always added.
            min_count: minimum count of new words.
            max_size: new words are added only while the vocabulary is smaller.
            takes_new: whether to add new words.

        Raises:
            UserError: `counts` is empty.
        """
        if len(counts) == 0:
            raise UserError("the text holds no words")
        words = self.utf8_words
        is_here = pc.is_in(counts["word"], value_set=words)
        new = ordered(counts.filter(pc.and_not(pc.greater_equal(counts["count"], min_count), is_here)))
        both = WordCounts()
        both.merge(self.as_table())
        both.merge(counts.filter(is_here))
        if takes_new:
            both.merge(new.slice(0, None if max_size is None else max(0, max_size - len(self))))
        return Vocabulary.build(both.table(), 0, None)

    @classmethod
    def load(cls, path: str) -> Vocabulary:
        """Reads a vocabulary that `save` wrote.

        Raises:
            UserError: a line is not `word<TAB>count`.
        """
        try:
            lines = storage.read(path).decode().removesuffix("\n").split("\n")
        except FileNotFoundError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a valid vocabulary: {error}") from error
        try:
            pairs = [line.split("\t") for line in lines]
            return cls([word for word, _ in pairs], np.array([int(count) for _, count in pairs], np.int64))
        except (ValueError, OverflowError) as error:
            raise UserError(f"{path} is not a vocabulary: expected lines of word, tab, count") from error

    @classmethod
    def load_base(cls, path: str, key: str = "data.base_vocabulary") -> Vocabulary:
        """Reads the vocabulary of a setting, which another program may have written.

        Args:
            path: the file; a byte-order mark at its beginning and CR at line ends are ignored.
            key: the setting that names it, for messages.

        Raises:
            UserError: the file does not exist, a line is not a word and a count, a count is not a positive integer, the
                sum of the counts exceeds 2^62, or a word occurs twice.
        """
        try:
            text = storage.read(path).decode("utf-8-sig")
        except FileNotFoundError as error:
            raise UserError(f"{key}: there is no file {path}: expected lines of word, tab, count") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}: {path} is not a valid vocabulary: {error}") from error
        counts: dict[str, int] = {}
        total = 0
        for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
            word, tab, count = line.removesuffix("\r").rpartition("\t")
            where = f"{key}: {path}, line {number}"
            if not word or not tab or not _COUNT.fullmatch(count) or "\t" in word:
                raise UserError(f"{where}: expected a word, a tab and a count, got {line[:80]!r}")
            total += int(count)
            if int(count) < 1 or total > _MAX_TOTAL:
                raise UserError(
                    f"{where}: expected a count from 1 on, and all counts together at most {_MAX_TOTAL:,}, got {count}"
                )
            if word in counts:
                raise UserError(f"{where}: the word {word!r} stands on an earlier line too")
            counts[word] = int(count)
        return cls(list(counts), np.array(list(counts.values()), np.int64))

    def save(self, path: str) -> None:
        """Writes `word<TAB>count` lines in UTF-8, in row order, atomically, to any fsspec URL."""
        storage.replace(path, self._content(), f"{path}.tmp")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the words and counts."""
        return xxhash.xxh3_128_hexdigest(self._content())

    def row_of(self, word: str) -> int | None:
        """Returns the row of a word, or None."""
        return self.rows.get(word)

    def rows_of(self, words: Iterable[str]) -> NDArray[np.int64]:
        """Returns [n] int64: the rows of [n] words; -1 for unknown words."""
        return np.array([self.rows.get(word, -1) for word in words], np.int64)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Maps words to rows."""
        return {word: row for row, word in enumerate(self.words)}

    @property
    def utf8_words(self) -> pa.LargeBinaryArray:
        """The words as [num_words] large_binary."""
        return pa.array(self.words, pa.large_string()).cast(pa.large_binary())

    def as_table(self) -> pa.Table:
        """Returns words and counts in row order: `COUNTS_SCHEMA`."""
        return pa.table([self.utf8_words, pa.array(self.counts, pa.int64())], schema=COUNTS_SCHEMA)

    def _content(self) -> bytes:
        return "".join(map("{}\t{}\n".format, self.words, self.counts.tolist())).encode()
