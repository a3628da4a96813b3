"""The learning rate decays over the epochs of the schedule, which may be more or fewer than the run has."""

from __future__ import annotations

import pytest

from embedtrain.recipes.loading import load_config
from embedtrain.train.run import _schedule_factor


@pytest.mark.parametrize(
    ("epochs", "factors"), [("null", [1.0, 0.5, 0.0]), ("8", [1.0, 0.75, 0.5]), ("2", [1.0, 0.0, 0.0])]
)
def test_a_schedule_has_epochs_of_its_own(epochs: str, factors: list[float]) -> None:
    settings = ["model=retrieval", "data.path=x", "run.path=y", "train.epochs=4", "schedule.min_factor=0"]
    config = load_config(None, [*settings, f"schedule.epochs={epochs}"])
    assert [_schedule_factor(config, done) for done in (0.0, 0.5, 1.0)] == factors
