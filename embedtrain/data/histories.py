"""What users had who were not in the training: read from files, and split to be measured on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedtrain.data.bags import Bags, distinct
from embedtrain.data.columns import read_columns
from embedtrain.data.events import EventFiles, read_events
from embedtrain.data.interactions import Interactions
from embedtrain.data.readers import suffixes_of
from embedtrain.data.row_names import rows_among
from embedtrain.data.side_features import SideOptions, split_categories
from embedtrain.data.sources import take_sources
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.errors import UserError, counted

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Histories:
    """Users and their items.

    Attributes:
        users: their raw ids.
        items: of each user, rows of items, ascending, each once; -1 for an item that was not in the training.
    """

    users: Sequence[str]
    items: Bags


def read_histories(files: EventFiles, path: str, items: Vocabulary) -> Histories:
    """Returns the users of files and their items, in the order in which the users first appear.

    Args:
        files: how they are read.
        path: the files.
        items: those of the training.

    Raises:
        UserError: a file cannot be used.
    """
    events = read_events(take_sources(path, suffixes_of(files.format)), replace(files, time_column=None))
    user_codes, item_codes = events.users.codes.astype(np.int64), events.items.codes.astype(np.int64)
    rows = rows_among(events.items.names, items.words)
    # Unknown items that differ are still different items, which someone may have asked for: they count as missed.
    found_users, found_items, _ = distinct(user_codes, rows[item_codes], item_codes)
    names = events.users.names.to_pylist()
    return Histories(names, Bags.from_rows(found_users, found_items, len(names)))


def read_described(
    options: SideOptions, path: str, categories: Mapping[str, Sequence[str]]
) -> tuple[list[str], dict[str, Bags]]:
    """Returns the raw ids of files of users, or of items, and by column the known categories of each row.

    Args:
        options: how the files are read; their own path is not.
        path: the files.
        categories: by column, those of the training in the order of their rows.

    Raises:
        UserError: a file cannot be used, or holds no row.
    """
    sources, names = take_sources(path, suffixes_of(options.format)), list(options.separators)
    wanted = [options.id_column, *names]
    batches = [
        rows.columns for rows in read_columns(sources, wanted, options.format, options.layout, options.separators)
    ]
    if not batches:
        raise UserError(f"{path}: there are no rows")
    ids = [str(found) for batch in batches for found in batch[0].to_pylist()]
    bags = {}
    for place, name in enumerate(names, start=1):
        cells = [split_categories(batch[place], options.separators[name]) for batch in batches]
        rows = np.repeat(np.arange(len(ids)), np.concatenate([lengths for lengths, _ in cells]))
        values = pa.chunked_array([values for _, values in cells], pa.large_string())
        category = rows_among(values, categories[name])
        bags[name] = Bags.from_rows(rows[category >= 0], category[category >= 0], len(ids))
    return ids, bags


def warn_of_left_out(where: str, num_interactions: int, num_users: int) -> None:
    """Logs how many interactions with unknown items, and users without a known item, are left out of a file."""
    if num_interactions:
        told = counted(num_interactions, "interaction")
        _logger.warning(f"{where}: {told} left out, with items not in the training data")
    if num_users:
        _logger.warning(f"{where}: {counted(num_users, 'user')} left out, without an item of the training data")


def known_part(found: Histories, where: str, interactions: Interactions) -> tuple[Histories, NDArray[np.int64]]:
    """Returns the users who can be answered, with those of their items that were in the training; logs the others.

    Args:
        found: the users of a file.
        where: the file, for messages.
        interactions: those of the training.

    Returns:
        The users who were in the training or have an item of it, and the row of each in the training, -1 if none.

    Raises:
        UserError: there are none.
    """
    is_known = found.items.values >= 0
    rows, values = found.items.rows()[is_known], found.items.values[is_known]
    trained = rows_among(found.users, interactions.users.words)
    kept = np.flatnonzero((np.bincount(rows, minlength=len(found.users)) > 0) | (trained >= 0))
    if not len(kept):
        num_items = len(interactions.items)
        raise UserError(f"{where}: none of its items is among the {num_items:,} items of the training data")
    warn_of_left_out(where, int((~is_known).sum()), len(found.users) - len(kept))
    if num_trained := int((trained >= 0).sum()):
        _logger.warning(
            f"{where}: {counted(num_trained, 'user')} of the training data: their trained vectors are taken, and their "
            "items here are only left out of the answers"
        )
    bags = Bags.from_rows(np.searchsorted(kept, rows), values, len(kept))
    return Histories([found.users[user] for user in kept.tolist()], bags), trained[kept]


def split_histories(found: Histories, fraction: float, users: Vocabulary, seed: int, where: str) -> tuple[Bags, Bags]:
    """Splits the items of each user who was not in the training: what they are known by, and what to find.

    Args:
        found: the users of a file.
        fraction: of a user's items that are known, at least one and never all.
        users: those of the training, who are left out.
        seed: of the choice.
        where: the file, for messages.

    Returns:
        For each user left, the known items, ascending, and those to find, -1 for an item that was not in training.

    Raises:
        UserError: no user is left.
    """
    is_seen = rows_among(found.users, users.words) >= 0
    lengths = found.items.lengths(np.arange(len(found.users)))
    rows = found.items.rows()
    order = np.lexsort((np.random.default_rng(seed).random(len(rows)), rows))
    place = np.arange(len(rows)) - found.items.starts[rows]
    num_known = np.clip(np.round(fraction * lengths), 1, np.maximum(lengths - 1, 0))
    is_history = place < num_known[rows]
    values = found.items.values[order]
    # An item that was not in training says nothing of a user.
    has_history = np.bincount(rows[is_history & (values >= 0)], minlength=len(lengths)) > 0
    is_kept = ~is_seen & (lengths >= 2) & has_history
    if not is_kept.any():
        raise UserError(
            f"{where}: no user can be folded in: expected users who are not in the training data, with two items or "
            f"more; {int(is_seen.sum()):,} of its {len(is_seen):,} users are in the training data"
        )
    _logger.info(f"{where}: {counted(int(is_kept.sum()), 'user')} folded in, {int((~is_kept).sum()):,} left out")
    new_rows = np.cumsum(is_kept) - 1
    parts = []
    for chosen in (is_history & (values >= 0), ~is_history):
        taken = chosen & is_kept[rows]
        parts.append(_sorted_bags(new_rows[rows[taken]], values[taken], int(is_kept.sum())))
    return parts[0], parts[1]


def _sorted_bags(rows: NDArray[np.int64], values: NDArray[np.int64], num_rows: int) -> Bags:
    order = np.lexsort((values, rows))
    return Bags.from_rows(rows[order], values[order], num_rows)
