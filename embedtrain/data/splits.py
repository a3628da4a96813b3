"""Splits events into a training, a validation and a test part, and leaves out rare users and items."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embedtrain.data.events import Events
from embedtrain.errors import UserError, counted

Rule = Literal["none", "ratio", "leave_one_out", "by_time"]

_TEST, _VALIDATION = 0, 1

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Says how events are split.

    Attributes:
        test: which events are held out to measure the trained model on. "ratio": a share of each user's items, drawn
            at random. "leave_one_out": each user's newest events. "by_time": the newest events of all users together.
        validation: which of the other events are held out to measure on during training.
        ratio: the share that "ratio" and "by_time" hold out; for validation, of the events outside the test part.
        num_events: number of events per user that "leave_one_out" holds out.
        seed: seed of the random draws.
        min_user_count: smallest number of events of a user who is kept; checked before events are held out.
        min_item_count: smallest number of events of an item that is kept. Both rules repeat until nothing changes.
    """

    test: Rule = "none"
    validation: Rule = "none"
    ratio: float = 0.1
    num_events: int = 1
    seed: int = 1
    min_user_count: int = 1
    min_item_count: int = 1

    @property
    def is_parted(self) -> bool:
        """Whether any event is held out."""
        return self.test != "none" or self.validation != "none"


@dataclass(frozen=True)
class Split:
    """Holds the parts of the events, each in the order of the files.

    Attributes:
        train: events to train on.
        validation: events to measure on during training; None if none are held out.
        test: events to measure the trained model on; None if none are held out.
    """

    train: Events
    validation: Events | None = None
    test: Events | None = None


def split_events(events: Events, options: SplitOptions) -> Split:
    """Splits events; every user keeps at least one event to train on, unless all the user's events are too new.

    Raises:
        UserError: nothing is left to train on, or nothing is held out.
    """
    test = validation = None
    if options.test != "none":
        events, test = _parted(events, options.test, options, _TEST)
    if options.validation != "none":
        events, validation = _parted(events, options.validation, options, _VALIDATION)
    return Split(events, validation, test)


def core_of(events: Events, min_user_count: int, min_item_count: int) -> Events:
    """Returns the events whose user and item both have enough events.

    Raises:
        UserError: there are none.
    """
    if min_user_count <= 1 and min_item_count <= 1:
        return events
    kept = np.arange(len(events))
    while True:
        is_rare = np.zeros(len(kept), np.bool_)
        for ids, least in ((events.users, min_user_count), (events.items, min_item_count)):
            codes = ids.codes[kept]
            is_rare |= np.bincount(codes, minlength=len(ids.names))[codes] < least
        if not is_rare.any():
            break
        kept = kept[~is_rare]
    if not len(kept):
        given = {"data.min_user_count": min_user_count, "data.min_item_count": min_item_count}
        shown = [f"{key}={least}" for key, least in given.items() if least > 1]
        raise UserError(
            f"nothing is left of {counted(len(events), 'interaction')} with {' and '.join(shown)}: give smaller counts"
        )
    if num_rare := len(events) - len(kept):
        _logger.info(
            f"left out {counted(num_rare, 'interaction')} of users with fewer than {min_user_count:,} or of items with "
            f"fewer than {min_item_count:,}"
        )
    return events.where(kept)


def _parted(events: Events, rule: Rule, options: SplitOptions, part: int) -> tuple[Events, Events]:
    """Returns the events that stay, and the events that a rule holds out."""
    key = "data.split" if part == _TEST else "data.validation"
    if rule == "leave_one_out":
        is_held_out = _newest_of_each(events, options.num_events)
    elif rule == "by_time":
        is_held_out = _newest_of_all(events, options.ratio)
    else:
        is_held_out = _drawn(events, options.ratio, np.random.default_rng([options.seed, part]))
    if not is_held_out.any():
        raise UserError(
            f"{key}={rule} holds nothing out of {counted(len(events), 'interaction')}: every user has too few of them, "
            "since one stays to train on"
        )
    if is_held_out.all():
        raise UserError(f"{key}={rule} leaves nothing to train on: all interactions have the same time")
    return events.where(~is_held_out), events.where(is_held_out)


def _newest_of_each(events: Events, num_events: int) -> NDArray[np.bool_]:
    order = events.in_order(events.users.codes)
    users = events.users.codes[order]
    lengths = np.bincount(users, minlength=len(events.users.names))
    from_end = np.cumsum(lengths)[users] - 1 - np.arange(len(users))
    is_held_out = np.zeros(len(users), np.bool_)
    is_held_out[order] = from_end < np.minimum(num_events, lengths - 1)[users]
    return is_held_out


def _newest_of_all(events: Events, ratio: float) -> NDArray[np.bool_]:
    """Returns which events are the newest ones: about a share of all events, and none older than the rest."""
    assert events.times is not None, "the configuration was checked"
    times = events.times.values
    place = min(len(times) - 1, round((1 - ratio) * len(times)))
    is_new: NDArray[np.bool_] = times >= np.partition(times, place)[place]
    return is_new


def _drawn(events: Events, ratio: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Returns which events are drawn: all events of a random share of each user's distinct items."""
    users, items = events.users.codes.astype(np.int64), events.items.codes
    keys, pair_of = np.unique(users * len(events.items.names) + items, return_inverse=True)
    user_of = keys // len(events.items.names)
    order = np.lexsort((generator.random(len(keys)), user_of))
    lengths = np.bincount(user_of, minlength=len(events.users.names))
    place = np.arange(len(keys)) - (np.cumsum(lengths) - lengths)[user_of]
    is_drawn = np.zeros(len(keys), np.bool_)
    is_drawn[order] = place < np.minimum(np.round(ratio * lengths), lengths - 1)[user_of]
    return is_drawn[pair_of]
