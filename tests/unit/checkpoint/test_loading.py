"""What differs between a checkpoint and a model is loaded when asked for, never silently."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import embedtrain as et
from embedtrain.checkpoint import CheckpointReader, LoadOptions, ShardView, load_shards, save_checkpoint
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import CheckpointError, CorruptCheckpointError, UserError
from embedtrain.train.checkpoints import Checkpoints, ResumePolicy, SavePolicy
from embedtrain.train.state import TrainState
from embedtrain.train.task import Task
from tests.unit.checkpoint.example import LAYOUT, example_tables, save, views_of


@pytest.mark.parametrize(("saved_as", "loaded_as"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_dtypes_are_converted_when_asked_for(saved_as: torch.dtype, loaded_as: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(50, 3).to(saved_as)
    path = save_checkpoint(str(tmp_path), 1, [ShardView("t/weight", (50, 3), 0, values, LAYOUT)], {}, ONE_PROCESS)
    shard = ShardView("t/weight", (50, 3), 10, torch.zeros(20, 3, dtype=loaded_as), LAYOUT)
    with CheckpointReader(path) as reader:
        with pytest.raises(CheckpointError, match=f"{saved_as} in the checkpoint, {loaded_as} in the model"):
            load_shards(reader, [shard])
        assert load_shards(reader, [shard], LoadOptions(convert_dtype=True)) == []
    assert torch.equal(shard.tensor, values[10:30].to(loaded_as))


def test_the_optimizers_state_is_left_out_when_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path, 1, example_tables())
    tables = {name: torch.zeros_like(table) for name, table in example_tables().items()}
    tables["item/momentum"] = tables.pop("item/accumulator")
    with CheckpointReader(path) as reader:
        with pytest.raises(CheckpointError, match="item/momentum: missing"):
            load_shards(reader, views_of(tables))
        left_out = load_shards(reader, views_of(tables), LoadOptions(optimizer_state="reset"))
    assert left_out == ["item/momentum"]
    assert torch.equal(tables["item/weight"], example_tables()["item/weight"])
    assert not tables["item/momentum"].any()


def test_tables_are_loaded_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, 1, example_tables())
    tables = {name: torch.zeros_like(table) for name, table in example_tables().items()}
    tables["word/weight"] = torch.zeros(99, 7)
    tables["new/weight"] = torch.zeros(2, 2)
    with CheckpointReader(path) as reader:
        left_out = load_shards(reader, views_of(tables), LoadOptions(tables=["item"]))
        for table in ("new", "nothing"):
            with pytest.raises(UserError, match=f"cannot load table {table}: .* has only"):
                load_shards(reader, views_of(tables), LoadOptions(tables=["item", table]))
    assert left_out == ["word/weight", "new/weight"]
    assert torch.equal(tables["item/accumulator"], example_tables()["item/accumulator"])
    assert not tables["word/weight"].any()


def run_of(
    path: Path, facts: dict[str, Any] | None = None, **resume: object
) -> tuple[Checkpoints, et.EmbeddingCollection, TrainState]:
    tables = et.EmbeddingCollection([et.TableSpec("t", 20, 4), et.TableSpec("other", 20, 8)])
    optimizer = et.optim.RowwiseAdagrad(tables)
    state = TrainState()
    checkpoints = Checkpoints(
        str(path),
        Task(model=None, tables=tables, optimizer=optimizer, batches=None),
        state,
        facts={"data_fingerprint": "x"} if facts is None else facts,
        policy=SavePolicy(),
        resume=ResumePolicy(**resume),
        ranks=ONE_PROCESS,
    )
    return checkpoints, tables, state


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Four checkpoints, the newest two of them damaged."""
    checkpoints, tables, state = run_of(tmp_path)
    for step in (1, 2, 3, 4):
        state.step = step
        tables.shards["t"].weight.fill_(step)
        checkpoints.save(is_last=True)
    for step in (3, 4):
        file = next((tmp_path / f"step-00000000{step}").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"\x99")
    # keep_last is 3 by default in the configuration, and none here: all four are there.
    assert len(list(tmp_path.iterdir())) == 4
    return tmp_path


def test_a_damaged_checkpoint_is_refused_and_an_older_one_named(damaged: Path) -> None:
    checkpoints, _, _ = run_of(damaged)
    with pytest.raises(CorruptCheckpointError) as caught:
        checkpoints.restore()
    assert "step-000000004" in str(caught.value)
    assert f"{damaged}/step-000000002 is the newest that is whole: resume.on_corrupt=fallback" in str(caught.value)
    assert len(list(damaged.iterdir())) == 4


def test_a_damaged_checkpoint_is_passed_over_when_asked_for(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints, tables, state = run_of(damaged, on_corrupt="fallback")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.restore()
    assert state.step == 2
    assert bool((tables.shards["t"].weight == 2).all())
    assert sum("is damaged and is deleted" in record.message for record in caplog.records) == 2
    assert sorted(path.name for path in damaged.iterdir()) == ["step-000000001", "step-000000002"]
    state.step = 3
    checkpoints.save(is_last=True)
    assert (damaged / "step-000000003" / "manifest.json").exists()


def test_without_a_whole_checkpoint_nothing_is_deleted(damaged: Path) -> None:
    for step in (1, 2):
        (damaged / f"step-00000000{step}" / "manifest.json").write_text("{}")
    with pytest.raises(CorruptCheckpointError, match="No older checkpoint is whole"):
        run_of(damaged)[0].restore()
    with pytest.raises(CorruptCheckpointError, match=r"none of the checkpoints .* is whole"):
        run_of(damaged, on_corrupt="fallback")[0].restore()
    assert len(list(damaged.iterdir())) == 4


@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        ({}, "data_fingerprint is missing"),
        ({"data_fingerprint": "x", "row_names": {"t": {"encoding": 1}}}, "row_names.t.encoding: expected a valid str"),
    ],
)
def test_facts_that_no_run_could_resume_from_are_refused_before_it_is_trained(
    facts: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"a checkpoint cannot hold the facts of this run.*{fault}"):
        run_of(tmp_path, facts)


def test_a_table_that_starts_anew_counts_its_steps_anew(tmp_path: Path) -> None:
    checkpoints, tables, state = run_of(tmp_path)
    for group in tables.table_groups:
        group.steps.restore(7)
    state.step = 7
    checkpoints.save(is_last=True)
    checkpoints, tables, state = run_of(tmp_path, load=LoadOptions(tables=["t"]))
    assert checkpoints.restore()
    assert [group.steps.value for group in tables.table_groups] == [7, 0]


def test_a_checkpoint_of_before_tables_had_counts_of_their_own_brings_that_of_its_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, tables, state = run_of(tmp_path)
    for group in tables.table_groups:
        group.steps.restore(7)
    state.step = 7
    monkeypatch.setattr("embedtrain.checkpoint.saver.table_steps", lambda shards: {})
    checkpoints.save(is_last=True)
    checkpoints, tables, _ = run_of(tmp_path)
    assert checkpoints.restore()
    assert [group.steps.value for group in tables.table_groups] == [7, 7]


def test_counts_of_steps_of_tables_that_share_an_optimizer_do_not_differ(tmp_path: Path) -> None:
    apart = et.EmbeddingCollection([et.TableSpec("a", 9, 4), et.TableSpec("b", 9, 4, optimizer="other")])
    optimizers = [et.optim.SGD(apart.trained_by(name)) for name in ("default", "other")]
    for group, steps in zip(apart.table_groups, (3, 5), strict=True):
        group.steps.restore(steps)
    path = save_checkpoint(str(tmp_path), 1, apart.shard_views(), {}, ONE_PROCESS)
    together = et.EmbeddingCollection([et.TableSpec("a", 9, 4), et.TableSpec("b", 9, 4)])
    optimizers.append(et.optim.SGD(together))
    message = "a and b share an optimizer in the model, but the checkpoint has 3 steps for a and 5 steps for b"
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError, match=message):
        load_shards(reader, together.shard_views())
