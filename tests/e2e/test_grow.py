"""New words, users and items for a trained run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.embedding.init import initial_rows
from embedtrain.recipes.word2vec.model import word2vec_tables
from embedtrain.sharding.layout import SpreadLayout
from tests.e2e.conftest import Job
from tests.records import contents

DIM = 16


def rows_by_name(run: Path, names_file: str, table: str) -> dict[str, dict[str, torch.Tensor]]:
    """By word: weight and state, as they lie in the newest checkpoint."""
    words = [line.split("\t")[0] for line in (run / names_file).read_text().splitlines()]
    path = latest_checkpoint(str(run / "checkpoints"))
    assert path is not None
    with CheckpointReader(path) as reader:
        slots = SpreadLayout(len(words)).slot_of(torch.arange(len(words)))
        tensors = {
            name.rpartition("/")[2]: reader.gather(name, slots)
            for name in reader.tensors
            if name.startswith(f"{table}/")
        }
    return {word: {name: tensor[row] for name, tensor in tensors.items()} for row, word in enumerate(words)}


def counts_of(path: Path) -> dict[str, int]:
    return {word: int(count) for word, count in (line.split("\t") for line in path.read_text().splitlines())}


def write_new_text(job: Job) -> Path:
    """A text with known words, new ones of their topics, and a new one that is too rare."""
    generator = np.random.default_rng(5)
    old = job.text_path.read_text().splitlines()[:300]
    new = [f"new{topic}" for topic in "xzvw"]
    lines = [f"{line} {new['xzvw'.index(line[1])]} {line.split()[0]}" for line in old if generator.random() < 0.8]
    path = job.folder / "new.txt"
    path.write_text("\n".join([*lines, "once"]))
    return path


@pytest.mark.slow  # tests/distributed/test_start_from.py holds it of every model
@pytest.mark.parametrize(
    "options",
    [
        ("optimizer.initial_accumulator_value=3.0", "optimizer.tables.output.name=adam"),
        ("optimizer.name=adam", "table.dtype=bfloat16"),
    ],
    ids=["rowwise_adagrad and adam", "adam in bfloat16"],
)
def test_old_words_keep_their_rows_and_states_and_new_ones_begin_as_in_a_new_run(
    job: Job, options: tuple[str, ...]
) -> None:
    trained = job.run(
        *job.train_arguments("old", "checkpoint.full_every=3", "checkpoint.every_steps=40", *options), ranks=2
    )
    assert trained.returncode == 0, trained.stderr
    before = contents(job.folder / "old")
    new_text = write_new_text(job)
    grown = job.run("grow", "old", "grown", f"data.path={new_text}", "train.epochs=6", "seed=9")
    assert grown.returncode == 0, grown.stderr
    assert contents(job.folder / "old") == before

    old_counts, new_counts = (counts_of(job.folder / run / "vocabulary.tsv") for run in ("old", "grown"))
    num_old = len(old_counts)
    assert grown.stdout.splitlines()[:2] == [
        f"table input: {num_old} rows kept, 4 new",
        f"table output: {num_old} rows kept, 4 new",
    ]
    assert set(new_counts) - set(old_counts) == {"newx", "newz", "newv", "neww"}
    seen = new_text.read_text().split()
    assert new_counts == {word: old_counts.get(word, 0) + seen.count(word) for word in new_counts}
    assert list(new_counts.values()) == sorted(new_counts.values(), reverse=True)

    dtype = torch.bfloat16 if "table.dtype=bfloat16" in options else torch.float32
    for spec in word2vec_tables(len(new_counts), DIM, dtype):
        old_rows, rows = (rows_by_name(job.folder / run, "vocabulary.tsv", spec.name) for run in ("old", "grown"))
        fresh = initial_rows(spec, 0, len(new_counts), seed=9)
        slots = SpreadLayout(len(new_counts)).slot_of(torch.arange(len(new_counts)))
        for (word, tensors), slot in zip(rows.items(), slots.tolist(), strict=True):
            for name, tensor in tensors.items():
                if word in old_rows:
                    assert torch.equal(tensor, old_rows[word][name]), (word, name)
                elif name == "weight":
                    assert torch.equal(tensor, fresh[slot]), word
                else:
                    assert torch.equal(tensor, torch.full_like(tensor, 3.0 if name == "accumulator" else 0.0)), word

    shown = job.run("inspect", "grown", "--verify").stdout
    assert "grown from   old, step" in shown
    learnt = job.run("train", "grown/config.yaml", ranks=3)
    assert learnt.returncode == 0, learnt.stderr
    assert "starting from the grown tables: " in learnt.stderr
    assert "grown from   old, step" in job.run("inspect", "grown").stdout


@pytest.mark.slow
def test_new_words_learn_beside_old_ones_and_a_grown_run_grows_again(job: Job) -> None:
    assert job.run(*job.train_arguments("old", "train.epochs=8")).returncode == 0
    new_text = write_new_text(job)
    assert job.run("grow", "old", "grown", f"data.path={new_text}", "train.epochs=40").returncode == 0
    assert job.run("train", "grown/config.yaml").returncode == 0
    near = job.run("neighbors", "grown", "newx", "--top", "3").stdout.splitlines()[1:]
    assert all(line.split()[1][1] == "x" for line in near), near
    more = job.folder / "more.txt"
    more.write_text("newx bxa another\n" * 40)
    again = job.run("grow", "grown", "again", f"data.path={more}")
    assert again.returncode == 0, again.stderr
    assert f"{len(counts_of(job.folder / 'grown/vocabulary.tsv'))} rows kept, 1 new" in again.stdout
    assert job.run("train", "again/config.yaml").returncode == 0


def test_users_and_items_come_in(job: Job) -> None:
    (job.folder / "old.txt").write_text("".join(f"u{user} i{user % 7} i{(user * 3) % 7}\n" for user in range(40)))
    (job.folder / "new.txt").write_text("".join(f"u{user} i{user % 9} i3\n" for user in range(35, 60)))
    (job.folder / "retrieval.yaml").write_text(
        "model: retrieval\n"
        f"data: {{path: old.txt, cache_path: {job.folder}/cache}}\n"
        "items: {hidden: [8]}\n"
        "table: {dim: 8}\n"
        "train: {epochs: 3, global_batch_size: 8}\n"
        "log: {tensorboard: false}\n"
        "run: {path: old}\n"
    )
    assert job.run("train", "retrieval.yaml").returncode == 0
    grown = job.run("grow", "old", "grown", "data.path=new.txt")
    assert grown.returncode == 0, grown.stderr
    assert "table user: 40 rows kept, 20 new" in grown.stdout
    assert "table item: 7 rows kept, 2 new" in grown.stdout
    for table in ("user", "item"):
        old, new = (rows_by_name(job.folder / run, f"{table}s.tsv", table) for run in ("old", "grown"))
        assert len(new) == len(old) + (20 if table == "user" else 2)
        for name, tensors in old.items():
            assert all(torch.equal(new[name][state], tensor) for state, tensor in tensors.items()), name
    trained = job.run("train", "grown/config.yaml", ranks=2)
    assert trained.returncode == 0, trained.stderr
    assert job.run("recommend", "grown", "u3", "u59", "--top", "2").returncode == 0


def test_what_cannot_grow_is_one_clear_line(job: Job) -> None:
    new_text = write_new_text(job)
    assert job.run(*job.train_arguments("old", "train.epochs=1")).returncode == 0
    for arguments, message in (
        (("nowhere", "grown", f"data.path={new_text}"), "no complete checkpoint yet in 'nowhere'"),
        (("old", "grown"), "expected data.path=PATH"),
        (("old", "old", f"data.path={new_text}"), "old is not empty"),
        (("old", "grown", f"data.path={new_text}", "table.dim=8"), "table.dim (was 16, is 8)"),
        (("old", "grown", f"data.path={new_text}", "run.path=x"), "run.path=x: grow itself sets"),
        (("old", "grown", "data.path=nowhere.txt"), "nowhere.txt: no such file"),
        (("old", "grown", f"data.path={new_text}", "optimizer.lrr=1"), "did you mean optimizer.lr?"),
    ):
        done = job.run("grow", *arguments)
        assert done.returncode == 2, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("embedtrain: error: ")
        assert message in line
        assert not (job.folder / "grown").exists()
