"""A run is self-contained: moved and without its data it answers as before; and it goes on for further epochs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import embedtrain as et
from embedtrain.checkpoint import find_checkpoints, save_checkpoint
from embedtrain.cli import main
from embedtrain.distributed.ranks import ONE_PROCESS
from tests.records import contents, without_costs

Answer = Callable[..., str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    generator = np.random.default_rng(1)
    rows = [(n % 12, int(generator.integers(12)) * 3 + n % 3) for n in range(60)]
    held_out = [(n % 12, int(generator.integers(12)) * 3 + n % 3) for n in range(60)]
    for name, part in (("train", rows), ("test", held_out)):
        lines = [f"u{user},i{item},{(user + item) % 2},{item / 2}" for user, item in part]
        Path(f"data/{name}.csv").write_text("\n".join(["user,item,label,price", *lines]) + "\n")
    Path("data/items.csv").write_text("id,kind\n" + "".join(f"i{item},k{item % 3}\n" for item in range(36)))
    Path("data/text.txt").write_text("".join(f"w{i % 3} w{i % 5 + 3} w{i % 3}\n" for i in range(300)))
    Path("data/pairs.tsv").write_text("w0\tw1\t1\nw0\tw3\t3\nw1\tw4\t2\n")


SETTINGS = {
    "word2vec": [
        "data={path: data/text.txt, min_count: 1, tokenizer: whitespace}",
        "evaluate.similarity=data/pairs.tsv",
        "train={epochs: 2, words_per_step: 64, block_words: 32}",
        "word2vec.sample=0",
    ],
    "retrieval": [
        "data.path=data/train.csv",
        "evaluate={path: data/test.csv, k: [3]}",
        "items={path: data/items.csv, features: {kind: {}}, hidden: [4]}",
        "train={epochs: 2, global_batch_size: 4}",
    ],
    "ranking": [
        "data={path: data/train.csv, valid_path: data/test.csv, categorical: [user, item], dense: [price]}",
        "train={epochs: 2, global_batch_size: 32}",
    ],
}
ANSWERS = {
    "word2vec": [["evaluate"], ["neighbors", "w3"]],
    "retrieval": [["evaluate"], ["neighbors", "i3"], ["recommend", "u3", "u4"], ["neighbors", "u3", "--table", "user"]],
    "ranking": [["evaluate"]],
}
EXPORTED = {"word2vec": "input", "retrieval": "item", "ranking": "item"}


def train(model: str, *more: str, run: str = "run") -> list[str]:
    Path("config.yaml").write_text(f"model: {model}\ntable: {{dim: 4}}\nlog: {{every_steps: 2, tensorboard: false}}\n")
    return ["train", "config.yaml", *SETTINGS[model], "data.cache_path=cache", f"run.path={run}", *more]


@pytest.fixture
def answer(capfd: pytest.CaptureFixture[str]) -> Answer:
    def ask(*arguments: str) -> str:
        capfd.readouterr()
        status = main(list(arguments))
        captured = capfd.readouterr()
        assert status == 0, captured.err
        return captured.out

    return ask


def answers(model: str, run: str, answer: Answer, *more: str) -> list[str]:
    found = [answer(command, run, *rest, *more) for command, *rest in ANSWERS[model]]
    output = f"{model}.vectors"
    answer("export", run, "--table", EXPORTED[model], "--format", "glove", "--output", output, "--overwrite", *more)
    return [*found, Path(output).read_text()]


@pytest.mark.parametrize("model", ["word2vec", "retrieval", "ranking"])
def test_a_run_that_was_moved_answers_without_its_data(model: str, answer: Answer) -> None:
    answer(*train(model))
    before = answers(model, "run", answer)
    shutil.move("run", "moved")
    shutil.rmtree("data")
    shutil.rmtree("cache")
    assert answers(model, "moved", answer) == before
    assert not Path("cache").exists(), "nothing is prepared again"
    last = records_of("moved")[-1]
    measured = dict(reversed(line.split()) for line in before[0].splitlines())
    assert measured, "the run was measured"
    for name, value in measured.items():
        assert float(value) == pytest.approx(last[name], abs=1e-4), "as in training"


@pytest.fixture
def memory_run() -> Iterator[str]:
    yield "memory://moved-runs/run"
    fsspec.filesystem("memory").rm("/moved-runs", recursive=True)


@pytest.mark.parametrize("model", ["word2vec", "retrieval", "ranking"])
def test_a_run_on_another_file_system_has_its_data_there(model: str, memory_run: str, answer: Answer) -> None:
    answer(*train(model, run=memory_run))
    answer(*train(model))
    shutil.rmtree("data")
    shutil.rmtree("cache")
    assert answer("evaluate", memory_run) == answer("evaluate", "run")


def test_other_held_out_data_take_the_place_of_the_earlier(answer: Answer) -> None:
    answer(*train("retrieval"))
    before = answer("evaluate", "run")
    kept = contents(Path("run/kept_data"))
    answer(*train("retrieval"))
    assert contents(Path("run/kept_data")) == kept
    Path("data/test.csv").write_text("user,item,label,price\nu1,i5,1,0\n")
    answer(*train("retrieval"))
    assert answer("evaluate", "run") != before


def test_data_that_are_missing_are_named(answer: Answer, capfd: pytest.CaptureFixture[str]) -> None:
    answer(*train("retrieval"))
    expected = answer("recommend", "run", "u3")
    shutil.rmtree("run/kept_data")
    assert answer("recommend", "run", "u3") == expected, "the data are prepared again"
    Path("data/train.csv").unlink()
    assert main(["recommend", "run", "u3"]) == 2
    said = capfd.readouterr().err
    assert "run/kept_data is missing, which holds the training interactions, and the data cannot be read again" in said
    assert "data/train.csv: no such file" in said


@pytest.mark.parametrize("model", ["retrieval", "ranking"])
def test_data_that_are_too_many_stay_where_they_are(
    model: str, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("embedtrain.train.kept_data.MAX_KEPT_BYTES", 100)
        answer(*train(model))
        assert not Path("run/kept_data").exists()
        found = answer("evaluate", "run")
    answer(*train(model))
    assert Path("run/kept_data").exists()
    assert answer("evaluate", "run") == found


def test_raw_ids_have_one_home_and_are_those_of_the_run(answer: Answer, capfd: pytest.CaptureFixture[str]) -> None:
    answer(*train("retrieval"))
    names = Path("run/users.tsv")
    assert not (Path("run/kept_data") / names.name).exists()
    whole = names.read_text()
    names.write_text("".join(reversed(whole.splitlines(keepends=True))))
    assert main(["recommend", "run", "u3"]) == 2
    assert "run/users.tsv does not hold the raw ids of this run: restore it" in capfd.readouterr().err
    names.unlink()
    assert main(["recommend", "run", "u3"]) == 2
    assert "run/users.tsv is missing: restore it" in capfd.readouterr().err


def test_damage_of_kept_data_is_told_and_mended_by_training(answer: Answer, capfd: pytest.CaptureFixture[str]) -> None:
    answer(*train("retrieval"))
    expected = answer("evaluate", "run")
    assert "verified     run/kept_data" in answer("inspect", "run", "--verify")
    damaged = max(Path("run/kept_data").glob("held-out*"), key=lambda path: path.stat().st_size)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["inspect", "run", "--verify"]) != 0
    captured = capfd.readouterr()
    assert "damaged      run/kept_data" in captured.out
    assert f"{damaged} is damaged" in captured.err
    assert main(["evaluate", "run"]) != 0
    assert f"{damaged} is damaged" in capfd.readouterr().err
    answer(*train("retrieval"))
    assert answer("evaluate", "run") == expected


def test_the_users_own_files_are_refused_before_the_start(capfd: pytest.CaptureFixture[str]) -> None:
    Path("data").rename("kept_data")
    settings = [each.replace("data/", "kept_data/") for each in train("word2vec", run=".")]
    before = contents(Path("kept_data"))
    for without in ([], ["evaluate.similarity=null"]):
        assert main([*settings, *without]) == 2
        assert "./kept_data holds files that no run has written, such as items.csv" in capfd.readouterr().err
        assert contents(Path("kept_data")) == before
    assert not Path("checkpoints").exists()


def test_a_folder_of_data_in_the_run_folder_is_left_alone(answer: Answer) -> None:
    shutil.copytree("data", "project/data")
    before = contents(Path("project/data"))
    answer(*train("word2vec", "evaluate.similarity=null", "data.path=project/data/text.txt", run="project"))
    assert contents(Path("project/data")) == before


def test_a_run_that_did_not_grow_leaves_nothing_behind(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        assert Path("grown/kept_data/kept.json").exists()
        raise OSError("the disk is full")

    answer(*(each for each in train("retrieval") if not each.startswith("items=")))
    monkeypatch.setattr("embedtrain.recipes.growing.write_checkpoint", fail)
    assert main(["grow", "run", "grown", "data.path=data/test.csv"]) == 1
    assert not Path("grown").exists()


def records_of(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{run}/metrics.jsonl").read_text().splitlines()]


def weights(run: str, answer: Answer, *more: str) -> str:
    answer("export", run, "--format", "glove", "--output", "w", "--overwrite", *more)
    return Path("w").read_text()


def test_further_epochs_of_a_constant_rate_are_those_of_a_longer_run(answer: Answer) -> None:
    constant = "schedule.name=constant"
    answer(*train("word2vec", constant, run="long"), "train.epochs=4")
    answer(*train("word2vec", constant, run="short"))
    answer(*train("word2vec", constant, run="short"), "train.epochs=4")
    assert weights("short", answer) == weights("long", answer)
    last = [records_of(run)[-1] for run in ("short", "long")]
    assert without_costs(last[0]) == without_costs(last[1])


def test_the_rate_of_further_epochs_is_that_of_the_schedule_of_all(
    answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    answer(*train("word2vec"))
    answer(*train("word2vec"), "train.epochs=4")
    assert "train.epochs changed from 2 to 4: the learning rate continues at 0.5 of its base" in caplog.text
    answer(*train("word2vec", run="long"), "train.epochs=4")
    rates = [{record["step"]: record.get("learning_rate") for record in records_of(run)} for run in ("run", "long")]
    assert max(rates[0]) == max(rates[1])
    half = max(rates[1]) // 2
    assert {step: rate for step, rate in rates[0].items() if step > half + 1} == {
        step: rate for step, rate in rates[1].items() if step > half + 1
    }


def test_fewer_epochs_than_are_done_are_refused(answer: Answer, capfd: pytest.CaptureFixture[str]) -> None:
    answer(*train("word2vec"))
    assert main([*train("word2vec"), "train.epochs=1"]) == 2
    assert "train.epochs=1 ends at step" in capfd.readouterr().err


@pytest.mark.parametrize("model", ["word2vec", "retrieval", "ranking"])
def test_an_earlier_step_or_the_best_answers(model: str, answer: Answer, capfd: pytest.CaptureFixture[str]) -> None:
    best = {"word2vec": "similarity", "retrieval": "recall@3", "ranking": "valid_auc"}[model]
    kept = f"checkpoint={{every_steps: 2, keep_last: 50, best_metric: {best}, best_mode: max, mode: sync}}"
    answer(*train(model, kept, "evaluate.every_steps=2"))
    steps = [info.step for info in find_checkpoints("run/checkpoints")]
    newest = answers(model, "run", answer)
    first = answers(model, "run", answer, "--step", str(steps[0]))
    assert first[-1] != newest[-1], "the vectors of another step"
    records = records_of("run")
    at_first = next(record for record in records if record["step"] == steps[0] and best in record)
    measured = dict(reversed(line.split()) for line in first[0].splitlines())
    assert float(measured[best]) == pytest.approx(at_first[best], abs=1e-4)
    highest = max(record[best] for record in records if best in record and record["step"] in steps)
    found = dict(reversed(line.split()) for line in answer("evaluate", "run", "--step", "best").splitlines())
    assert float(found[best]) == pytest.approx(highest, abs=1e-4)
    assert f"{steps[0]:,}" in answer("inspect", "run", "--step", str(steps[0])).split("step   ")[1].splitlines()[0]
    assert main(["neighbors", "run", "x", "--step", "999"]) == 2
    assert f"has no complete checkpoint of step 999; it has checkpoints of steps {steps[0]}" in capfd.readouterr().err
    assert main(["inspect", "run", "--step", "first"]) == 2
    assert "expected the step of a checkpoint, best or newest, got 'first'" in capfd.readouterr().err


def test_a_checkpoint_of_the_library_can_be_inspected(answer: Answer, capfd: pytest.CaptureFixture[str]) -> None:
    tables = et.EmbeddingCollection([et.TableSpec("t", 5, 2)])
    path = save_checkpoint("own", 7, tables.shard_views(), {"mine": 1}, ONE_PROCESS)
    for shown in (answer("inspect", "own", "--verify"), answer("inspect", path, "--verify")):
        assert "step         7" in shown
        assert "t/weight                 float32   5 x 2" in shown
        assert f"verified     {path}" in shown
    assert "checkpoints  of step 7" in answer("inspect", "own", "--step", "7")
    assert main(["inspect", path, "--step", "7"]) == 2
    assert "--step needs a run folder" in capfd.readouterr().err
    assert main(["inspect", "own", "--step", "best"]) == 2
    assert "has the metric checkpoint.best_metric=loss" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("model", "key", "name"),
    [("word2vec", "init_from", "w3"), pytest.param("retrieval", "items.init_from", "i3", marks=pytest.mark.slow)],
)
def test_vectors_that_a_run_began_with_are_not_missed_later(model: str, key: str, name: str, answer: Answer) -> None:
    Path("vectors.txt").write_text(f"{name} 1 2 3 4\n")
    command = [*train(model), f"{key}=vectors.txt"]
    answer(*command)
    Path("vectors.txt").unlink()
    answer(*command, "--dry-run")
    answer(*command, "train.epochs=3")
