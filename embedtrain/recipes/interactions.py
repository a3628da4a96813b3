"""Shared code of the models that learn from interactions of users and items: preparing, splitting and keeping data."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedtrain.config.interactions import InteractionsConfig
from embedtrain.data.bags import Bags, without
from embedtrain.data.interactions import ITEMS_NAME, SPLIT_NAMES, USERS_NAME, InteractionOptions, Interactions
from embedtrain.data.readers import Layout, suffixes_of
from embedtrain.data.sources import refuse_changes
from embedtrain.data.splits import SplitOptions
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import UserError, printable
from embedtrain.metrics.ranking import name_at
from embedtrain.recipes.base import Tuning
from embedtrain.recipes.layout import layout_of
from embedtrain.train.run_folder import RunFolder

_logger = logging.getLogger(__name__)

_MANY_ITEMS = 100_000

_WITHOUT_VALIDATION = (
    "data.validation=none",
    "train.early_stop.patience=null",
    "checkpoint.keep_best=null",
    "checkpoint.best_metric=loss",
    "evaluate.every_epochs=null",
    "evaluate.every_steps=null",
)
"""Settings of `Tuning.final`: train on the validation part too, and do not choose a checkpoint by the test part."""


def interaction_options(
    data: InteractionsConfig, held_out_path: str | Sequence[str] | None, **others: Any
) -> InteractionOptions:
    """Returns the options for preparing the interactions of a section `data`.

    Args:
        data: the section.
        held_out_path: the setting `evaluate.path`.
        others: further options of `InteractionOptions`, such as features and `keeps_order`.
    """
    return InteractionOptions(
        path=data.path,
        format=data.format,
        layout=layout_of(data, "data"),
        user_column=data.user_column,
        item_column=data.item_column,
        rating_column=data.rating_column,
        min_rating=0.0 if data.min_rating is None else data.min_rating,
        time_column=data.time_column,
        held_out_path=held_out_path,
        split=SplitOptions(
            test=data.split,
            validation=data.validation_rule,
            ratio=data.held_out_ratio,
            num_events=data.held_out_events,
            seed=data.split_seed,
            min_user_count=data.min_user_count,
            min_item_count=data.min_item_count,
        ),
        **others,
    )


def log_interactions(
    interactions: Interactions, test_path: str | Sequence[str] | None, *, chooses_best: bool = False
) -> None:
    """Logs the size of the prepared interactions, and warnings about unusable or unsuitable data.

    Args:
        interactions: the prepared interactions.
        test_path: the setting `evaluate.path`.
        chooses_best: whether the run stops early or keeps its best checkpoints.
    """
    _logger.info(
        f"{interactions.num_interactions:,} interactions of {len(interactions.users):,} users with "
        f"{len(interactions.items):,} items, in {interactions.path}"
    )
    row = int(interactions.users.counts.argmax())
    if (most := int(interactions.users.counts[row])) > _MANY_ITEMS:
        _logger.warning(
            f"user {printable(interactions.users.words[row])!r} has {most:,} items, which are a large part of every "
            "epoch: leave such users out of the data if they are programs"
        )
    for what, number in interactions.left_out.items():
        if number:
            _logger.warning(f"{number:,} {what.replace('_', ' ')}")
    if test_path is not None and not len(interactions.held_out.values):
        _logger.warning(f"evaluate.path={test_path} has no user of the training data: all its measures will be 0")
    if chooses_best and not interactions.has_validation and len(interactions.held_out.values):
        _logger.warning(
            "train.early_stop and checkpoint.keep_best choose by the test part, so its measures will be too good: "
            "data.validation=auto holds out a separate part for this choice"
        )
    if interactions.has_validation:
        _logger.info(
            f"held out for validation: {len(interactions.validation.values):,} interactions; training is measured on "
            "them, and `embedtrain evaluate` uses the test part"
        )
        _warn_of_nothing_to_find(interactions.validation, "data.validation")
    if SPLIT_NAMES[-1] in interactions.split_files:
        _warn_of_nothing_to_find(interactions.held_out, "data.split")


def _warn_of_nothing_to_find(part: Bags, key: str) -> None:
    if not (part.values >= 0).any():
        _logger.warning(
            f"{key} holds out no interaction whose user and item are in the training part: all measures will be 0. "
            "Hold out less with data.held_out_ratio or data.held_out_events, or use another rule"
        )


def require_users(held_out: Bags) -> Bags:
    """Returns the test part of a run.

    Raises:
        UserError: the test part has no user of the training data.
    """
    if not len(held_out.values):
        raise UserError(
            "the test part of this run has no user of the training data: nothing can be measured. Train with another "
            "data.split or evaluate.path, or give --data FILE"
        )
    return held_out


def tuning_of(space: Callable[[Any], Mapping[str, str]]) -> Tuning[Any]:
    """Returns the `Tuning` of a model of interactions with the given search space."""
    return Tuning(
        has_validation=lambda config: config.data.validation != "none",
        metric=lambda config: name_at("ndcg", config.evaluate.k[0]),
        space=space,
        split_off=["data.validation=auto"],
        final=_WITHOUT_VALIDATION,
    )


def rows_of(names: Sequence[str], vocabulary: Vocabulary, noun: str) -> NDArray[np.int64]:
    """Returns the rows of raw ids.

    Raises:
        UserError: a raw id is unknown.
    """
    rows = vocabulary.rows_of(names)
    if len(unknown := np.flatnonzero(rows < 0)):
        raise UserError(
            f"unknown {noun} {names[int(unknown[0])]!r}: it is not among the {len(vocabulary):,} {noun}s of the "
            f"training data, such as {', '.join(map(repr, vocabulary.words[:3]))}"
        )
    return rows


def heads_of(data: InteractionsConfig) -> dict[str, tuple[str, Layout]]:
    """Returns the keys of files of interactions, with format and layout; see `Recipe.heads`."""
    return dict.fromkeys(("data.path", "evaluate.path"), (data.format, layout_of(data, "data")))


def validation_of(interactions: Interactions) -> Bags:
    """Returns the validation part of each user, without items that the user has in training.

    These items cannot be found, because they are left out of the user's recommendations.
    """
    return without(interactions.validation, interactions.known)


def test_of(interactions: Interactions, *, is_split: bool) -> Bags:
    """Returns the test part of each user.

    Args:
        interactions: interactions of the run.
        is_split: whether the test part comes from `data.split`. Then items that the user has before the test part are
            removed, because they are left out of the recommendations. Files of `evaluate.path` are not changed.
    """
    return without(interactions.held_out, interactions.known_before_test) if is_split else interactions.held_out


def check_data_files(data: InteractionsConfig, interactions: Interactions, ranks: Ranks) -> Callable[[], None]:
    """Returns a function that refuses files of the section `data` that changed after they were prepared.

    Collective: every rank calls the returned function.
    """
    check = functools.partial(refuse_changes, data.path, suffixes_of(data.format), interactions.source_identities)
    return lambda: ranks.run_on_first(check)


@dataclass(frozen=True)
class _KeptFacts:
    """Facts kept with the interactions in the run folder: hashes of the raw ids, which are in separate files."""

    users: str
    items: str


def keep_interactions(interactions: Interactions, folder: RunFolder) -> None:
    """Writes raw ids, the parts of the split and the prepared interactions to the run folder."""
    folder.write_vocabulary(interactions.users, USERS_NAME)
    folder.write_vocabulary(interactions.items, ITEMS_NAME)
    folder.write_split([os.path.join(interactions.path, name) for name in interactions.split_files])
    facts = _KeptFacts(interactions.users.fingerprint, interactions.items.fingerprint)
    # These files are left out of the copy, because they were written to the run folder above.
    folder.keep_data(asdict(facts), interactions.path, leave_out=frozenset((USERS_NAME, ITEMS_NAME, *SPLIT_NAMES)))


@contextmanager
def kept_interactions(run_path: str, prepare: Callable[[], Interactions]) -> Iterator[Interactions]:
    """Yields the interactions that `keep_interactions` wrote, or prepares them again if there are none.

    Collective: every rank.

    Raises:
        UserError: the run folder has no interactions and they cannot be prepared, or the files of raw ids are missing
            or belong to another run.
        CorruptCheckpointError: the interactions in the run folder are damaged.
    """
    folder = RunFolder(run_path)
    with folder.open_data(_KeptFacts) as kept:
        if kept is None:
            try:
                interactions = prepare()
            except UserError as error:
                raise UserError(
                    f"{folder.kept_data_path} is missing, which holds the training interactions, and the data cannot "
                    f"be read again: {error}"
                ) from error
        else:
            interactions = Interactions(kept.path, names_path=folder.path)
            _check_names(folder, interactions, kept.facts)
        yield interactions


def _check_names(folder: RunFolder, interactions: Interactions, facts: _KeptFacts) -> None:
    """Refuses files of raw ids in the run folder that do not belong to its interactions."""
    for name, fingerprint in ((USERS_NAME, facts.users), (ITEMS_NAME, facts.items)):
        try:
            names = interactions.users if name == USERS_NAME else interactions.items
            fault = None if names.fingerprint == fingerprint else "does not hold the raw ids of this run"
        except FileNotFoundError:
            fault = "is missing"
        if fault is not None:
            raise UserError(
                f"{folder.join(name)} {fault}: restore it, or run the training command again, which writes it again"
            )
