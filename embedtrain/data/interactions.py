"""Users, items and who turned to what: raw ids become rows once, and everything else is rows from there on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from embedtrain import storage
from embedtrain.data.bags import Bags
from embedtrain.data.columns import read_columns
from embedtrain.data.prepared import META_NAME, prepared_entry, read_contents
from embedtrain.data.readers import AUTO, Layout, suffixes_of
from embedtrain.data.seal import Unverified
from embedtrain.data.sources import Source, take_sources
from embedtrain.data.vocabulary import COUNTS_SCHEMA, Vocabulary
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import UserError, counted, printable
from embedtrain.schema import Count

_logger = logging.getLogger(__name__)

USERS_NAME, ITEMS_NAME = "users.tsv", "items.tsv"
"""Files of the raw ids by row."""

_FORMAT_VERSION = 3
_SHOWN_LETTERS = 40
_FORBIDDEN = ("\t", "\n", "\r")


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


@dataclass(frozen=True, kw_only=True)
class InteractionOptions:
    """What to train on.

    Attributes:
        path: the interactions, as `expand_sources` takes them.
        format: as in `read_columns`.
        layout: of lines of text, as in `read_columns`.
        user_column: name of the column of users; of no meaning in lines.
        item_column: name of the column of items.
        held_out_path: interactions to measure on, in the same format; None for none.
        users: features of the users.
        items: features of the items.
        takes_new: whether users, items and categories get rows that are in no base; otherwise they are left out.
    """

    path: str | Sequence[str]
    format: str = AUTO
    layout: Layout = field(default_factory=Layout)
    user_column: str = "user"
    item_column: str = "item"
    held_out_path: str | Sequence[str] | None = None
    users: SideOptions = field(default_factory=SideOptions)
    items: SideOptions = field(default_factory=SideOptions)
    takes_new: bool = True


@dataclass(frozen=True)
class _Meta:
    """What `prepare_interactions` says of an entry in its table of contents."""

    fingerprint: str
    num_interactions: Count
    sources: list[str]
    left_out: dict[str, int]
    features: dict[str, dict[str, Count]]


class Interactions:
    """Prepared interactions; opened from the folder that `prepare_interactions` made.

    A user's or an item's row is its place by number of interactions, the most first.

    Args:
        path: the folder, on a local file system.
        unverified: see `prepared_entry`.
        names_path: of the folder with the raw ids, on any file system; None if they lie with the rest.

    Attributes:
        num_interactions: distinct pairs of user and item.
        fingerprint: a hash of the pairs, of the ids and of the features.
        source_identities: of the files with the interactions; see `Source.identity`.
        left_out: what of the held-out data and features cannot be used, in numbers: see `meta.json`.

    Raises:
        ValueError: the table of contents is not one.
    """

    def __init__(self, path: str, unverified: Unverified = (), names_path: str | None = None) -> None:
        self.path = path
        self.unverified = unverified
        self._names_path = names_path or path
        self._meta = read_contents(path, _Meta)
        self.fingerprint = self._meta.fingerprint
        self.num_interactions = self._meta.num_interactions
        self.source_identities = self._meta.sources
        self.left_out = self._meta.left_out

    @cached_property
    def users(self) -> Vocabulary:
        """The raw id and the number of interactions of each user's row."""
        return Vocabulary.load(storage.join(self._names_path, USERS_NAME))

    @cached_property
    def items(self) -> Vocabulary:
        """The raw id and the number of interactions of each item's row."""
        return Vocabulary.load(storage.join(self._names_path, ITEMS_NAME))

    @cached_property
    def known(self) -> Bags:
        """The items of each user, ascending."""
        return Bags.load(os.path.join(self.path, "known"))

    @cached_property
    def held_out(self) -> Bags:
        """The held-out items of each user; -1 for an item that nobody turned to in training. Empty without any."""
        return Bags.load(os.path.join(self.path, "held-out"))

    def features(self, side: str) -> dict[str, tuple[Bags, int]]:
        """Returns, by name, the categories of each row of "users" or "items", and how many categories there are."""
        return {
            name: (Bags.load(os.path.join(self.path, f"{side}-{number}")), num_categories)
            for number, (name, num_categories) in enumerate(self._meta.features[side].items())
        }

    def categories(self, side: str) -> dict[str, pa.Table]:
        """Returns, by name, the categories of "users" or "items" in the order of their rows, with their counts."""
        return {
            name: pq.read_table(os.path.join(self.path, f"{side}-{number}.parquet"))
            for number, name in enumerate(self._meta.features[side])
        }


def prepare_interactions(options: InteractionOptions, cache_path: str, ranks: Ranks) -> Interactions:
    """Returns the prepared form of interactions, which rank 0 makes unless the cache holds it.

    The interactions pass through rank 0's memory: about 20 bytes each, and the ids.

    Collective: every rank, with the same arguments.

    Raises:
        UserError: on every rank; a file or column is missing or unreadable, holds no id, or nothing at all.
    """
    # Each path is listed once, so that the entry is named by the files that are read. Only rank 0 reads them.
    listed: list[_Listed] = []

    def list_and_name() -> str:
        listed.append(_list_files(options))
        return _entry_name(options, listed[0])

    name = ranks.run_on_first(list_and_name)

    def prepare(work_path: str) -> None:
        ranks.run_on_first(lambda: _write(options, listed[0], work_path))

    return prepared_entry(cache_path, name, Interactions, prepare, ranks)


@dataclass(frozen=True)
class _Listed:
    """The files of each path of `InteractionOptions`, none if the path is None."""

    interactions: list[Source]
    held_out: list[Source]
    users: list[Source]
    users_base: list[Source]
    items: list[Source]
    items_base: list[Source]
    categories_base: list[Source]


def _list_files(options: InteractionOptions) -> _Listed:
    of_data = suffixes_of(options.format)
    paths = [(options.path, of_data), (options.held_out_path, of_data)]
    for side in (options.users, options.items):
        paths += [(side.path, suffixes_of(side.format)), (side.base_vocabulary, ())]
    categories = [path for side in (options.users, options.items) for path in side.base_categories.values()]
    paths.append((categories or None, ()))
    return _Listed(*([] if path is None else take_sources(path, suffixes) for path, suffixes in paths))


def _entry_name(options: InteractionOptions, listed: _Listed) -> str:
    sources = [[source.identity for source in files] for files in vars(listed).values() if files]
    named = asdict(options)
    # Entries of before there were these options keep their names.
    if options.takes_new:
        del named["takes_new"]
    for side in ("users", "items"):
        if not named[side]["base_categories"]:
            del named[side]["base_categories"]
    facts = json.dumps([_FORMAT_VERSION, sources, named], default=list)
    return f"interactions-{xxhash.xxh3_64_hexdigest(facts.encode())}"


def _write(options: InteractionOptions, listed: _Listed, path: str) -> None:
    sources = listed.interactions
    bases = [
        None if side.base_vocabulary is None else Vocabulary.load_base(side.base_vocabulary, f"{name}.base_vocabulary")
        for name, side in (("users", options.users), ("items", options.items))
    ]
    pairs = read_pairs(sources, (options.user_column, options.item_column), options.format, options.layout)
    sides = ("user", options.users), ("item", options.items)
    vocabularies: list[Vocabulary] = []
    rows: list[NDArray[np.int64]] = []
    for (name, _), base, column in zip(sides, bases, pairs, strict=True):
        _refuse_line_ends(column, name)
        vocabulary, column_rows = _number(column, base, options.takes_new)
        vocabularies.append(vocabulary)
        rows.append(column_rows)
    users, items = vocabularies
    has_rows = _have_rows(rows[0], rows[1], options)
    known = _distinct_pairs(rows[0][has_rows], rows[1][has_rows], len(users), len(items))
    num_repeated = int(has_rows.sum()) - len(known.values)
    counted = [np.bincount(known.rows(), minlength=len(users)), np.bincount(known.values, minlength=len(items))]
    # Rows stand in the order of all occurrences; the counts that are kept are those of distinct pairs.
    for place, base in enumerate(bases):
        if base is not None:
            counted[place][vocabularies[place].rows_of(base.words)] += base.counts
    vocabularies = [Vocabulary(v.words, count) for v, count in zip(vocabularies, counted, strict=True)]
    left_out = {"repeated_interactions": num_repeated}
    if not options.takes_new:
        left_out["interactions_of_new_users_or_items"] = int((~has_rows).sum())
    users, items = vocabularies
    held_out = _held_out(options, listed.held_out, users, items, left_out)
    known.save(os.path.join(path, "known"))
    held_out.save(os.path.join(path, "held-out"))
    users.save(os.path.join(path, USERS_NAME))
    items.save(os.path.join(path, ITEMS_NAME))
    parts = [known.fingerprint, users.fingerprint, items.fingerprint]
    features: dict[str, dict[str, int]] = {}
    for side, side_options, files, vocabulary in (
        ("users", options.users, listed.users, users),
        ("items", options.items, listed.items, items),
    ):
        features[side] = {}
        found = _read_features(side_options, files, vocabulary, left_out, side, options.takes_new)
        for number, (name, bags, categories) in enumerate(found):
            bags.save(os.path.join(path, f"{side}-{number}"))
            pq.write_table(categories.as_table(), os.path.join(path, f"{side}-{number}.parquet"))
            features[side][name] = len(categories)
            parts += [name, bags.fingerprint]
    meta = {
        "format_version": _FORMAT_VERSION,
        "fingerprint": xxhash.xxh3_128_hexdigest(json.dumps(parts).encode()),
        "sources": [source.identity for source in sources],
        "num_interactions": len(known.values),
        "features": features,
        "left_out": left_out,
        "options": asdict(options),
    }
    with open(os.path.join(path, META_NAME), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1, default=list)


def _have_rows(users: NDArray[np.int64], items: NDArray[np.int64], options: InteractionOptions) -> NDArray[np.bool_]:
    """Returns which interactions are of a user and an item with a row: all, unless new ones get none."""
    has_rows: NDArray[np.bool_] = (users >= 0) & (items >= 0)
    if not has_rows.any():
        raise UserError(f"{options.path}: no interaction is of a user and an item that have rows already")
    return has_rows


def read_pairs(
    sources: Sequence[Source],
    names: tuple[str, str],
    format: str,
    layout: Layout,
    keys: tuple[str, str] = ("data.user_column", "data.item_column"),
) -> list[pa.ChunkedArray]:
    """Reads two columns of ids whole; each comes as dictionary-encoded chunks that share one dictionary.

    Args:
        sources: the files.
        names: of the columns; of no meaning in lines.
        format, layout: as in `read_columns`.
        keys: the settings that name the columns.

    Raises:
        UserError: as `read_columns`, or a row holds no id, or there is no row.
    """
    chunks: list[list[pa.Array]] = [[], []]
    for rows in read_columns(sources, names, format, layout, keys=dict(zip(names, keys, strict=True))):
        for name, column, found in zip(names, rows.columns, chunks, strict=True):
            if not pa.types.is_large_string(column.type):
                raise UserError(f"{rows.place(0)}: column {name!r} holds lists: expected one id per row")
            is_missing = pc.equal(column, "").fill_null(True)
            if pc.any(is_missing).as_py():
                row = int(np.flatnonzero(np.asarray(is_missing))[0])
                raise UserError(f"{rows.place(row)}: column {name!r} holds no id")
            found.append(column.dictionary_encode())
    num_rows = sum(map(len, chunks[0]))
    if num_rows == 0:
        raise UserError(f"{', '.join(source.url for source in sources)}: there are no interactions")
    columns = [pa.chunked_array(found).unify_dictionaries() for found in chunks]
    _logger.info(f"read {num_rows:,} interactions: {', '.join(map(_busiest, columns, names))}")
    return columns


def _busiest(column: pa.ChunkedArray, name: str) -> str:
    """Says how many ids a column has, and how many rows the one with the most."""
    counts = np.zeros(len(column.chunk(0).dictionary), np.int64)
    for chunk in column.chunks:
        counts += np.bincount(np.asarray(chunk.indices), minlength=len(counts))
    most = int(counts.argmax())
    busiest = printable(column.chunk(0).dictionary[most].as_py()[:_SHOWN_LETTERS])
    return f"{counted(len(counts), 'id')} of {name} ({busiest} has the most: {int(counts[most]):,})"


def _refuse_line_ends(column: pa.ChunkedArray, name: str) -> None:
    """Refuses ids that a line of a vocabulary's file cannot hold."""
    ids = column.chunk(0).dictionary
    for forbidden in _FORBIDDEN:
        found = np.flatnonzero(np.asarray(pc.match_substring(ids, forbidden)))
        if len(found):
            raise UserError(f"the {name} id {ids[int(found[0])].as_py()!r} holds a tab or a line end, which none may")


def _number(
    column: pa.ChunkedArray, base: Vocabulary | None = None, takes_new: bool = True
) -> tuple[Vocabulary, NDArray[np.int64]]:
    """Gives each distinct id a row, the most frequent first; returns the ids by row, and the column in rows.

    The ids of `base` have a row too, and count as often as it says besides. Without `takes_new` no others have one, and
    -1 stands for them.
    """
    ids = column.chunk(0).dictionary
    codes = np.concatenate([np.asarray(chunk.indices) for chunk in column.chunks])
    counts = np.bincount(codes, minlength=len(ids))
    table = pa.table([ids.cast(pa.large_binary()), pa.array(counts, pa.int64())], schema=COUNTS_SCHEMA)
    # A dictionary may hold words that no row has.
    vocabulary = Vocabulary.build(table, 1, None) if base is None else base.extended(table, 1, None if takes_new else 0)
    row_of_code = np.asarray(pc.index_in(ids, pa.array(vocabulary.words, pa.large_string())).fill_null(-1))
    return vocabulary, row_of_code.astype(np.int64)[codes]


def _distinct_pairs(users: NDArray[np.int64], items: NDArray[np.int64], num_users: int, num_items: int) -> Bags:
    # A sort takes a tenth of the time of np.unique, which hashes.
    keys = np.sort(users * num_items + items)
    keys = keys[np.diff(keys, prepend=-1) > 0]
    return Bags.from_rows(keys // num_items, keys % num_items, num_users)


def read_held_out(options: InteractionOptions, interactions: Interactions) -> Bags:
    """Returns the items that other files hold of each known user, and logs what is left out, and how often.

    Args:
        options: `held_out_path` names the files; the other paths are not read.
        interactions: those of the training.

    Raises:
        UserError: a file cannot be used, or has no user of the training.
    """
    assert options.held_out_path is not None
    sources, left_out = take_sources(options.held_out_path, suffixes_of(options.format)), dict[str, int]()
    found = _held_out(options, sources, interactions.users, interactions.items, left_out)
    for what, number in left_out.items():
        if number:
            _logger.warning(f"{number:,} {what.replace('_', ' ')}")
    if not len(found.values):
        raise UserError(
            f"{options.held_out_path}: there is no user of the training data in it: nothing can be measured"
        )
    return found


def _rows_of(column: pa.Array | pa.ChunkedArray, vocabulary: Vocabulary) -> NDArray[np.int64]:
    rows = pc.index_in(column, value_set=pa.array(vocabulary.words, pa.large_string())).fill_null(-1)
    return np.asarray(rows).astype(np.int64)


def _held_out(
    options: InteractionOptions, sources: list[Source], users: Vocabulary, items: Vocabulary, left_out: dict[str, int]
) -> Bags:
    """Returns the held-out items of each user of the training; counts what is left out."""
    if options.held_out_path is None:
        return Bags.from_rows(np.zeros(0, np.int64), np.zeros(0, np.int64), len(users))
    pairs = read_pairs(sources, (options.user_column, options.item_column), options.format, options.layout)
    codes = [np.concatenate([np.asarray(chunk.indices) for chunk in column.chunks]) for column in pairs]
    user_rows, item_rows = (
        _rows_of(column.chunk(0).dictionary, vocabulary)[code]
        for column, vocabulary, code in zip(pairs, (users, items), codes, strict=True)
    )
    # Items of no row still count as what should have been found: by their code, for they may be repeated.
    told = codes[1].astype(np.int64)
    is_known = user_rows >= 0
    left_out["held_out_interactions_of_unknown_users"] = int((~is_known).sum())
    triples = np.unique(np.stack([user_rows, told, item_rows], axis=1)[is_known], axis=0)
    left_out["held_out_interactions_with_unknown_items"] = int((triples[:, 2] < 0).sum())
    return Bags.from_rows(triples[:, 0], triples[:, 2], len(users))


def _read_features(
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
    rows = np.concatenate([_rows_of(batch[0], vocabulary) for batch in batches])
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
        values = pa.chunked_array([values.dictionary_encode() for _, values in cells]).unify_dictionaries()
        categories, category_rows = _number(values, _base_of(options.base_categories.get(name)), takes_new)
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
