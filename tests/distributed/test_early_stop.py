"""Training ends when the metric gets no better, at the same step however often it was stopped; the best is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import embedtrain as et
from embedtrain.checkpoint import Retention, SaveOptions, find_checkpoints
from embedtrain.checkpoint.choice import choose_checkpoint
from embedtrain.cli import main
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.errors import UserError
from embedtrain.testing.threads import run_threads
from embedtrain.train.best import BestPolicy, BestWatch
from embedtrain.train.checkpoints import Checkpoints, SavePolicy
from embedtrain.train.state import TrainState
from embedtrain.train.task import Evaluation, Objective, Task
from embedtrain.train.trainer import Trainer

VALUES = [0.3, 0.5, 0.4, 0.7, 0.6, 0.65, 0.69, 0.1, 0.9, 1.0]
"""What is measured at steps 2, 4 and so on; the best before three without a better is that of step 8."""


class Batch:
    num_examples = 2
    ids = torch.tensor([0, 1])


class Batches:
    steps_per_epoch = 20
    examples_per_epoch = 40

    def batch(self, epoch: int, step: int) -> Batch:
        return Batch()


class Model(nn.Module):
    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.tables = et.EmbeddingCollection([et.TableSpec("t", 4, 2)], ranks=ranks)

    def forward(self, batch: Batch) -> Objective:
        loss = self.tables({"t": et.Jagged.from_ids(batch.ids)})["t"].sum()
        return Objective(loss, loss.detach().double(), 2)


class Records:
    def __init__(self) -> None:
        self.records: list[Mapping[str, float | int | str]] = []

    def log(self, record: Mapping[str, float | int | str]) -> None:
        self.records.append(record)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def trainer_of(path: Path, ranks: Ranks, policy: BestPolicy) -> Trainer:
    model, state = Model(ranks), TrainState()

    def measure(alive: Callable[[], None]) -> dict[str, float]:
        with torch.no_grad():
            model.tables({"t": et.Jagged.from_ids(torch.arange(4))})
        return {"valid_auc": VALUES[state.step // 2 - 1]}

    task = Task(
        model,
        model.tables,
        et.optim.RowwiseAdagrad(model.tables, lr=0.1),
        Batches(),
        evaluation=Evaluation(measure, every_steps=2, every_epochs=None),
    )
    retention = Retention(keep_last=1, keep_best=policy.num_kept, best_metric=policy.metric, best_mode=policy.mode)
    every_steps = 3 if (policy.num_kept or 1) > 1 else None
    saves = SavePolicy(every_steps, every_seconds=None, options=SaveOptions("sync", retention=retention), best=policy)
    section = {"best_metric": policy.metric, "keep_best": policy.num_kept}
    facts = {"data_fingerprint": "x", "config": {"checkpoint": section}}
    checkpoints = Checkpoints(str(path / "checkpoints"), task, state, facts=facts, policy=saves, ranks=ranks)
    checkpoints.restore()
    return Trainer(task, state, epochs=1, schedule=lambda done: 1.0, checkpoints=checkpoints, ranks=ranks)


class NeverAsked:
    """In place of `Interrupt`: only a process's main thread hears signals."""

    is_asked = False

    def __enter__(self) -> NeverAsked:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedtrain.train.trainer.Interrupt", NeverAsked)


class KilledError(Exception):
    pass


def train(ranks: Ranks, path: Path, policy: BestPolicy, kills: tuple[int, ...] = ()) -> tuple[int, Tensor]:
    for kill in kills:
        trainer = trainer_of(path, ranks, policy)

        def strike(trainer: Trainer = trainer, at: int = kill) -> None:
            if trainer.state.step == at:
                raise KilledError

        with pytest.raises(KilledError):
            trainer.run([], 4, on_step=strike)
    trainer = trainer_of(path, ranks, policy)
    assert trainer.run([], 4)
    return trainer.state.step, trainer._task.tables.gather_table("t").clone()


@pytest.mark.parametrize("kills", [(), (3, 9, 15)])
def test_each_of_the_best_measurements_keeps_one_checkpoint(kills: tuple[int, ...], tmp_path: Path) -> None:
    # Those of steps 8, 18 and 20. Of every third step a checkpoint is saved too: that of step 9 holds the value of 8.
    policy = BestPolicy("valid_auc", num_kept=3)
    train(ONE_PROCESS, tmp_path, policy, kills)
    found = find_checkpoints(str(tmp_path / "checkpoints"))
    assert [info.step for info in found] == [8, 18, 20]


def test_only_a_measurement_among_the_best_is_saved(tmp_path: Path) -> None:
    watch = BestWatch(BestPolicy("valid_auc", num_kept=2), state := TrainState(), ONE_PROCESS)
    judged = []
    for value in VALUES:
        state.step += 2
        judged.append(watch.judge({"valid_auc": value}))
    # 0.3, 0.5 | 0.4 takes the place of 0.3, 0.7 and 0.65 that of less, 0.6 too; 0.69 is better than 0.65, 0.1 is not.
    assert judged == [True, True, True, True, True, True, True, False, True, True]
    assert state.best is not None and state.best.kept == (1.0, 0.9)
    assert not watch.judge({"valid_auc": 0.9}), "of equal ones the first stays"


PATIENT = BestPolicy("valid_auc", num_kept=1, patience=3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_killed_run_stops_at_the_step_where_it_would_have(size: int, tmp_path: Path) -> None:
    expected = train(ONE_PROCESS, tmp_path / "whole", PATIENT)
    assert expected[0] == 14
    for step, rows in run_threads(size, train, tmp_path / "killed", PATIENT, (3, 9, 11)):
        assert step == 14
        torch.testing.assert_close(rows, expected[1])
    found = [info.step for info in find_checkpoints(str(tmp_path / "killed/checkpoints"))]
    assert found == [8, 14], "the best one was saved when it was measured"
    # Given again, the command has nothing to do; with more patience it goes on.
    assert train(ONE_PROCESS, tmp_path / "killed", PATIENT)[0] == 14
    assert train(ONE_PROCESS, tmp_path / "killed", BestPolicy("valid_auc", num_kept=1, patience=5))[0] == 20
    assert [info.step for info in find_checkpoints(str(tmp_path / "killed/checkpoints"))] == [20]


@pytest.mark.parametrize(
    ("policy", "last"),
    [
        (BestPolicy("valid_auc", patience=1), 6),
        (BestPolicy("valid_auc", patience=3, min_delta=0.25), 14),
        (BestPolicy("valid_auc", patience=2, min_delta=0.45), 6),
        (BestPolicy("loss", patience=2), 20),
        (BestPolicy("loss", "max", patience=2), 12),
    ],
    ids=["patience", "min_delta", "large min_delta", "falling loss", "falling loss, the largest"],
)
def test_patience_and_min_delta_decide_when(policy: BestPolicy, last: int, tmp_path: Path) -> None:
    records = Records()
    trainer = trainer_of(tmp_path, ONE_PROCESS, policy)
    assert trainer.run([records], 4)
    assert trainer.state.step == last
    for name in ("loss", "valid_auc"):
        steps = [record["step"] for record in records.records if name in record]
        assert steps[-1] == last, "the last step is logged and measured, as the end of any run"
    looked_up = {record["ids/looked_up"] for record in records.records if "loss" in record}
    assert looked_up == {2}, "what the measurement before looked up does not count"


def test_the_end_is_told_without_contradiction(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="embedtrain")
    train(ONE_PROCESS, tmp_path / "once", BestPolicy("valid_auc", patience=1))
    train(ONE_PROCESS, tmp_path / "delta", BestPolicy("valid_auc", patience=2, min_delta=0.45))
    assert [record.message for record in caplog.records if "stopped early" in record.message] == [
        "stopped early at step 6, after 1 measurement of valid_auc without an improvement; the best was 0.5, at step 4",
        "stopped early at step 6, after 2 measurements of valid_auc without an improvement of more than 0.45; "
        "the best was 0.5, at step 4",
    ]


def test_a_value_that_is_not_finite_is_no_improvement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.distributed.test_early_stop.VALUES", [0.3, *[float("nan")] * 9])
    assert train(ONE_PROCESS, tmp_path, PATIENT)[0] == 8


def test_the_best_answers_if_the_run_kept_it_and_the_newest_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="embedtrain")
    train(ONE_PROCESS, tmp_path / "keeps", PATIENT)
    train(ONE_PROCESS, tmp_path / "not", BestPolicy("valid_auc"))

    def chosen(run: str, step: object) -> str:
        return choose_checkpoint(str(tmp_path / run / "checkpoints"), step, run)[-2:]  # type: ignore[arg-type]

    assert (chosen("keeps", None), chosen("keeps", "newest"), chosen("keeps", "best")) == ("08", "14", "08")
    assert "keeps: using the best checkpoint, step 8 (valid_auc 0.7)" in caplog.text
    assert "keeps: using the newest checkpoint, step 14" in caplog.text
    assert chosen("not", None) == "20"


def test_a_metric_that_no_record_has_is_told_of_with_the_first_measures(tmp_path: Path) -> None:
    wrong = BestPolicy("valid_acu", "max", num_kept=1)
    names = r"checkpoint\.best_metric=valid_acu: this run has no such metric; it has .*loss.*, valid_auc"
    unknown_before = trainer_of(tmp_path, ONE_PROCESS, wrong)
    with pytest.raises(UserError, match=names):
        unknown_before.run([], 4)
    assert unknown_before.state.step == 4


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            ["checkpoint.best_metric=valid_acu"],
            "checkpoint.best_metric=valid_acu: this run has no such metric; it has auc, calibration, examples, "
            "examples_per_second, learning_rate, loss, normalised_entropy, valid_auc, valid_calibration, "
            "valid_log_loss, valid_normalised_entropy",
        ),
        (["train.early_stop.patience=0"], "train.early_stop.patience must be at least 1, got 0"),
        (["train.early_stop.min_delta=-1"], "train.early_stop.min_delta must be at least 0, got -1"),
    ],
    ids=["metric", "patience", "min_delta"],
)
def test_a_mistake_is_told_before_the_first_step(
    settings: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.csv").write_text("user,item,label\n" + "".join(f"u{n},i{n % 3},{n % 2}\n" for n in range(32)))
    options = ["data.valid_path=train.csv", "data.cache_path=cache", "train.global_batch_size=32", "run.path=run"]
    Path("run.yaml").write_text("model: ranking\ndata: {path: train.csv, categorical: [user, item]}\n")
    assert main(["train", "run.yaml", *options, *settings]) == 2
    assert told in capfd.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
