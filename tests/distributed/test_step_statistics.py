"""What a step costs and looks up, over ranks."""

from __future__ import annotations

import time

import pytest
import torch

import embedtrain as et
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.distributed.stages import stage
from embedtrain.testing.ranks import run_ranks
from embedtrain.train.step_statistics import StepStatistics

NUM_ROWS, DIM = 1000, 8


def measured(ranks: Ranks, own: list[int], seconds: float) -> dict[str, float]:
    """A step that looks ids up and takes its time, of two that are counted."""
    tables = et.EmbeddingCollection([et.TableSpec("t", NUM_ROWS, DIM)], ranks=ranks)
    statistics = StepStatistics(tables, ranks)
    with stage("forward"):
        tables({"t": et.Jagged.from_ids(torch.tensor(own))})["t"].sum().backward()
        time.sleep(seconds)
    return statistics.measure(2)


def on_rank(ranks: Ranks) -> dict[str, float]:
    is_busy = ranks.rank == 0
    return measured(ranks, [1, 1, 2, 3] if is_busy else [2], 1.0 if is_busy else 0.0)


def test_one_process_has_stages_and_ids_and_sends_nothing() -> None:
    ids = [7] * 50 + list(range(200))
    found = measured(ONE_PROCESS, ids, 0.02)
    assert 0.01 <= found["stage/forward"] < 0.5
    assert "stage/backward" not in found
    # The hottest two of 200 distinct ids: 7, and one that occurs once.
    expected = {"ids/looked_up": 250.0, "ids/distinct": 200.0, "ids/hottest_share": 52 / 250}
    assert {name: value for name, value in found.items() if name.startswith("ids/")} == pytest.approx(expected)
    assert found["memory/host_bytes"] > 1e7
    assert not {"exchange/bytes", "stage/busiest_rank", "memory/device_bytes"} & found.keys()


def test_only_what_came_since_is_counted() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("t", NUM_ROWS, DIM)])
    with stage("evaluate"):
        time.sleep(0.02)
    statistics = StepStatistics(tables, ONE_PROCESS)
    with stage("kernel"):
        time.sleep(0.02)
    found = statistics.measure(1)
    assert "stage/evaluate" not in found and found["stage/kernel"] >= 0.02
    assert not [name for name in statistics.measure(1) if name.startswith("stage/")]
    assert "ids/hottest_share" not in found, "nothing was looked up"


def ids_of(statistics: StepStatistics) -> tuple[float, float]:
    found = statistics.measure(1)
    return found["ids/looked_up"], found["ids/distinct"]


def test_the_ids_are_those_of_the_last_step_alone() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("a", NUM_ROWS, 4), et.TableSpec("b", NUM_ROWS, 8)])
    statistics = StepStatistics(tables, ONE_PROCESS)
    few, many = et.Jagged.from_ids(torch.tensor([1, 1])), et.Jagged.from_ids(torch.arange(5))
    for step in range(5, 8):
        statistics.begin_step(step)
        tables({"a": few, "b": few})  # micro-batches; the tables are two groups
        with statistics.ahead(step + 2):
            tables({"a": many, "b": many})
        with torch.no_grad():  # an evaluation of some of the tables
            tables({"b": many})
        tables({"a": few})
    assert ids_of(statistics) == (10 + 4 + 2, 5 + 5), "what was looked up two steps before, and in the step"
    statistics.begin_step(8)
    assert ids_of(statistics) == (10, 10)
    statistics.begin_step(10)
    assert ids_of(statistics) == (0, 0)


@pytest.mark.parametrize("through_memory", ["0", "1"])
def test_ranks_are_summed_and_the_busiest_is_told(through_memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDTRAIN_SHARED_MEMORY", through_memory)
    first, second = run_ranks(2, on_rank)
    assert first == second
    assert first["ids/looked_up"] == 5
    assert first["ids/distinct"] == 4, "3 of one rank and 1 of the other"
    # Rank 0 slept, rank 1 did nothing but wait: the busiest has twice the mean.
    assert 1.5 < first["stage/busiest_rank"] <= 2.0
    # Of rows 1, 2, 3, which lie on both ranks, at least one travels as a vector and as a gradient; of two steps.
    assert first["exchange/bytes"] >= 2 * DIM * 4 / 2
