"""Who turned to what, and when, as files of rows say it: events, in the order of the files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedtrain.data.columns import TextRows, read_columns
from embedtrain.data.readers import AUTO, Layout
from embedtrain.data.sources import Source
from embedtrain.data.times import Times, joined, parse_numbers, parse_times
from embedtrain.errors import UserError, counted, printable

_logger = logging.getLogger(__name__)

_SHOWN_LETTERS = 40
_FORBIDDEN = ("\t", "\n", "\r")
_LINES_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Ids:
    """A column of raw ids.

    Attributes:
        names: large_string; different ids, which need not all occur.
        codes: [n] the place of each row's id among them.
    """

    names: pa.Array
    codes: NDArray[np.int32]

    @classmethod
    def read(cls, chunks: Sequence[pa.Array]) -> Ids:
        """Makes a column of chunks, each dictionary-encoded."""
        column = pa.chunked_array(chunks).unify_dictionaries()
        return cls(column.chunk(0).dictionary, np.concatenate([np.asarray(chunk.indices) for chunk in column.chunks]))

    def where(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> Ids:
        """Returns the ids of some rows; they share the names."""
        return Ids(self.names, self.codes[kept])


@dataclass(frozen=True)
class Events:
    """Events in the order of the files.

    Attributes:
        users: who.
        items: turned to what.
        times: when; None if the files do not say, or nobody asked.
    """

    users: Ids
    items: Ids
    times: Times | None = None

    def __len__(self) -> int:
        return len(self.users.codes)

    def where(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> Events:
        """Returns some events, in the order given."""
        return Events(
            self.users.where(kept), self.items.where(kept), None if self.times is None else self.times.where(kept)
        )

    def in_order(self, users: NDArray[np.int64] | NDArray[np.int32]) -> NDArray[np.int64]:
        """Returns the places [n] of the events user by user, each user's by time; of equal times the first comes first.

        Args:
            users: [n]; a number for the user of each event. Users come in ascending order of their numbers.
        """
        if self.times is None:
            return np.argsort(users, kind="stable")
        return np.lexsort((self.times.values, users))

    def write(self, path: str) -> None:
        """Writes a TSV of the columns `user`, `item` and, if there are times, `time`, in the order of the files."""
        with open(path, "wb") as file:
            file.write(b"user\titem\n" if self.times is None else b"user\titem\ttime\n")
            for start in range(0, len(self), _LINES_AT_ONCE):
                part = self.where(np.arange(start, min(start + _LINES_AT_ONCE, len(self))))
                columns = [part.users.names.take(pa.array(part.users.codes))]
                columns.append(part.items.names.take(pa.array(part.items.codes)))
                if part.times is not None:
                    columns.append(part.times.texts())
                lines = pc.binary_join_element_wise(*columns, pa.scalar("\t", pa.large_string())).to_pylist()
                file.write("".join(f"{line}\n" for line in lines).encode())


@dataclass(frozen=True, kw_only=True)
class EventFiles:
    """How files of events are read.

    Attributes:
        format: as in `read_columns`.
        layout: of lines of text, as in `read_columns`.
        user_column: name of the column of users; of no meaning in lines.
        item_column: name of the column of items.
        rating_column: name of the column of ratings; None if every event counts.
        min_rating: events with a lower rating are left out; of no meaning without ratings.
        time_column: name of the column of times; None if events are in the order of the files.
    """

    format: str = AUTO
    layout: Layout = field(default_factory=Layout)
    user_column: str = "user"
    item_column: str = "item"
    rating_column: str | None = None
    min_rating: float = 0.0
    time_column: str | None = None


_KEYS = ("data.user_column", "data.item_column")


def read_events(sources: Sequence[Source], files: EventFiles) -> Events:
    """Reads events whole, without those of a low rating.

    Raises:
        UserError: as `read_columns`, a row holds no id, rating or time, or there is no row left.
    """
    pairs, times, num_low = _Pairs(files.user_column, files.item_column), list[Times](), 0
    for rows in _rows_of(sources, files):
        found = dict(zip(_names_of(files), rows.columns, strict=True))
        is_kept = None
        if files.rating_column is not None:
            ratings = parse_numbers(found[files.rating_column], files.rating_column, rows.place)
            is_kept = ratings >= files.min_rating
            num_low += int((~is_kept).sum())
        if files.time_column is not None:
            when = parse_times(found[files.time_column], files.time_column, rows.place)
            if times and when.noun != times[0].noun:
                raise UserError(
                    f"{rows.place(0)}: column {files.time_column!r} holds {when.noun} from here on, and "
                    f"{times[0].noun} before"
                )
            times.append(when if is_kept is None else when.where(is_kept))
        pairs.add(rows, found, is_kept)
    if num_low:
        told = f"a {files.rating_column} below {files.min_rating:g}"
        if not pairs.num_rows:
            raise UserError(f"every interaction has {told}, and data.min_rating={files.min_rating:g} leaves none")
        _logger.info(f"left out {counted(num_low, 'interaction')} with {told}")
    users, items = pairs.whole(sources)
    return Events(users, items, joined(times) if times else None)


def read_pairs(
    sources: Sequence[Source], names: tuple[str, str], format: str, layout: Layout, keys: tuple[str, str] = _KEYS
) -> tuple[Ids, Ids]:
    """Reads two columns of ids whole.

    Args:
        sources: the files.
        names: of the columns; of no meaning in lines.
        format, layout: as in `read_columns`.
        keys: the settings that name the columns.

    Raises:
        UserError: as `read_columns`, or a row holds no id, or there is no row.
    """
    pairs = _Pairs(*names)
    for rows in read_columns(sources, names, format, layout, keys=dict(zip(names, keys, strict=True))):
        pairs.add(rows, dict(zip(names, rows.columns, strict=True)), None)
    return pairs.whole(sources)


def _names_of(files: EventFiles) -> list[str]:
    names = [files.user_column, files.item_column, files.rating_column, files.time_column]
    return list(dict.fromkeys(name for name in names if name is not None))


def _rows_of(sources: Sequence[Source], files: EventFiles) -> Iterator[TextRows]:
    if files.user_column == files.item_column:
        raise UserError(f"{_KEYS[0]} and {_KEYS[1]} both name the column {files.user_column!r}")
    keys = {files.user_column: _KEYS[0], files.item_column: _KEYS[1]}
    numbers = {"data.rating_column": files.rating_column, "data.time_column": files.time_column}
    for key, name in numbers.items():
        if name in keys:
            raise UserError(f"{key}={name} names the column of ids that {keys[name]} names too")
    keys.update({name: key for key, name in numbers.items() if name is not None})
    numbered = [name for name in numbers.values() if name is not None]
    return read_columns(sources, _names_of(files), files.format, files.layout, keys=keys, numbers=numbered)


class _Pairs:
    """Two columns of ids, read block by block; each is dictionary-encoded at once, so that no text is held twice."""

    def __init__(self, user: str, item: str) -> None:
        self._names = user, item
        self._chunks: tuple[list[pa.Array], list[pa.Array]] = ([], [])
        self.num_rows = 0

    def add(self, rows: TextRows, found: dict[str, pa.Array], is_kept: NDArray[np.bool_] | None) -> None:
        for name, chunks in zip(self._names, self._chunks, strict=True):
            column = found[name]
            if not pa.types.is_large_string(column.type):
                raise UserError(f"{rows.place(0)}: column {name!r} holds lists: expected one id per row")
            is_missing = pc.equal(column, "").fill_null(True)
            if pc.any(is_missing).as_py():
                row = int(np.flatnonzero(np.asarray(is_missing))[0])
                raise UserError(f"{rows.place(row)}: column {name!r} holds no id")
            chunks.append((column if is_kept is None else column.filter(pa.array(is_kept))).dictionary_encode())
        self.num_rows += len(self._chunks[0][-1])

    def whole(self, sources: Sequence[Source]) -> tuple[Ids, Ids]:
        if self.num_rows == 0:
            raise UserError(f"{', '.join(source.url for source in sources)}: there are no interactions")
        users, items = map(Ids.read, self._chunks)
        told = ", ".join(_busiest(ids, name) for ids, name in zip((users, items), self._names, strict=True))
        _logger.info(f"read {self.num_rows:,} interactions: {told}")
        return users, items


def _busiest(ids: Ids, name: str) -> str:
    """Says how many ids a column has, which of them is in the most rows, and in how many."""
    counts = np.bincount(ids.codes, minlength=len(ids.names))
    most = int(counts.argmax())
    busiest = printable(ids.names[most].as_py()[:_SHOWN_LETTERS])
    return f"{counted(len(counts), 'id')} of {name} ({busiest} has the most: {int(counts[most]):,})"


def refuse_line_ends(ids: Ids, name: str) -> None:
    """Refuses ids that a line of a vocabulary's file cannot hold.

    Raises:
        UserError: an id holds a tab or a line end.
    """
    for forbidden in _FORBIDDEN:
        found = np.flatnonzero(np.asarray(pc.match_substring(ids.names, forbidden)))
        if len(found):
            raise UserError(
                f"the {name} id {ids.names[int(found[0])].as_py()!r} holds a tab or a line end, and no id may"
            )
