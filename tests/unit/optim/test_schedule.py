from __future__ import annotations

import math

import pytest
import torch

import embedtrain as et
from embedtrain.optim.schedule import SCHEDULES, schedule_factor


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("constant", [1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.5, 0.0]),
        ("cosine", [1.0, 0.5, 0.0]),
    ],
)
def test_a_schedule_goes_from_the_base_rate_to_its_end(name: str, factors: list[float]) -> None:
    assert [schedule_factor(name, done) for done in (0.0, 0.5, 1.0)] == pytest.approx(factors)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warm_up_rises_to_the_base_rate_first(name: str) -> None:
    assert [schedule_factor(name, done, warmup=0.2) for done in (0.0, 0.1, 0.2)] == pytest.approx([0.0, 0.5, 1.0])


def test_inverse_square_root_falls_from_the_end_of_the_warm_up() -> None:
    assert schedule_factor("inverse_sqrt", 0.8, warmup=0.2) == pytest.approx(0.5)


def test_half_way_after_a_warm_up_is_half_of_what_is_left() -> None:
    assert schedule_factor("linear", 0.6, warmup=0.2) == pytest.approx(0.5)
    assert schedule_factor("cosine", 0.4, warmup=0.2) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_the_rate_does_not_fall_below_its_least() -> None:
    assert schedule_factor("linear", 1.0, min_factor=0.1) == 0.1
    assert schedule_factor("linear", 0.0, min_factor=0.1, warmup=0.5) == 0.1


@pytest.mark.parametrize(
    ("name", "warmup", "message"),
    [
        ("steps", 0.0, "there is no schedule 'steps'; there are constant, cosine, inverse_sqrt, linear"),
        ("linear", 1.0, r"warmup must be a share in \[0, 1\)"),
        ("inverse_sqrt", 0.0, "warmup must be positive"),
    ],
)
def test_impossible_schedules_are_refused(name: str, warmup: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_factor(name, 0.5, warmup=warmup)


def test_they_drive_torchs_own_scheduler() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("t", 6, 2)])
    optimizer = et.optim.SGD(tables, lr=0.4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor("linear", step / 4))
    rates = []
    for _ in range(4):
        tables({"t": et.Jagged.from_ids(torch.tensor([1]))})["t"].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
