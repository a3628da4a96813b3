"""What a user types and reads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from gensim.models import KeyedVectors

from tests.e2e.conftest import Job, make_job


def refused(job: Job, *arguments: str, ranks: int | None = None) -> str:
    """Runs a command that the user got wrong and returns the line that they read."""
    done = job.run(*arguments, ranks=ranks)
    # torchrun exits with 1 and a traceback of its own; the ranks write none.
    assert done.returncode == (2 if ranks is None else 1), done.stderr
    assert done.stderr.count("Traceback") == (0 if ranks is None else 1), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("embedtrain: error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A folder with a finished run, for tests that only read it."""
    job = make_job(tmp_path_factory.mktemp("trained"))
    done = job.run(*job.train_arguments("run"))
    assert done.returncode == 0, done.stderr
    assert "too few" not in done.stderr
    return job


@pytest.mark.parametrize("ranks", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_from_raw_text_to_neighbours(job: Job, ranks: int | None) -> None:
    # On two ranks as a user starts it, torchrun and all.
    is_warm = None if ranks is None else False
    trained = job.run(*job.train_arguments("run", "train.epochs=8"), ranks=ranks, is_warm=is_warm)
    assert trained.returncode == 0, trained.stderr
    assert "100.0 %" in trained.stderr

    run = job.folder / "run"
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "vocabulary.tsv",
    }
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set(records[0]) >= {"step", "epoch", "loss", "words_per_second", "learning_rate"}
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["epoch"] == 8
    num_words = len(job.text_path.read_text().split())
    assert records[-1]["words"] == 8 * num_words

    # The middle letter of a word is its topic.
    near = job.run("neighbors", "run", "bxa", "--top", "5")
    words = [line.split()[1] for line in near.stdout.splitlines()[1:]]
    assert len(words) == 5
    assert all(word[1] == "x" for word in words)
    assert job.run("neighbors", "run", "bxa", "-", "bza", "+", "cza").returncode == 0

    shown = job.run("inspect", "run", "--verify").stdout
    for part in (
        "step",
        "epochs       8 done",
        "input/weight",
        "output/accumulator",
        "float32",
        "RowwiseAdagrad",
        "dim: 16",
    ):
        assert part in shown
    assert "verified" in shown


def test_exports_are_read_by_other_programs(trained: Job) -> None:
    job = trained
    vectors = job.vectors("run")
    for format, options in (("word2vec", {}), ("word2vec-binary", {"binary": True})):
        output = str(job.folder / format)
        assert job.run("export", "run", "--format", format, "--output", output).returncode == 0
        read = KeyedVectors.load_word2vec_format(output, **options)
        np.testing.assert_array_equal(read.vectors, vectors)
    again = refused(job, "export", "run", "--format", "word2vec", "--output", str(job.folder / "word2vec"))
    assert "word2vec" in again


def test_evaluation_prints_sections_and_correlations(trained: Job) -> None:
    job = trained
    (job.folder / "questions.txt").write_text(": first\nbxa cxa bza cza\nbxa dxa bza dza\n: second\nbxa cxa bza zzz\n")
    (job.folder / "pairs.tsv").write_text("bxa\tcxa\t9\nbxa\tcza\t1\ndxa\tfxa\t8\nnone\tbxa\t5\n")
    done = job.run("evaluate", "run", "--analogies", "questions.txt", "--similarity", "pairs.tsv")
    assert done.returncode == 0, done.stderr
    assert "of 2      first" in done.stdout
    assert "1 questions skipped" in done.stdout
    assert "over 3 pairs; 25.0% skipped" in done.stdout
    assert "nowhere.txt: no such file" in refused(job, "evaluate", "run", "--analogies", "nowhere.txt")
    assert "--analogies FILE or --similarity FILE" in refused(job, "evaluate", "run")


def write_empty(path: Path) -> None:
    path.write_text("")


def write_binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def write_rare_words(path: Path) -> None:
    path.write_text("each of these words stands here once")


def write_broken_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"some words of text\n" * 1000)[:-30])


UNUSABLE = [
    (None, "nowhere.txt", ["nowhere.txt", "corpus.txt"]),
    (write_empty, "empty.txt", ["empty.txt"]),
    (write_binary, "binary.txt", ["binary.txt", "byte 0"]),
    (write_rare_words, "rare.txt", ["7 distinct words", "min_count"]),
    (write_broken_gzip, "broken.txt.gz", ["broken.txt.gz"]),
]


@pytest.mark.parametrize(("write", "name", "parts"), UNUSABLE)
def test_a_text_that_cannot_be_used_is_one_clear_line(job: Job, write, name, parts) -> None:
    # Each rank finds it, and one of them says it.
    check_text(job, write, name, parts, 2 if name == "binary.txt" else None)


@pytest.mark.slow
@pytest.mark.parametrize(("write", "name", "parts"), UNUSABLE)
@pytest.mark.parametrize("ranks", [None, 2])
def test_a_text_that_cannot_be_used_is_one_clear_line_on_one_rank_and_on_two(
    job: Job, write, name, parts, ranks
) -> None:
    check_text(job, write, name, parts, ranks)


def check_text(job: Job, write, name: str, parts: list[str], ranks: int | None) -> None:
    if write is not None:
        write(job.folder / name)
    line = refused(job, *job.train_arguments("run", f"data.path={job.folder / name}"), ranks=ranks)
    for part in parts:
        assert part in line
    assert not (job.folder / "run" / "checkpoints").exists()


def test_mistakes_in_the_configuration_are_one_clear_line(job: Job) -> None:
    assert "did you mean optimizer.lr?" in refused(job, *job.train_arguments("run", "optimizer.learning_rate=1"))
    assert "no configuration file nowhere.yaml" in refused(job, "train", "nowhere.yaml")
    assert "data.path" in refused(job, "train", "config.yaml", "run.path=run")
    assert "optimizer.max_grad_norm must be positive" in refused(
        job, *job.train_arguments("run", "optimizer.max_grad_norm=-1")
    )
    assert not list((job.folder / "run").glob("*"))


def test_a_run_of_few_steps_says_so(job: Job) -> None:
    few = job.run(*job.train_arguments("few", "train.epochs=1", "train.words_per_step=4096"))
    assert few.returncode == 0
    assert "steps in all are too few" in few.stderr


def test_more_ranks_than_a_step_has_blocks_are_refused(job: Job) -> None:
    line = refused(job, *job.train_arguments("run", "train.words_per_step=64"), ranks=2)
    assert "too few for 2 ranks to share" in line


def test_a_run_that_is_not_there_is_one_clear_line(trained: Job) -> None:
    job = trained
    for command in (
        ("neighbors", "nowhere", "word"),
        ("inspect", "nowhere"),
        ("evaluate", "nowhere", "--analogies", "f"),
    ):
        assert "nowhere" in refused(job, *command)
    unknown = refused(job, "neighbors", "run", "bxaa")
    assert "unknown word 'bxaa'" in unknown
    assert "did you mean 'bxa'" in unknown


def test_a_loss_that_is_not_finite_fails_the_run_or_is_skipped(job: Job) -> None:
    steep = job.train_arguments("steep", "optimizer.lr=1e30", "optimizer.initial_accumulator_value=0", "train.epochs=1")
    failed = job.run(*steep, ranks=2)
    assert failed.returncode == 1
    lines = [line for line in failed.stderr.splitlines() if line.startswith("embedtrain: failed: ")]
    assert len(lines) == 1
    assert "is not finite" in lines[0] or "the loss is" in lines[0]
    assert "on rank" in lines[0]
    assert json.loads((job.folder / "steep" / "status.json").read_text())["state"] == "failed"
    skipped = job.run(*job.train_arguments("skips", *steep[5:], "optimizer.nonfinite=skip"))
    assert skipped.returncode == 0, skipped.stderr
    assert json.loads((job.folder / "skips" / "metrics.jsonl").read_text().splitlines()[-1])["skipped_steps"] > 0


@pytest.mark.slow
def test_bfloat16_rows_and_cbow_train(job: Job) -> None:
    options = ("table.dtype=bfloat16", "word2vec.architecture=cbow", "train.epochs=8")
    assert job.run(*job.train_arguments("run", *options), ranks=2).returncode == 0
    assert "bfloat16" in job.run("inspect", "run").stdout
    near = job.run("neighbors", "run", "bxa", "--top", "3").stdout.splitlines()[1:]
    assert all(line.split()[1][1] == "x" for line in near)
