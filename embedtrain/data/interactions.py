"""Users, items and who turned to what: raw ids become rows once, and everything else is rows from there on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from embedtrain import storage
from embedtrain.data.bags import Bags, distinct, union
from embedtrain.data.events import EventFiles, Events, read_events, refuse_line_ends
from embedtrain.data.prepared import META_NAME, prepared_entry, read_contents
from embedtrain.data.readers import suffixes_of
from embedtrain.data.row_names import rows_among
from embedtrain.data.seal import Unverified
from embedtrain.data.side_features import SideOptions, give_rows, read_features
from embedtrain.data.sources import Source, take_sources
from embedtrain.data.splits import Split, SplitOptions, core_of, split_events
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import UserError
from embedtrain.schema import Count

_logger = logging.getLogger(__name__)

USERS_NAME, ITEMS_NAME = "users.tsv", "items.tsv"
"""Files of the raw ids by row."""

SPLIT_NAMES = ("train.tsv", "validation.tsv", "test.tsv")
"""Files of the parts of a split in raw ids, in the order of the input: `user`, `item` and, if known, `time`."""

_FORMAT_VERSION = 4


@dataclass(frozen=True, kw_only=True)
class InteractionOptions(EventFiles):
    """What to train on.

    Attributes:
        path: the interactions, as `expand_sources` takes them.
        held_out_path: interactions to measure on, in the same format; None for none.
        split: which interactions are held out instead, and which are left out.
        users: features of the users.
        items: features of the items.
        takes_new: whether users, items and categories get rows that are in no base; otherwise they are left out.
        keeps_order: whether each user's interactions are kept in order of time too: `Interactions.sequences`.
    """

    path: str | Sequence[str]
    held_out_path: str | Sequence[str] | None = None
    split: SplitOptions = field(default_factory=SplitOptions)
    users: SideOptions = field(default_factory=SideOptions)
    items: SideOptions = field(default_factory=SideOptions)
    takes_new: bool = True
    keeps_order: bool = False


@dataclass(frozen=True)
class _Meta:
    """What `prepare_interactions` says of an entry in its table of contents."""

    fingerprint: str
    num_interactions: Count
    sources: list[str]
    left_out: dict[str, int]
    features: dict[str, dict[str, Count]]
    has_validation: bool = False
    order_fingerprint: str = ""


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
        order_fingerprint: a hash of `sequences`; empty without them.
        has_validation: whether a part was split off to measure on during training.
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
        self.order_fingerprint = self._meta.order_fingerprint
        self.has_validation = self._meta.has_validation

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

    @cached_property
    def validation(self) -> Bags:
        """The items of each user that were split off to measure on during training, like `held_out`."""
        assert self.has_validation, "no part was split off"
        return Bags.load(os.path.join(self.path, "validation"))

    @cached_property
    def known_before_test(self) -> Bags:
        """The items of each user, ascending, that come before the held-out ones: of training and validation."""
        return union(self.known, self.validation) if self.has_validation else self.known

    @cached_property
    def sequences(self) -> Bags:
        """The items of each user in order of time, repeats included; kept by `InteractionOptions.keeps_order` alone."""
        return Bags.load(os.path.join(self.path, "sequences"))

    @cached_property
    def validation_sequences(self) -> Bags:
        """The items of `validation` in order of time, repeats included, without those that nobody had in training."""
        assert self.has_validation, "no part was split off"
        return Bags.load(os.path.join(self.path, "validation-sequences"))

    @property
    def split_files(self) -> list[str]:
        """The names of the files in `path` that hold the parts of the split in raw ids; none without a split."""
        return [name for name in SPLIT_NAMES if os.path.exists(os.path.join(self.path, name))]

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
    facts = json.dumps([_FORMAT_VERSION, sources, asdict(options)], default=list)
    return f"interactions-{xxhash.xxh3_64_hexdigest(facts.encode())}"


def _write(options: InteractionOptions, listed: _Listed, path: str) -> None:
    events = read_events(listed.interactions, options)
    for ids, noun in ((events.users, "user"), (events.items, "item")):
        refuse_line_ends(ids, noun)
    split = split_events(core_of(events, options.split.min_user_count, options.split.min_item_count), options.split)
    del events
    if options.split.is_parted:
        _write_split(split, path)
    rows = _give_rows(split.train, options)
    users, items, left_out = rows.users, rows.items, rows.left_out
    rows.known.save(os.path.join(path, "known"))
    users.save(os.path.join(path, USERS_NAME))
    items.save(os.path.join(path, ITEMS_NAME))
    if split.test is not None:
        held_out = _to_find(split.test, users, items, left_out, "held_out")
    else:
        held_out = _held_out(options, listed.held_out, users, items, left_out)
    held_out.save(os.path.join(path, "held-out"))
    if split.validation is not None:
        _to_find(split.validation, users, items, left_out, "validation").save(os.path.join(path, "validation"))
    order_fingerprint = _write_order(split, rows, path) if options.keeps_order else ""
    parts = [rows.known.fingerprint, users.fingerprint, items.fingerprint]
    features: dict[str, dict[str, int]] = {}
    for side, side_options, files, vocabulary in (
        ("users", options.users, listed.users, users),
        ("items", options.items, listed.items, items),
    ):
        features[side] = {}
        found = read_features(side_options, files, vocabulary, left_out, side, options.takes_new)
        for number, (name, bags, categories) in enumerate(found):
            bags.save(os.path.join(path, f"{side}-{number}"))
            pq.write_table(categories.as_table(), os.path.join(path, f"{side}-{number}.parquet"))
            features[side][name] = len(categories)
            parts += [name, bags.fingerprint]
    meta = {
        "format_version": _FORMAT_VERSION,
        "fingerprint": xxhash.xxh3_128_hexdigest(json.dumps(parts).encode()),
        "order_fingerprint": order_fingerprint,
        "sources": [source.identity for source in listed.interactions],
        "num_interactions": len(rows.known.values),
        "has_validation": split.validation is not None,
        "features": features,
        "left_out": left_out,
        "options": asdict(options),
    }
    with open(os.path.join(path, META_NAME), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1, default=list)


def _write_split(split: Split, path: str) -> None:
    for part, name in zip((split.train, split.validation, split.test), SPLIT_NAMES, strict=True):
        if part is not None:
            part.write(os.path.join(path, name))


@dataclass(frozen=True)
class _Rows:
    """The rows of users and items.

    Attributes:
        users: raw ids by row, with the numbers of distinct pairs.
        items: likewise.
        user_rows: [n] of each event of the training; -1 for none.
        item_rows: [n] likewise.
        known: the items of each user.
        left_out: what cannot be used, in numbers.
    """

    users: Vocabulary
    items: Vocabulary
    user_rows: NDArray[np.int64]
    item_rows: NDArray[np.int64]
    known: Bags
    left_out: dict[str, int]


def _give_rows(train: Events, options: InteractionOptions) -> _Rows:
    """Gives users and items rows in the order of all their events, and counts their distinct pairs."""
    bases = [
        None if side.base_vocabulary is None else Vocabulary.load_base(side.base_vocabulary, f"{name}.base_vocabulary")
        for name, side in (("users", options.users), ("items", options.items))
    ]
    users, user_rows = give_rows(train.users, bases[0], options.takes_new)
    items, item_rows = give_rows(train.items, bases[1], options.takes_new)
    has_rows = _have_rows(user_rows, item_rows, options)
    known = _distinct_pairs(user_rows[has_rows], item_rows[has_rows], len(users), len(items))
    left_out = {"repeated_interactions": int(has_rows.sum()) - len(known.values)}
    if not options.takes_new:
        left_out["interactions_of_new_users_or_items"] = int((~has_rows).sum())
    counted_users = _recounted(users, known.rows(), bases[0])
    counted_items = _recounted(items, known.values, bases[1])
    return _Rows(counted_users, counted_items, user_rows, item_rows, known, left_out)


def _write_order(split: Split, rows: _Rows, path: str) -> str:
    """Writes each user's items in order of time; returns a hash of those of the training."""
    sequences = _in_order(split.train, rows.user_rows, rows.item_rows, len(rows.users))
    sequences.save(os.path.join(path, "sequences"))
    if split.validation is not None:
        found = _rows_of(split.validation, rows.users, rows.items)
        _in_order(split.validation, *found, len(rows.users)).save(os.path.join(path, "validation-sequences"))
    return sequences.fingerprint


def _have_rows(users: NDArray[np.int64], items: NDArray[np.int64], options: InteractionOptions) -> NDArray[np.bool_]:
    """Returns which interactions are of a user and an item with a row: all, unless new ones get none."""
    has_rows: NDArray[np.bool_] = (users >= 0) & (items >= 0)
    if not has_rows.any():
        raise UserError(f"{options.path}: no interaction is of a user and an item that have rows already")
    return has_rows


def _recounted(vocabulary: Vocabulary, rows: NDArray[np.int64], base: Vocabulary | None) -> Vocabulary:
    """Returns the names with their numbers of distinct pairs, whose rows are given, and those that a base gives."""
    counts = np.bincount(rows, minlength=len(vocabulary))
    if base is not None:
        counts[rows_among(base.words, vocabulary.words)] += base.counts
    return Vocabulary(vocabulary.words, counts)


def _in_order(events: Events, users: NDArray[np.int64], items: NDArray[np.int64], num_users: int) -> Bags:
    """Returns the items of each user in order of time, without events of no user or item."""
    order = events.in_order(users)
    order = order[(users[order] >= 0) & (items[order] >= 0)]
    return Bags.from_rows(users[order], items[order], num_users)


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


def _held_out(
    options: InteractionOptions, sources: list[Source], users: Vocabulary, items: Vocabulary, left_out: dict[str, int]
) -> Bags:
    """Returns the held-out items of each user of the training; counts what is left out."""
    if options.held_out_path is None:
        return Bags.from_rows(np.zeros(0, np.int64), np.zeros(0, np.int64), len(users))
    return _to_find(read_events(sources, replace(options, time_column=None)), users, items, left_out, "held_out")


def _rows_of(events: Events, users: Vocabulary, items: Vocabulary) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the rows [n] of users and items; -1 for those that have none."""
    user_rows, item_rows = (
        rows_among(ids.names, vocabulary.words)[ids.codes]
        for ids, vocabulary in ((events.users, users), (events.items, items))
    )
    return user_rows, item_rows


def _to_find(events: Events, users: Vocabulary, items: Vocabulary, left_out: dict[str, int], part: str) -> Bags:
    """Returns the items of each user with a row, each item once; counts what is left out."""
    user_rows, item_rows = _rows_of(events, users, items)
    # Items of no row still count as what should have been found: by their code, for they may be repeated.
    told = events.items.codes.astype(np.int64)
    is_known = user_rows >= 0
    left_out[f"{part}_interactions_of_unknown_users"] = int((~is_known).sum())
    found_users, _, found_items = distinct(user_rows[is_known], told[is_known], item_rows[is_known])
    left_out[f"{part}_interactions_with_unknown_items"] = int((found_items < 0).sum())
    return Bags.from_rows(found_users, found_items, len(users))
