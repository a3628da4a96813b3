"""The loop with a model that has tables and a dense part: stopped anywhere, it goes on to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import embedtrain as et
from embedtrain.checkpoint import SaveOptions, find_checkpoints
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.errors import CorruptCheckpointError, NonFiniteError, UserError
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.testing.ranks import run_ranks
from embedtrain.train.checkpoints import Checkpoints, ResumePolicy, SavePolicy
from embedtrain.train.state import TrainState
from embedtrain.train.task import Evaluation, Objective, Task
from embedtrain.train.trainer import Trainer
from tests.records import without_costs

NUM_ROWS, DIM, EPOCHS, STEPS_PER_EPOCH, GLOBAL_BATCH = 30, 4, 3, 7, 12


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    labels: Tensor

    @property
    def num_examples(self) -> int:
        return len(self.ids)


class Batches:
    steps_per_epoch = STEPS_PER_EPOCH
    examples_per_epoch = STEPS_PER_EPOCH * GLOBAL_BATCH

    def __init__(self, ranks: Ranks) -> None:
        share = GLOBAL_BATCH // ranks.size
        self._part = slice(ranks.rank * share, (ranks.rank + 1) * share)

    def batch(self, epoch: int, step: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * epoch + step)
        ids = torch.randint(NUM_ROWS, (GLOBAL_BATCH,), generator=generator)[self._part]
        return Batch(ids, (ids % 2).float())


class Model(nn.Module):
    """Parity of an id, by a linear layer on its row."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.tables = et.EmbeddingCollection([et.TableSpec("t", NUM_ROWS, DIM)], ranks=ranks)
        torch.manual_seed(3)
        self.dense = nn.Linear(DIM, 1)

    def forward(self, batch: Batch) -> Objective:
        logits = self.dense(self.tables({"t": et.Jagged.from_ids(batch.ids)})["t"]).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        total = loss.detach().double() * len(batch.ids)
        sums = torch.stack([logits.detach().sigmoid().sum(), batch.labels.sum()]).double()
        return Objective(loss, total, len(batch.ids), sums)


class Records:
    def __init__(self) -> None:
        self.records: list[dict[str, float | int | str]] = []

    def log(self, record: Mapping[str, float | int | str]) -> None:
        self.records.append(without_costs(record))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def calibration(sums: Tensor) -> dict[str, float]:
    return {"calibration": float(sums[0] / sums[1])}


def run_of(
    path: Path, ranks: Ranks = ONE_PROCESS, dense_lr: float = 0.05, **options: object
) -> tuple[Trainer, Model, DenseOptimizer]:
    model = Model(ranks)
    dense = DenseOptimizer(model.dense, ranks=ranks, lr=dense_lr, name=str(options.pop("dense", "adam")))

    def measure(alive: Callable[[], None]) -> dict[str, float]:
        alive()
        return {"weight": float(model.dense.weight.detach().abs().sum())}

    nonfinite = options.pop("nonfinite", "error")
    task = Task(
        model,
        model.tables,
        et.optim.RowwiseAdagrad(model.tables, lr=0.1, nonfinite=nonfinite),
        Batches(ranks),
        dense=dense,
        evaluation=Evaluation(measure, every_epochs=1),
        summarize=calibration,
    )
    state = TrainState()
    policy = SavePolicy(every_steps=5, every_seconds=None, options=SaveOptions("sync"))
    facts = {"data_fingerprint": "x"}
    checkpoints = Checkpoints(
        str(path), task, state, facts=facts, policy=policy, ranks=ranks, resume=ResumePolicy(**options)
    )
    checkpoints.restore()
    trainer = Trainer(task, state, epochs=EPOCHS, schedule=lambda done: 1 - done, checkpoints=checkpoints, ranks=ranks)
    return trainer, model, dense


def result(model: Model, dense: DenseOptimizer) -> dict[str, Tensor]:
    tables = {kind: model.tables.gather_table("t", kind).clone() for kind in ("weight", "accumulator")}
    return {**tables, **{name: tensor.clone() for name, tensor in dense.tensors().items()}}


class KilledError(Exception):
    pass


def whole_run(ranks: Ranks, path: Path) -> tuple[dict[str, Tensor], list[dict]]:
    trainer, model, dense = run_of(path, ranks)
    sink = Records()
    assert trainer.run([sink], 4)
    return result(model, dense), sink.records


def killed_run(ranks: Ranks, path: Path, at: int) -> None:
    trainer, _, _ = run_of(path, ranks)

    def strike() -> None:
        if trainer.state.step == at:
            raise KilledError

    with pytest.raises(KilledError):
        trainer.run([], 4, on_step=strike)


def killed_and_whole(ranks: Ranks, path: Path) -> tuple[dict[str, Tensor], list[dict]]:
    killed_run(ranks, path, at=13)
    return whole_run(ranks, path)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_killed_run_ends_where_it_would_have(tmp_path: Path, ranks: int) -> None:
    if ranks == 1:
        whole = [whole_run(ONE_PROCESS, tmp_path / "whole")]
        resumed = [killed_and_whole(ONE_PROCESS, tmp_path / "killed")]
    else:
        whole = run_ranks(ranks, whole_run, tmp_path / "whole")
        resumed = run_ranks(ranks, killed_and_whole, tmp_path / "killed")
    for (expected, records), (found, later_records) in zip(whole, resumed, strict=True):
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name
        # The steps since the last record before the kill are in the first record after it.
        assert later_records == [record for record in records if record["step"] > 10]


def test_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    killed_run(ONE_PROCESS, tmp_path / "moved", at=13)
    expected, _ = whole_run(ONE_PROCESS, tmp_path / "whole")
    for found, _ in run_ranks(3, whole_run, tmp_path / "moved"):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_losses_measures_and_counters_are_logged(tmp_path: Path) -> None:
    _, records = whole_run(ONE_PROCESS, tmp_path)
    logged = [record for record in records if "loss" in record]
    measured = [record for record in records if "weight" in record]
    assert [record["step"] for record in logged] == [4, 8, 12, 16, 20, 21]
    assert [record["step"] for record in measured] == [7, 14, 21]
    assert [record["epoch"] for record in measured] == [1, 2, 3]
    assert logged[-1]["examples"] == EPOCHS * STEPS_PER_EPOCH * GLOBAL_BATCH
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert 0.3 < logged[-1]["calibration"] < 3
    newest = find_checkpoints(str(tmp_path))[-1]
    assert newest.step == 21


def test_counters_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    trainer, _, _ = run_of(tmp_path)
    trainer.state.step, trainer.state.epoch = 99, 3
    trainer._checkpoints.save(is_last=True)
    with pytest.raises(CorruptCheckpointError, match="are step 99, 3 epochs and 0 steps, which do not add up with 7"):
        run_of(tmp_path)


def test_the_newest_measures_are_saved_for_the_choice_of_the_best(tmp_path: Path) -> None:
    trainer, _, _ = run_of(tmp_path)
    trainer.run([], 4)
    again, _, _ = run_of(tmp_path)
    assert set(again._checkpoints.metrics) >= {"loss", "calibration", "weight"}


def test_another_dense_optimizer_is_refused_unless_its_state_starts_anew(tmp_path: Path) -> None:
    killed_run(ONE_PROCESS, tmp_path, at=6)
    with pytest.raises(UserError, match="holds the state of Adam, and this run's dense optimizer is Adagrad"):
        run_of(tmp_path, dense="adagrad")
    from embedtrain.checkpoint import LoadOptions

    trainer, _, _ = run_of(tmp_path, dense="adagrad", load=LoadOptions(optimizer_state="reset"))
    assert trainer.state.step == 5


def test_a_gradient_of_the_dense_part_that_is_not_finite_stops_or_skips_the_step(tmp_path: Path) -> None:
    trainer, model, _ = run_of(tmp_path / "stops", dense_lr=0.0)
    model.dense.bias.register_hook(lambda grad: grad * torch.inf)
    before = model.tables.gather_table("t").clone()
    with pytest.raises(NonFiniteError, match="dense parameter bias is not finite"):
        trainer.run([], 4)
    assert torch.equal(model.tables.gather_table("t"), before)
    skipping, model, _ = run_of(tmp_path / "skips", nonfinite="skip")
    weight = model.dense.weight.detach().clone()
    model.dense.bias.register_hook(lambda grad: grad * torch.inf)
    sink = Records()
    skipping.run([sink], 4)
    assert torch.equal(model.dense.weight, weight)
    assert sink.records[-2]["skipped_steps"] == EPOCHS * STEPS_PER_EPOCH
