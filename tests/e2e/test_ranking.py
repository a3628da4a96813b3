"""A ranking model from the command line: trained, measured, killed and resumed, refused."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from tests import launching
from tests.e2e.conftest import Job, Wait, ranks_of
from tests.records import without_costs

HEADER = "label,x0,x1,user,shop,tags"


def write_clicks(path: Path, num_lines: int, seed: int) -> None:
    """Clicks depend on the shop, on one tag and on a number."""
    generator = np.random.default_rng(seed)
    lines = [HEADER]
    for _ in range(num_lines):
        user, shop = (generator.random(2) ** 3 * (200, 30)).astype(int)
        tags = generator.integers(0, 20, generator.integers(0, 4))
        x = generator.normal(size=2)
        logit = (shop % 5) - 2 + x[0] + (1.5 if 7 in tags else 0)
        label = int(generator.random() < 1 / (1 + np.exp(-logit)))
        lines.append(f"{label},{x[0]:.3f},{x[1]:.3f},{user},s{shop},{'|'.join(map(str, tags))}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def clicks(tmp_path: Path) -> Job:
    write_clicks(tmp_path / "train.csv", 4000, seed=1)
    write_clicks(tmp_path / "valid.csv", 1000, seed=2)
    (tmp_path / "config.yaml").write_text(
        "model: ranking\n"
        "data:\n"
        "  path: train.csv\n"
        "  valid_path: valid.csv\n"
        "  dense: [x0, x1]\n"
        "  dense_transform: none\n"
        "  categorical: [user, shop, tags]\n"
        "  features: {user: {num_rows: 100, dim: 4}, tags: {bag: true, pooling: sum}}\n"
        "  cache_path: cache\n"
        "table: {dim: 8}\n"
        "ranking: {top: [16]}\n"
        "train: {epochs: 3, global_batch_size: 64}\n"
        "dense_optimizer: {lr: 0.01}\n"
        "checkpoint: {every_steps: 40, keep_last: 2}\n"
        "log: {every_steps: 20, tensorboard: false}\n"
    )
    return Job(tmp_path)


def arguments(run: str, *overrides: str) -> list[str]:
    return ["train", "config.yaml", f"run.path={run}", *overrides]


def metrics(job: Job, run: str) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (job.folder / run / "metrics.jsonl").read_text().splitlines()]
    return [without_costs(record) for record in records]


def tensors(job: Job, run: str) -> dict[str, torch.Tensor]:
    """All that was trained: rows and network with their optimizers' states."""
    path = latest_checkpoint(str(job.folder / run / "checkpoints"))
    assert path is not None
    with CheckpointReader(path) as reader:
        rows = {name: reader.read(name, 0, info.shape[0]) for name, info in reader.tensors.items()}
        return rows | dict(reader.replicated())


def kill_a_rank(job: Job, run: str, wait_until: Wait, ranks: int) -> None:
    launcher = job.start(*arguments(run), ranks=ranks)
    folder = job.folder / run / "checkpoints"
    wait_until(lambda: len(list(folder.glob("step-*/manifest.json"))) >= 2, launcher)
    ranks_of(launcher)[-1].send_signal(signal.SIGKILL)
    launcher.communicate(timeout=60)


def check_shops(job: Job, run: str) -> None:
    """Asserts that a run has written which value of the column each row is."""
    values = pq.read_table(job.folder / run / "features" / "shop.parquet").to_pydict()
    assert sorted(values["value"]) == sorted({f"s{shop}" for shop in range(30)} & set(values["value"]))
    assert values["row"] == list(range(1, len(values["row"]) + 1))


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_and_on_other_ranks_by_the_same_curve(clicks: Job, wait_until: Wait) -> None:
    whole = clicks.run(*arguments("whole"), ranks=2)
    assert whole.returncode == 0, whole.stderr
    final = metrics(clicks, "whole")[-1]
    assert final["valid_auc"] > 0.75
    assert 0.8 < final["valid_calibration"] < 1.25
    check_shops(clicks, "whole")

    kill_a_rank(clicks, "killed", wait_until, ranks=2)
    resumed = clicks.run(*arguments("killed"), ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    expected, found = tensors(clicks, "whole"), tensors(clicks, "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert metrics(clicks, "killed") == metrics(clicks, "whole")

    kill_a_rank(clicks, "moved", wait_until, ranks=2)
    moved = clicks.run(*arguments("moved"))
    assert moved.returncode == 0, moved.stderr
    for ours, theirs in zip(metrics(clicks, "moved"), metrics(clicks, "whole"), strict=True):
        # The order of float32 sums differs, and training carries the difference on. Distinct ids are counted by rank.
        for record in (ours, theirs):
            for name in ("ids/distinct", "ids/hottest_share"):
                record.pop(name, None)
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("ranks", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_tables_have_optimizers_of_their_own_through_a_resume(clicks: Job, wait_until: Wait, ranks: int | None) -> None:
    own = ["optimizer.tables.shop={name: adam, lr: 0.01}", "optimizer.tables.tags.lr=0.3", "train.epochs=4"]
    whole = clicks.run(*arguments("whole", *own), ranks=ranks)
    assert whole.returncode == 0, whole.stderr
    expected = tensors(clicks, "whole")
    assert {name for name in expected if name.startswith("shop/")} == {"shop/weight", "shop/exp_avg", "shop/exp_avg_sq"}
    assert {name for name in expected if name.startswith("user/")} == {"user/weight", "user/accumulator"}
    check_shops(clicks, "whole")
    assert metrics(clicks, "whole")[-1]["valid_auc"] > 0.7
    rates = metrics(clicks, "whole")[0]
    factor = rates["learning_rate"] / 0.05
    assert rates["learning_rate/shop"] == pytest.approx(0.01 * factor)
    assert rates["learning_rate/tags"] == pytest.approx(0.3 * factor)

    started = clicks.start(*arguments("apart", *own), ranks=ranks)
    wait_until(lambda: list((clicks.folder / "apart" / "checkpoints").glob("step-*/manifest.json")), started)
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)
    resumed = clicks.run(*arguments("apart", *own), ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    assert all(torch.equal(tensors(clicks, "apart")[name], tensor) for name, tensor in expected.items())
    other = clicks.run(*arguments("apart", *own[1:]))
    assert other.returncode == 2
    assert "optimizer.tables.shop.name" in other.stderr


def test_another_log_on_a_run_folder_is_refused(clicks: Job) -> None:
    assert clicks.run(*arguments("run", "train.epochs=1")).returncode == 0
    write_clicks(clicks.folder / "train.csv", 4000, seed=9)
    refused = clicks.run(*arguments("run", "train.epochs=1"))
    assert refused.returncode == 2
    assert "was trained on other data" in refused.stderr.splitlines()[-1]


def test_a_column_that_does_not_exist_is_told_in_one_line(clicks: Job) -> None:
    refused = clicks.run(*arguments("run", "data.dense=[x0,y1]"), ranks=2)
    assert refused.returncode == 1  # torchrun's own
    lines = [line for line in refused.stderr.splitlines() if line.startswith("embedtrain: error")]
    (line,) = lines
    assert "train.csv: there is no column 'y1'; its columns are 'label', 'x0', 'x1', 'user', 'shop', 'tags'" in line


@pytest.mark.slow
def test_training_comes_near_a_planted_model(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "benchmarks" / "planted_clicks.py"), "--examples", "200000", "--rows", "5000"]
    done = launching.run([*command, "--ranks", "1", "--tolerance", "0.02", "--work", str(tmp_path)], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5,015 rows" in done.stdout
