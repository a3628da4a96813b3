"""Settings of a split that contradict each other, or that nothing would look at, are refused with their keys."""

from __future__ import annotations

import numpy as np
import pytest

from embedtrain.data.bags import Bags
from embedtrain.errors import UserError
from embedtrain.recipes.interactions import interaction_options, require_users
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.retrieval.config import RetrievalConfig


def load(*settings: str) -> RetrievalConfig:
    config = load_config(None, ["model=retrieval", "data.path=train.csv", *settings])
    assert isinstance(config, RetrievalConfig)
    return config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.rating_column=stars"], r"data\.rating_column and data\.min_rating go together"),
        (["data.min_rating=3"], r"data\.rating_column and data\.min_rating go together"),
        (
            ["data.split=ratio", "evaluate.path=test.csv"],
            r"evaluate\.path=test\.csv gives the test part",
        ),
        (["data.split=by_time"], r"data\.split=by_time needs data\.time_column"),
        (["data.validation=by_time"], r"data\.validation=by_time needs data\.time_column"),
        (["data.split=ratio", "data.held_out_ratio=1"], r"data\.held_out_ratio must be above 0 and below 1, got 1"),
        (
            ["data.held_out_ratio=0.2"],
            r"data\.held_out_ratio needs ratio or by_time as",
        ),
        (["data.split=ratio", "data.held_out_events=2"], r"data\.held_out_events needs leave_one_out as"),
        (["data.split=leave_one_out", "data.split_seed=2"], r"data\.split_seed needs ratio as"),
        (["data.split=leave_one_out", "data.held_out_events=0"], r"data\.held_out_events must be at least 1"),
        (["data.min_user_count=0"], r"data\.min_user_count must be at least 1"),
        (["data.split=ratio", "data.split_seed=-1"], r"data\.split_seed must be at least 0"),
        (["data.split=random"], r"data\.split: expected one of none, ratio, leave_one_out, by_time, got 'random'"),
    ],
)
def test_a_contradiction_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(*settings)


@pytest.mark.parametrize("setting", ["negatives=5", "power=1"])
def test_what_the_full_softmax_of_sasrec_would_ignore_is_refused(setting: str) -> None:
    sasrec = ["model=sasrec", "data.path=train.csv", f"sasrec.{setting}"]
    with pytest.raises(UserError, match=r"has no effect with sasrec\.loss=full_softmax: leave it out"):
        load_config(None, sasrec)
    load_config(None, [*sasrec, "sasrec.loss=sampled_softmax"])


@pytest.mark.parametrize(
    "settings",
    [
        ["retrieval.loss=softmax", "retrieval.negative_weight=2"],
        ["retrieval.loss=bpr", "retrieval.negative_weight=0"],
        ["retrieval.negatives=0", "retrieval.popularity_share=0.5"],
        ["retrieval.loss=cosine_contrastive", "retrieval.temperature=0.2"],
        ["retrieval.loss=alignment_uniformity", "retrieval.hard_negatives=4"],
        ["retrieval.loss=bpr", "retrieval.logq=false"],
        ["retrieval.margin=0.4"],
    ],
)
def test_what_a_loss_would_ignore_is_refused(settings: list[str]) -> None:
    with pytest.raises(UserError, match="has no effect with retrieval"):
        load(*settings)


def test_a_test_part_without_users_is_not_measured() -> None:
    with pytest.raises(UserError, match="no user of the training data"):
        require_users(Bags.from_rows(np.zeros(0, np.int64), np.zeros(0, np.int64), 3))
    misses = Bags.from_rows(np.array([1]), np.array([-1]), 3)
    assert require_users(misses) is misses


@pytest.mark.parametrize(
    ("settings", "rules"),
    [
        ([], ("none", "none")),
        (["data.validation=auto"], ("none", "ratio")),
        (["data.validation=auto", "evaluate.path=test.csv"], ("none", "ratio")),
        (["data.split=leave_one_out", "data.validation=auto"], ("leave_one_out", "leave_one_out")),
        (["data.split=leave_one_out", "data.validation=ratio"], ("leave_one_out", "ratio")),
    ],
)
def test_validation_goes_by_the_rule_of_the_split(settings: list[str], rules: tuple[str, str]) -> None:
    config = load(*settings)
    split = interaction_options(config.data, config.evaluate.path).split
    assert (split.test, split.validation) == rules
    assert config.holds_out == (rules[0] != "none")
