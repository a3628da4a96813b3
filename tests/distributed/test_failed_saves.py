"""A training whose saves in the background fail: on one rank, at the commit, a few times or for good."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import embedtrain as et
from embedtrain import storage
from embedtrain.checkpoint import SaveOptions, find_checkpoints
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import CheckpointError
from embedtrain.testing.ranks import run_ranks
from embedtrain.train.checkpoints import Checkpoints, SavePolicy
from embedtrain.train.state import TrainState
from embedtrain.train.task import Objective, Task
from embedtrain.train.trainer import Trainer

NUM_STEPS, EVERY, NUM_ROWS = 40, 4, 50


@dataclass(frozen=True)
class Faults:
    """The disk of `rank` fails in `function` of the storage from its save number `first` on, until `last`."""

    function: str = "write"
    rank: int = 1
    first: int = NUM_STEPS
    last: int = NUM_STEPS


@dataclass
class End:
    step: int = 0
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    rows: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    num_examples: int = 8


class Batches:
    steps_per_epoch = NUM_STEPS
    examples_per_epoch = 16 * NUM_STEPS

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def batch(self, epoch: int, step: int) -> Batch:
        generator = torch.Generator().manual_seed(10 * step + self._rank)
        return Batch(torch.randint(NUM_ROWS, (8,), generator=generator))


def _break(faults: Faults) -> None:
    original = getattr(storage, faults.function)
    calls = iter(range(1, 1000))

    def failing(*arguments: Any) -> None:
        if faults.first <= next(calls) <= faults.last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*arguments)

    setattr(storage, faults.function, failing)


def _train(ranks: Ranks, path: Path, max_failures: int, faults: Faults) -> End:
    if ranks.rank == faults.rank:
        _break(faults)
    end = End()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: end.warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("embedtrain").addHandler(handler)
    tables = et.EmbeddingCollection([et.TableSpec("t", NUM_ROWS, 4)], ranks=ranks)

    def model(batch: Batch) -> Objective:
        loss = tables({"t": et.Jagged.from_ids(batch.ids)})["t"].square().sum()
        return Objective(loss, loss.detach().double(), len(batch.ids))

    task = Task(model, tables, et.optim.RowwiseAdagrad(tables, lr=0.1), Batches(ranks.rank))
    state = TrainState()
    policy = SavePolicy(EVERY, None, SaveOptions("async", max_failures=max_failures, full_every=3), 60.0)
    checkpoints = Checkpoints(str(path), task, state, facts={"data_fingerprint": "x"}, policy=policy, ranks=ranks)
    trainer = Trainer(task, state, epochs=1, schedule=lambda done: 1.0, checkpoints=checkpoints, ranks=ranks)
    try:
        trainer.run([], NUM_STEPS)
    except CheckpointError as error:
        end.error = str(error)
    end.step = state.step
    end.rows = tables.gather_table("t", "weight").clone()
    return end


FULL = "OSError: [Errno 28] No space left on device"


@pytest.mark.parametrize(("function", "rank"), [("write", 1), ("create", 0)])
def test_a_few_saves_that_fail_are_warned_of_and_training_goes_on(function: str, rank: int, tmp_path: Path) -> None:
    undisturbed = run_ranks(2, _train, tmp_path / "undisturbed", 2, Faults())[0]
    ends = run_ranks(2, _train, tmp_path / "run", 2, Faults(function, rank, 2, 3))
    for end in ends:
        assert (end.step, end.error) == (NUM_STEPS, "")
        assert end.rows is not None and undisturbed.rows is not None
        assert torch.equal(end.rows, undisturbed.rows)
        assert len(end.warnings) == 2
        for number, warning in enumerate(end.warnings, start=1):
            assert f"rank {rank}: {FULL}; training continues after {number} consecutive failed saves" in warning
    assert [found.step for found in find_checkpoints(str(tmp_path / "run"))] == [4, *range(16, NUM_STEPS + 1, EVERY)]
    assert undisturbed.warnings == []


@pytest.mark.parametrize(("function", "rank"), [("write", 1), ("create", 0)])
@pytest.mark.parametrize("max_failures", [0, 2])
def test_saves_that_go_on_failing_stop_the_run_before_another_begins(
    function: str, rank: int, max_failures: int, tmp_path: Path
) -> None:
    ends = run_ranks(2, _train, tmp_path, max_failures, Faults(function, rank, 2))
    last_begun = EVERY * (2 + max_failures)
    for end in ends:
        assert last_begun < end.step <= last_begun + EVERY
        assert f"step {last_begun} was not saved" in end.error
        assert end.error.endswith(f"rank {rank}: {FULL} (consecutive failed saves: {max_failures + 1})")
        assert len(end.warnings) == max_failures
    assert [found.step for found in find_checkpoints(str(tmp_path))] == [EVERY]
