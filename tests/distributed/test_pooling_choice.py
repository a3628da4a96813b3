"""Where bags are pooled: decided once for each feature, alike on all ranks, again if bags change, and kept by a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import embedtrain as et
from embedtrain.checkpoint import SaveOptions
from embedtrain.distributed.ranks import Ranks
from embedtrain.embedding import pooling_choice
from embedtrain.testing.threads import run_threads
from embedtrain.train.checkpoints import Checkpoints, SavePolicy
from embedtrain.train.state import TrainState
from embedtrain.train.task import Task

NUM_ROWS = 5000
POLICY = SavePolicy(1, None, SaveOptions("sync"))


def make_tables(ranks: Ranks) -> et.EmbeddingCollection:
    return et.EmbeddingCollection(
        [et.TableSpec("x", NUM_ROWS, 8)], [et.FeatureSpec("x", pooling="sum")], ranks=ranks, seed=1
    )


def make_batch(seed: int, bag_size: int, num_bags: int = 20) -> dict[str, et.Jagged]:
    """Long bags move less as sums, and bags of 2 of few distinct ids as rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, NUM_ROWS if bag_size > 2 else 3, (num_bags * bag_size,), generator=generator)
    return {"x": et.Jagged(ids, torch.full((num_bags,), bag_size))}


def ways(tables: et.EmbeddingCollection, batches: list[dict[str, et.Jagged]]) -> list[bool]:
    """Returns of each step whether owners pooled."""
    found = []
    for batch in batches:
        asked = tables.ask(batch)
        found.append(asked.parts[0].at_owner[0])
        tables.look_up(asked)["x"].sum().backward()
    return found


def test_bags_are_counted_in_the_first_step_alone_and_again_when_they_change_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[int] = []
    count_rows = pooling_choice.count_rows

    def recorded(keys: torch.Tensor, *rest: Any) -> torch.Tensor:
        counted.append(keys.numel())
        return count_rows(keys, *rest)

    monkeypatch.setattr(pooling_choice, "count_rows", recorded)
    sizes = [50, 50, 40, 50, 2, 2, 2, 2]

    def train(ranks: Ranks) -> list[bool]:
        return ways(make_tables(ranks), [make_batch(step, size) for step, size in enumerate(sizes)])

    # The step after the change is measured, and the one after that goes by it.
    assert run_threads(2, train) == [[True] * 6 + [False] * 2] * 2
    assert counted == [1000, 1000, 40, 40]


def test_ranks_decide_together_even_if_their_bags_differ() -> None:
    def train(ranks: Ranks) -> list[bool]:
        size = 50 if ranks.rank == 0 else 1
        return ways(make_tables(ranks), [make_batch(step, size) for step in range(4)])

    assert run_threads(2, train) == [[True] * 4, [False] + [True] * 3]


def test_a_run_goes_on_with_the_choices_that_it_had() -> None:
    def train(ranks: Ranks) -> tuple[list[bool], list[bool], list[bool], dict[str, Any]]:
        tables = make_tables(ranks)
        ways(tables, [make_batch(0, 50)])
        saved = json.loads(json.dumps(tables.pooling_choices))
        # Bags become short: an uninterrupted run pools at the owners once more, before it has measured them.
        later = [make_batch(1, 2), make_batch(2, 2), make_batch(3, 2)]
        resumed, anew, other = make_tables(ranks), make_tables(ranks), make_tables(ranks)
        resumed.pooling_choices = saved
        other.pooling_choices = {**saved, "num_ranks": 3}
        assert ways(anew, later) == ways(other, later)
        return ways(tables, later), ways(resumed, later), ways(make_tables(ranks), later), saved

    for straight, resumed, anew, saved in run_threads(2, train):
        assert straight == resumed == [True, True, False]
        assert anew == [False] * 3
        assert saved == {"num_ranks": 2, "features": {"x": [True, 50.0]}}


def test_neither_a_batch_asked_ahead_nor_an_evaluation_is_part_of_what_a_run_saves() -> None:
    def train(ranks: Ranks) -> tuple[Any, Any, Any]:
        tables = make_tables(ranks)
        ways(tables, [make_batch(0, 50)])
        before = tables.pooling_choices
        ahead = tables.ask(make_batch(1, 2), is_ahead=True)
        with torch.no_grad():
            tables(make_batch(2, 2))
        between = tables.pooling_choices
        tables.look_up(ahead)
        return before, between, tables.pooling_choices

    for before, between, after in run_threads(2, train):
        assert before == between
        assert after["features"] == {"x": [True, 0.0]}


def test_an_evaluation_of_a_resumed_run_decides_as_that_of_one_that_never_stopped() -> None:
    """Though the step between two evaluations was asked before the first of them."""

    def evaluate(tables: et.EmbeddingCollection, bag_size: int) -> list[bool]:
        with torch.no_grad():
            asked = [tables.ask(make_batch(seed, bag_size)) for seed in range(3)]
        return [each.parts[0].at_owner[0] for each in asked]

    def train(ranks: Ranks) -> tuple[list[bool], list[bool], list[bool]]:
        tables, resumed = make_tables(ranks), make_tables(ranks)
        ways(tables, [make_batch(0, 50)])
        resumed.pooling_choices = tables.pooling_choices
        ahead = tables.ask(make_batch(1, 50), is_ahead=True)
        first = evaluate(tables, 50)
        tables.look_up(ahead)["x"].sum().backward()
        ways(resumed, [make_batch(1, 50)])
        return first, evaluate(tables, 2), evaluate(resumed, 2)

    for first, straight, anew in run_threads(2, train):
        assert first == [True, True, True]
        assert straight == anew == [False, False, False]


def test_a_checkpoint_holds_the_choices(tmp_path: Path) -> None:
    def train(ranks: Ranks) -> tuple[dict[str, Any], dict[str, Any]]:
        found = []
        for is_resumed in (False, True):
            tables = make_tables(ranks)
            task = Task(lambda batch: None, tables, et.optim.RowwiseAdagrad(tables), batches=None)  # type: ignore[arg-type, return-value]
            state = TrainState(step=1)
            facts = {"data_fingerprint": "x"}
            checkpoints = Checkpoints(str(tmp_path), task, state, facts=facts, policy=POLICY, ranks=ranks)
            if is_resumed:
                assert checkpoints.restore()
            else:
                ways(tables, [make_batch(0, 50)])
                checkpoints.save(is_last=True)
            found.append(tables.pooling_choices)
        return found[0], found[1]

    for saved, resumed in run_threads(2, train):
        assert saved == resumed == {"num_ranks": 2, "features": {"x": [True, 50.0]}}
