"""What a start says and leaves behind: refused, anew after a kill, resumed; and what `inspect` counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from embedtrain.checkpoint import manifest
from tests.unit.commands.fuzz import call

CONFIG = (
    "model: word2vec\n"
    "data: {path: corpus.txt, cache_path: cache, min_count: 1}\n"
    "table: {dim: 4}\n"
    "optimizer: {name: rowwise_adagrad, lr: 0.1}\n"
    "train: {epochs: 1, words_per_step: 64, block_words: 32}\n"
    "run: {path: runs/x, device: cpu}\n"
    "log: {tensorboard: false}\n"
    "checkpoint: {mode: sync, every_steps: null, every_seconds: null}\n"
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "corpus.txt").write_text("a b c d e f g h\n" * 20)


def test_a_refused_start_leaves_no_run_folder(tmp_path: Path) -> None:
    outcome = call(["train", "config.yaml", "data.min_count=1000"])
    assert outcome.status == 2, outcome.printed
    assert not (tmp_path / "runs").exists()


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew_and_says_so(tmp_path: Path) -> None:
    first = call(["train", "config.yaml"])
    assert "starting: 3 steps, 1 rank, cpu" in first.printed and "anew" not in first.printed
    again = call(["train", "config.yaml"])
    assert "resuming at step 3 of 3, 1 rank, cpu" in again.printed and "anew" not in again.printed
    shutil.rmtree(tmp_path / "runs/x/checkpoints")
    anew = call(["train", "config.yaml"])
    assert "runs/x holds a run that ended before its first checkpoint: it starts anew" in anew.printed
    assert len((tmp_path / "runs/x/metrics.jsonl").read_text().splitlines()) == 1
    shown = call(["inspect", "runs/x", "--verify"]).printed
    assert "checkpoints  of step 3\n" in shown
    assert " by 1 rank\n" in shown and ", in 1 piece\n" in shown


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("a::b", "a run folder cannot be at 'a::b'"),
        ("x" * 256, "File name too long; give another path"),
        (f"{'x' * 256}/y", "File name too long; give another path"),
        ("corpus.txt/below", "lies below a file"),
    ],
)
def test_a_path_that_cannot_be_used_is_answered_in_a_line(path: str, said: str) -> None:
    for arguments in (["train", "config.yaml", f"run.path={path}"], ["inspect", path], ["neighbors", path, "a"]):
        outcome = call(arguments)
        assert outcome.status in (1, 2), outcome.printed
        assert outcome.error is None
        assert "Traceback" not in outcome.printed
        if arguments[0] == "train":
            assert said in outcome.printed


def test_inspect_verifies_what_a_checkpoint_says_of_its_run_too(tmp_path: Path) -> None:
    assert call(["train", "config.yaml", "checkpoint.every_steps=2"]).status == 0
    path = tmp_path / "runs/x/checkpoints/step-000000002/manifest.json"
    document = json.loads(path.read_text())
    document["state"]["optimizer"]["num_skipped"] = "\x1b[2J"
    del document["checksum"]
    path.write_bytes(manifest.canonical_json({**document, "checksum": manifest._checksum(document)}))
    assert call(["inspect", "runs/x"]).status == 0
    outcome = call(["inspect", "runs/x", "--verify"])
    assert outcome.status == 1
    assert "damaged      runs/x/checkpoints/step-000000002\n" in outcome.printed
    assert "verified     runs/x/checkpoints/step-000000003\n" in outcome.printed
    assert r"optimizer.num_skipped: expected a valid integer, found '\x1b[2J'" in outcome.printed
    assert "\x1b" not in outcome.printed
