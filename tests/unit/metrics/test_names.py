from __future__ import annotations

import pytest

from embedtrain.metrics.names import as_words, quality_names, split_name


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("valid_log_loss", ("loss", "validation"), "validation log loss"),
        ("valid_auc", ("auc", "validation"), "validation AUC"),
        ("test_recall@20", ("recall@20", "test"), "test recall@20"),
        ("ndcg@5", ("ndcg@5", "training"), "NDCG@5"),
        ("validity", ("validity", "training"), "validity"),
    ],
)
def test_a_name_says_what_is_measured_and_on_which_data(name: str, split: tuple[str, str], words: str) -> None:
    assert (split_name(name), as_words(name)) == (split, words)


def test_counters_speed_and_machinery_are_no_quality() -> None:
    names = ["step", "epoch", "loss", "words", "words_per_second", "learning_rate/user", "stage/forward", "valid/auc"]
    assert quality_names(names) == ["loss", "valid/auc"]
