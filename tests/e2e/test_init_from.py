"""Runs that start from vectors of other programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Job

NO_STEPS = ("train.epochs=1", "optimizer.lr=1e-30", "checkpoint.mode=sync")
"""A run whose rows stay as they began."""


def write_glove(job: Job, dim: int = 16) -> dict[str, list[float]]:
    words = sorted(set(job.text_path.read_text().split()))[::2]
    generator = np.random.default_rng(1)
    vectors = {word: generator.normal(size=dim).astype(np.float32).tolist() for word in [*words, "absent"]}
    lines = [f"{word} {' '.join(map(str, values))}\n" for word, values in vectors.items()]
    (job.folder / "glove.txt").write_text("".join(lines))
    return vectors


def rows_of(job: Job, run: str, table: str) -> np.ndarray:
    output = job.folder / f"{run}-{table}.npy"
    done = job.run("export", run, "--table", table, "--format", "npy", "--output", str(output), "--overwrite")
    assert done.returncode == 0, done.stderr
    return np.load(output)


@pytest.mark.parametrize("ranks", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_words_start_from_a_file_and_a_resumed_run_does_not_read_it_again(job: Job, ranks: int | None) -> None:
    vectors = write_glove(job)
    command = job.train_arguments("run", *NO_STEPS, "init_from=glove.txt")
    begun = job.run(*command, ranks=ranks)
    assert begun.returncode == 0, begun.stderr
    vocabulary = [line.split("\t")[0] for line in (job.folder / "run/vocabulary.tsv").read_text().splitlines()]
    known = [word for word in vocabulary if word in vectors]
    assert f"table input: {len(known)} of {len(vocabulary)} rows start from glove.txt ({len(vectors)} vectors), " in (
        begun.stderr
    )
    trained = rows_of(job, "run", "input")
    for word, row in zip(vocabulary, trained, strict=True):
        if word in vectors:
            np.testing.assert_array_equal(row, np.array(vectors[word], np.float32))
        else:
            assert 0 < np.abs(row).max() <= 0.5 / 16
    assert f"init_from    {len(known)} of {len(vocabulary)} rows of input" in job.run("inspect", "run").stdout

    (job.folder / "glove.txt").unlink()
    resumed = job.run(*command, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    np.testing.assert_array_equal(rows_of(job, "run", "input"), trained)
    other = job.run(*job.train_arguments("run", *NO_STEPS))
    assert "init_from (was glove.txt, is None)" in other.stderr


def test_a_file_of_another_dim_is_one_clear_line(job: Job) -> None:
    write_glove(job, dim=12)
    done = job.run(*job.train_arguments("run", "init_from=glove.txt"))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("embedtrain: error: ")]
    assert "expected vectors of dim 16" in line
    assert "found dim 12" in line
    assert not (job.folder / "run/checkpoints").exists()


def write_items(path: Path, names: list[str], dim: int) -> np.ndarray:
    values = np.random.default_rng(2).normal(size=(len(names), dim)).astype(np.float32)
    np.save(path, values)
    path.with_name(f"{path.name}.vocabulary.tsv").write_text("".join(f"{name}\n" for name in names))
    return values


def test_items_and_values_start_from_files(job: Job) -> None:
    lines = [f"u{user} i{user % 7} i{(user * 3) % 7}\n" for user in range(40)]
    (job.folder / "train.txt").write_text("".join(lines))
    items = write_items(job.folder / "items.npy", ["i0", "i3", "nobody"], 8)
    (job.folder / "retrieval.yaml").write_text(
        "model: retrieval\n"
        f"data: {{path: train.txt, cache_path: {job.folder}/cache}}\n"
        "items: {init_from: items.npy}\n"
        "run: {path: items}\n"
        "table: {dim: 8}\n"
        "train: {epochs: 1, global_batch_size: 8}\n"
        "optimizer: {lr: 1.0e-30, max_norm: null}\n"
        "retrieval: {loss: softmax, normalize: none}\n"
        "log: {tensorboard: false}\n"
    )
    done = job.run("train", "retrieval.yaml")
    assert done.returncode == 0, done.stderr
    assert "table item: 2 of 7 rows start from items.npy (3 vectors), 5 keep their initial values" in done.stderr
    names = [line.split("\t")[0] for line in (job.folder / "items/items.tsv").read_text().splitlines()]
    rows = rows_of(job, "items", "item")
    np.testing.assert_array_equal(rows[names.index("i3")], items[1])

    (job.folder / "clicks.csv").write_text(
        "label,shop\n" + "".join(f"{number % 2},s{number % 5}\n" for number in range(640))
    )
    shops = write_items(job.folder / "shops.npy", ["s4", "s1"], 4)
    (job.folder / "ranking.yaml").write_text(
        "model: ranking\n"
        f"data: {{path: clicks.csv, cache_path: {job.folder}/cache, categorical: [shop], "
        "features: {shop: {init_from: shops.npy}}}\n"
        "run: {path: clicks}\n"
        "table: {dim: 4}\n"
        "train: {epochs: 1, global_batch_size: 64}\n"
        "optimizer: {lr: 1.0e-30}\n"
        "log: {tensorboard: false}\n"
    )
    done = job.run("train", "ranking.yaml")
    assert done.returncode == 0, done.stderr
    assert "table shop: 2 of 6 rows start from shops.npy" in done.stderr
    assert any(np.array_equal(row, shops[1]) for row in rows_of(job, "clicks", "shop"))
    hashed = job.run("train", "ranking.yaml", "data.num_rows=10", "run.path=hashed")
    assert hashed.returncode == 2
    assert "data.features.shop.init_from needs rows with names" in hashed.stderr
