"""Through whichever door a run is saved, its next step is the uninterrupted run's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import embedtrain as et
from embedtrain.checkpoint import (
    CheckpointReader,
    CheckpointSaver,
    SaveOptions,
    compact,
    latest_checkpoint,
    load_shards,
    save_checkpoint,
)
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.testing.threads import run_threads
from embedtrain.train.checkpoints import Checkpoints, SavePolicy
from embedtrain.train.state import TrainState
from embedtrain.train.task import Task

SPECS = [
    et.TableSpec("item", 11, 4),
    et.TableSpec("word", 7, 4, dtype=torch.bfloat16),  # whose rounding depends on the count of steps
    et.TableSpec("user", 5, 3, optimizer="other"),
]
OPTIONS: dict[str, dict] = {"adagrad": {"lr_decay": 0.5}, "rowwise_adagrad": {"lr_decay": 0.5}}


class Job:
    """Tables, their optimizer and its schedule."""

    def __init__(self, kind: str, ranks: Ranks = ONE_PROCESS) -> None:
        self.ranks = ranks
        self.tables = et.EmbeddingCollection(SPECS, seed=1, ranks=ranks)
        options = {"lr": 0.1, "weight_decay": 0.1, **OPTIONS.get(kind, {})}
        if kind == "combined":
            parts = [
                et.optim.RMSprop(self.tables.trained_by("default")),
                et.optim.Adam(self.tables.trained_by("other")),
            ]
            self.optimizer: et.optim.SparseOptimizer = et.optim.Combined(*parts)
        else:
            self.optimizer = et.optim.OPTIMIZERS[kind](self.tables, **options)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.7)

    def step(self, number: int) -> None:
        ids = torch.tensor([1, 2, 2, number % 5, self.ranks.rank])
        sum(part.sin().sum() for part in self.tables({spec.name: ids for spec in SPECS}).values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def whole(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{kind}": self.tables.gather_table(name, kind).clone()
            for name, shard in self.tables.shards.items()
            for kind in ("weight", *shard.state)
        }


def library(job: Job, path: Path) -> Callable[[Job], None]:
    """The rows alone: rates are the caller's, who gives them again, or saves them as below."""
    save_checkpoint(str(path), 3, job.tables.shard_views(), {}, job.ranks)

    def load(other: Job) -> None:
        with CheckpointReader(latest_checkpoint(str(path))) as reader:
            load_shards(reader, other.tables.shard_views())

    return load


def library_with_rates(job: Job, path: Path) -> Callable[[Job], None]:
    state = {"optimizer": job.optimizer.state_dict()}
    save_checkpoint(str(path), 3, job.tables.shard_views(), state, job.ranks)

    def load(other: Job) -> None:
        with CheckpointReader(latest_checkpoint(str(path))) as reader:
            load_shards(reader, other.tables.shard_views())
            other.optimizer.load_state_dict(reader.state["optimizer"])

    return load


def background_delta(job: Job, path: Path) -> Callable[[Job], None]:
    saver = CheckpointSaver(str(path), job.ranks, job.ranks, SaveOptions(full_every=2))
    saver.save(2, job.tables.shard_views(), {})
    saver.save(3, job.tables.shard_views(), {})
    saver.settle()
    with CheckpointReader(latest_checkpoint(str(path))) as reader:
        assert reader.manifest.parent is not None

    def load(other: Job) -> None:
        compacted = compact(latest_checkpoint(str(path)), str(path / "compacted"))
        with CheckpointReader(compacted) as reader:
            load_shards(reader, other.tables.shard_views())

    return load


def trainer(job: Job, path: Path) -> Callable[[Job], None]:
    def checkpoints(of: Job, step: int) -> Checkpoints:
        task = Task(model=None, tables=of.tables, optimizer=of.optimizer, batches=None)
        state = TrainState()
        state.step = step
        policy = SavePolicy(options=SaveOptions(mode="sync"))
        return Checkpoints(str(path), task, state, facts={"data_fingerprint": "x"}, policy=policy, ranks=of.ranks)

    checkpoints(job, 3).save(is_last=True)

    def load(other: Job) -> None:
        assert checkpoints(other, 0).restore()

    return load


def state_dict_file(job: Job, path: Path) -> Callable[[Job], None]:
    torch.save({"tables": job.tables.state_dict(), "optimizer": job.optimizer.state_dict()}, path / "saved.pt")

    def load(other: Job) -> None:
        saved = torch.load(path / "saved.pt", weights_only=True)
        other.tables.load_state_dict(saved["tables"])
        other.optimizer.load_state_dict(saved["optimizer"])

    return load


def torch_dcp(job: Job, path: Path) -> Callable[[Job], None]:
    def everything(of: Job) -> dict:
        return {"tables": of.tables.state_dict(), "rows": get_optimizer_state_dict(of.tables, of.optimizer)}

    dcp.save(everything(job), checkpoint_id=path / "dcp", no_dist=True)

    def load(other: Job) -> None:
        saved = everything(other)
        dcp.load(saved, checkpoint_id=path / "dcp", no_dist=True)
        other.tables.load_state_dict(saved["tables"])
        set_optimizer_state_dict(other.tables, other.optimizer, saved["rows"])

    return load


def torch_dcp_of_tables_alone(job: Job, path: Path) -> Callable[[Job], None]:
    dcp.save(job.tables.state_dict(), checkpoint_id=path / "dcp", no_dist=True)

    def load(other: Job) -> None:
        saved = other.tables.state_dict()
        dcp.load(saved, checkpoint_id=path / "dcp", no_dist=True)
        other.tables.load_state_dict(saved)

    return load


DOORS = {
    door.__name__: door for door in (library, library_with_rates, background_delta, trainer, state_dict_file, torch_dcp)
} | {"torch_dcp_of_tables_alone": torch_dcp_of_tables_alone}
LEAVE_RATES_TO_THE_CALLER = ("library", "background_delta", "trainer", "torch_dcp_of_tables_alone")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", [*et.optim.OPTIMIZERS, "combined"])
def test_a_further_step_after_loading_is_the_uninterrupted_one(kind: str, door: str, tmp_path: Path) -> None:
    job, other = Job(kind), Job(kind)
    for number in range(3):
        job.step(number)
    load = DOORS[door](job, tmp_path)
    rates = [group["lr"] for group in job.optimizer.param_groups]
    load(other)
    if door in LEAVE_RATES_TO_THE_CALLER:
        for group, rate in zip(other.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    for each in (job, other):
        each.step(3)
    found, expected = other.whole(), job.whole()
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    groups, expected_groups = (each.optimizer.state_dict()["param_groups"] for each in (other, job))
    assert [group["step"] for group in groups] == [group["step"] for group in expected_groups] == [4] * len(groups)


@pytest.mark.parametrize("kind", ["adam", "adagrad"])
@pytest.mark.parametrize(("saved_on", "loaded_on"), [(1, 2), (2, 3), (2, 1)])
def test_the_count_of_steps_loads_on_any_number_of_ranks(
    kind: str, saved_on: int, loaded_on: int, tmp_path: Path
) -> None:
    def save(ranks: Ranks) -> None:
        job = Job(kind, ranks)
        for number in range(3):
            job.step(number)
        library(job, tmp_path)

    def load(ranks: Ranks) -> tuple[list[int], dict[str, torch.Tensor]]:
        job = Job(kind, ranks)
        with CheckpointReader(latest_checkpoint(str(tmp_path))) as reader:
            load_shards(reader, job.tables.shard_views())
        counts = [group["step"] for group in job.optimizer.param_groups]
        ids = torch.tensor([1, 2, 2])
        sum(part.sum() for part in job.tables({spec.name: ids for spec in SPECS}).values()).backward()
        job.optimizer.step()
        return counts, job.whole()

    run_threads(saved_on, save)
    (_, alone), *_ = run_threads(1, load)
    for counts, rows in run_threads(loaded_on, load):
        assert counts == [3] * len(counts)
        for name, tensor in alone.items():
            # Every rank adds the same gradient, and the mean of equal numbers is the number, if not to the last bit.
            torch.testing.assert_close(rows[name], tensor, rtol=1e-5, atol=1e-6)
