"""What a run reads later is opened and parsed before its first step; a measurement that fails loses nothing."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from embedtrain.cli import main
from embedtrain.distributed.failure import is_shared
from embedtrain.distributed.runtime import Runtime
from embedtrain.recipes.word2vec import recipe as word2vec

LOG = "log={every_steps: 5, tensorboard: false}"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a b c d\n" * 200)
    Path("pairs.tsv").write_text("a\tb\t3\nc\td\t1\na\td\t2\n")
    rows = "".join(f"u{n % 7},i{n % 5},{n % 2}\n" for n in range(64))
    Path("rows.csv").write_text("user,item,label\n" + rows)
    Path("config.yaml").write_text("table: {dim: 4}\n")


def train(model: str, *settings: str) -> list[str]:
    own = {
        "word2vec": ["data.path=text.txt", "train={epochs: 2, words_per_step: 64, block_words: 32}", "table.dim=4"],
        "retrieval": ["data.path=rows.csv", "train={epochs: 2, global_batch_size: 4}", "evaluate.path=rows.csv"],
        "ranking": [
            "data.path=rows.csv",
            "data.categorical=[user,item]",
            "train={epochs: 2, global_batch_size: 32}",
            "data.valid_path=rows.csv",
        ],
    }[model]
    return ["train", "config.yaml", f"model={model}", *own, "data.cache_path=cache", "run.path=run", LOG, *settings]


@pytest.mark.parametrize("how", [[], ["--dry-run"]], ids=["train", "dry-run"])
@pytest.mark.parametrize(
    ("model", "setting", "said"),
    [
        ("word2vec", "evaluate.similarity=none.tsv", "evaluate.similarity: none.tsv: no such file"),
        ("word2vec", "evaluate.similarity=[pairs.tsv,bad.tsv]", "evaluate.similarity: bad.tsv, line 2: expected two"),
        ("word2vec", "evaluate.similarity=few.tsv", "evaluate.similarity: few.tsv: expected at least two lines"),
        ("word2vec", "init_from=none.vec", "init_from: none.vec: no such file"),
        ("word2vec", "init_from=wide.vec", "init_from: "),
        ("word2vec", "data.base_vocabulary=none.tsv", "data.base_vocabulary: there is no file none.tsv"),
        ("retrieval", "items.init_from=wide.vec", "items.init_from: "),
        ("retrieval", "users.base_vocabulary=none.tsv", "none.tsv: no such file"),
        ("retrieval", "evaluate.path=none.csv", "none.csv: no such file"),
        ("ranking", "data.features.user.init_from=wide.vec", "data.features.user.init_from: "),
        ("ranking", "data.valid_path=none.csv", "none.csv: no such file"),
    ],
)
def test_what_is_read_later_is_refused_before_the_first_step(
    model: str, setting: str, said: str, how: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("bad.tsv").write_text("a\tb\t3\na\tb\tc\td\te\n")
    Path("few.tsv").write_text("a\tb\t3\n")
    Path("wide.vec").write_text("1 3\na 1 2 3\n")
    assert main([*train(model, setting), *how]) == 2
    assert said in capfd.readouterr().err
    assert not Path("run/checkpoints").exists()
    assert not list(Path("cache").glob("*/meta.json")), "refused before the data are prepared"


def test_a_dry_run_reads_vectors_to_their_end(capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.vec").write_text("a 1 2 3 4\nb 1 2 3 x\n")
    assert main([*train("word2vec", "init_from=bad.vec"), "--dry-run"]) == 2
    assert "line 2" in capfd.readouterr().err


def test_a_measurement_that_fails_is_warned_of_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("no pairs left")

    assert main(train("word2vec", "run.path=whole")) == 0
    monkeypatch.setattr(word2vec, "evaluate_similarity", fail)
    assert main(train("word2vec", "evaluate.similarity=pairs.tsv")) == 0
    steps = [path.name for path in sorted(Path("run/checkpoints").iterdir())]
    whole = [path.name for path in sorted(Path("whole/checkpoints").iterdir())]
    assert steps[-1] == whole[-1]
    assert len(steps) == 2, "saved when the first measurement failed"
    assert json.loads(Path("run/status.json").read_text())["state"] == "done"
    said = caplog.text + capfd.readouterr().err
    assert "training continues without its measures: ZeroDivisionError: no pairs left" in said


def test_tensorboard_that_cannot_be_written_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    assert main(train("word2vec", "log.tensorboard=true")) == 0
    assert caplog.text.count("TensorBoard gets no more records of this run") == 1


def find_shared(failing: list[int], store: dist.Store) -> dict[int, bool]:
    found: dict[int, bool] = {}

    def rank(number: int) -> None:
        ranks: Any = SimpleNamespace(rank=number, size=2)
        found[number] = is_shared(ValueError("x"), Runtime(ranks, 0, torch.device("cpu"), store))

    threads = [threading.Thread(target=rank, args=(number,)) for number in failing]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("failing", [[0, 1], [1]])
def test_ranks_tell_a_failure_of_all_from_a_failure_of_one(failing: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedtrain.distributed.failure.GRACE_SECONDS", 0.3)
    assert find_shared(failing, dist.HashStore()) == dict.fromkeys(failing, len(failing) == 2)


def test_a_failure_of_all_in_an_earlier_run_of_the_job_is_not_taken_for_one_of_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("embedtrain.distributed.failure.GRACE_SECONDS", 0.3)
    store = dist.HashStore()
    assert find_shared([0, 1], store) == {0: True, 1: True}
    assert find_shared([1], store) == {1: False}


def test_a_failure_of_the_group_is_not_shared() -> None:
    runtime: Any = SimpleNamespace(rank=0, world_size=1, store=None)
    assert is_shared(ValueError("x"), runtime)
    assert not is_shared(RuntimeError("[gloo] connection closed"), runtime)
