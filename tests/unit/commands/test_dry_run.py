"""`embedtrain train --dry-run`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from embedtrain.cli import main
from embedtrain.commands import dry_run
from tests.unit.commands.fuzz import contents

WORDS = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    generator = random.Random(3)
    lines = (" ".join(generator.choices(WORDS, weights=range(1, 101), k=9)) for _ in range(3000))
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    (tmp_path / "config.yaml").write_text("table: {dim: 8}\ntrain: {epochs: 1, words_per_step: 512, block_words: 64}\n")
    paths = [f"{key}={tmp_path}/{name}" for key, name in (("data.path", "corpus.txt"), ("data.cache_path", "cache"))]
    return ["train", f"{tmp_path}/config.yaml", *paths, f"run.path={tmp_path}/run", "log.tensorboard=false"]


def test_two_steps_and_the_plan_and_nothing_written(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--dry-run"]) == 0
    printed = capfd.readouterr().out
    for part in ("nothing is written", "data         all", "input ", "checkpoint ", "epochs       1 of ", "step 2  "):
        assert part in printed
    assert "step 3" not in printed
    assert not (tmp_path / "run").exists()

    assert main(arguments) == 0
    before = contents(tmp_path)
    capfd.readouterr()
    assert main(["plan", *arguments[1:]]) == 0
    assert ["input", "99", "8"] in [line.split()[:3] for line in capfd.readouterr().out.splitlines()]
    assert main([*arguments, "--dry-run"]) == 0
    assert "would resume" in capfd.readouterr().out
    assert contents(tmp_path) == before


def test_of_large_data_the_head_is_read_and_removed_again(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "HEAD_BYTES", 4000)
    assert main([*arguments, "--dry-run"]) == 0
    captured = capfd.readouterr()
    assert "about the first 3.91 KiB: the plan is of these," in captured.out
    assert not contents(tmp_path / "cache")
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_head_of_large_data_says_that_only_the_head_was_read(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "HEAD_BYTES", 4000)
    (tmp_path / "corpus.txt").write_text("one\n" * 2000 + "one two\n" * 2000)
    assert main([*arguments, "--dry-run"]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert "no line has two words of the vocabulary" in said
    assert said.endswith("(a dry run reads about the first 3.91 KiB of the data)")
    assert not contents(tmp_path / "cache")


def test_mistakes_are_those_of_the_run(arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for setting, said in (
        ("data.min_count=100000", "the vocabulary is empty"),
        ("train.words_per_step=100", "must be a multiple"),
        ("data.path=nowhere.txt", "no such file or folder"),
        ("table.dim=1000000000", "available: "),
    ):
        assert main([*arguments, "--dry-run", setting]) == 2
        assert said in capfd.readouterr().err
        assert not (tmp_path / "run").exists()
    assert main([*arguments, "--dry-run", "--profile"]) == 2
    assert "cannot be given together" in capfd.readouterr().err


@pytest.mark.parametrize("model", ["ranking", "retrieval"])
def test_other_models_are_tried_too(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "HEAD_BYTES", 4000)
    generator = random.Random(4)
    rows = [(generator.randrange(50), generator.randrange(40), generator.randrange(2)) for _ in range(2000)]
    lines = ["user,item,label,tags", *(f"u{user},i{item},{label},a|b{item % 7}" for user, item, label in rows)]
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.yaml").write_text(f"model: {model}\n")
    held_out = {"ranking": "data.valid_path", "retrieval": "evaluate.path"}[model]
    more = {
        "ranking": ["data.categorical=[user,item,tags]", "data.features={tags: {bag: true}}", "data.num_rows=500"],
        "retrieval": [f"items={{path: {tmp_path}/items.csv, features: {{kind: {{separator: '|'}}}}}}"],
    }[model]
    (tmp_path / "items.csv").write_text("id,kind\n" + "".join(f"i{item},x|y{item % 3}\n" for item in range(40)))
    arguments = [f"data.path={tmp_path}/train.csv", f"{held_out}={tmp_path}/held_out.csv", *more]
    arguments += [f"data.cache_path={tmp_path}/cache", f"run.path={tmp_path}/run", "train.global_batch_size=64"]
    status = main(["train", f"{tmp_path}/config.yaml", *arguments, "table.dim=4", "--dry-run"])
    captured = capfd.readouterr()
    assert status == 0, captured.err
    assert "step 2" in captured.out
    assert "the first 3.91 KiB" in captured.out
    assert not contents(tmp_path / "cache")
    assert not (tmp_path / "run").exists()
