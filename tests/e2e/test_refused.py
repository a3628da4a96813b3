"""What does not belong to a run, or is not what the run wrote, is refused with the reason."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import yaml

from embedtrain.checkpoint import CheckpointReader
from embedtrain.checkpoint import manifest as manifest_module
from tests.e2e.conftest import Job


def last_line(job: Job, *arguments: str, status: int) -> str:
    done = job.run(*arguments)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def newest_manifest(job: Job) -> Path:
    return max((job.folder / "run" / "checkpoints").glob("step-*/manifest.json"))


def test_a_run_that_is_not_what_it_was_is_refused(job: Job) -> None:
    train = job.train_arguments("run", "train.epochs=1")
    assert job.run(*train).returncode == 0

    vocabulary = job.folder / "run" / "vocabulary.tsv"
    lines = vocabulary.read_text().splitlines(keepends=True)
    vocabulary.write_text("".join([lines[1], lines[0], *lines[2:]]))
    said = last_line(job, "neighbors", "run", "bxa", status=2)
    assert "vocabulary.tsv does not hold the names that table 'input' was trained with" in said
    vocabulary.write_text("".join(lines))

    manifest = newest_manifest(job)
    with CheckpointReader(str(manifest.parent)) as reader:
        assert reader.state["config"] == yaml.safe_load((job.folder / "run" / "config.yaml").read_text())
        assert reader.manifest.versions["embedtrain"] == version("embedtrain")
    data = manifest.read_bytes()
    shard = next(manifest.parent.glob("shard-*"))
    rows = bytearray(shard.read_bytes())
    rows[5000] ^= 1
    shard.write_bytes(rows)
    said = last_line(job, *train, status=1)
    assert said.startswith("embedtrain: failed: ")
    assert f"{shard.name}: bytes 0 to" in said and "checksum differs" in said and "rows [0, 320)" in said
    inspected = job.run("inspect", "run", "--verify")
    assert inspected.returncode == 1
    assert f"damaged      {manifest.parent}".replace(f"{job.folder}/", "") in inspected.stdout
    assert f"{shard.name}: bytes 0 to" in inspected.stderr
    rows[5000] ^= 1
    shard.write_bytes(rows)

    document = json.loads(data)
    del document["checksum"]
    document["version"] = 99
    document["checksum"] = manifest_module._checksum(document)
    manifest.write_bytes(manifest_module.canonical_json(document))
    said = last_line(job, *train, status=1)
    assert "has format version 99, and this embedtrain reads versions 1 and 2" in said
    manifest.write_bytes(data)

    assert last_line(job, *train, status=0).startswith("done at step")
