"""Checkpoints on S3, whose requests fail now and then, or for good."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

pytest.importorskip("moto")
s3fs = pytest.importorskip("s3fs")

from embedtrain import storage  # noqa: E402
from embedtrain.checkpoint import (  # noqa: E402
    CheckpointReader,
    Retention,
    find_checkpoints,
    latest_checkpoint,
    retain,
    sweep_leftovers,
    verify,
)
from embedtrain.distributed.ranks import ONE_PROCESS  # noqa: E402
from embedtrain.errors import CheckpointError  # noqa: E402
from embedtrain.train.lock import RunLock  # noqa: E402
from tests.e2e.conftest import make_job  # noqa: E402
from tests.faults.object_store import ObjectStore  # noqa: E402
from tests.unit.checkpoint.example import example_tables, save  # noqa: E402


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    with ObjectStore() as server:
        yield server


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The store, with patience short enough for a test: 5 tries, each of one request."""
    account = {"endpoint_url": server.url, "key": "key", "secret": "secret"}
    monkeypatch.setitem(fsspec.config.conf, "s3", account)
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(storage, "_S3_CLIENT", {**storage._S3_CLIENT, "read_timeout": 1})
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    server.mend()
    return server


@pytest.fixture
def path(store: ObjectStore, request: pytest.FixtureRequest) -> str:
    bucket = f"bucket-{abs(hash(request.node.name))}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}/run/checkpoints"


def holds(path: str, tables: dict[str, torch.Tensor]) -> bool:
    verify(path)
    with CheckpointReader(path) as reader:
        read = {name: reader.read(name, 0, len(table)) for name, table in tables.items()}
        gathered = {name: reader.gather(name, torch.arange(len(table))) for name, table in tables.items()}
    return all(torch.equal(read[name], table) and torch.equal(gathered[name], table) for name, table in tables.items())


def test_checkpoints_are_saved_found_read_and_deleted(path: str) -> None:
    tables = example_tables()
    for step in (1, 2, 3):
        save(path, step, tables, 2, replicated={"dense": torch.arange(3.0)})
    storage.write(f"{path}/step-000000004/shard-{'a' * 16}-00000-of-00001.safetensors", [b"left by a killed save"])
    assert [found.step for found in find_checkpoints(path)] == [1, 2, 3]
    assert holds(latest_checkpoint(path) or "", tables)
    assert len(retain(path, Retention(keep_last=1), ONE_PROCESS)) == 2
    assert [found.step for found in find_checkpoints(path)] == [3]
    assert len(sweep_leftovers(path, ONE_PROCESS)) == 1
    assert storage.list_folders(path) == ["step-000000003"]


@pytest.mark.parametrize("kind", ["InternalError", "SlowDown", "dropped", "slow", "unheard"])
@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_what_fails_a_few_times_is_done_again(
    path: str, store: ObjectStore, kind: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    tables = example_tables()
    times = 1 if kind == "slow" else 3
    if method == "PUT":
        store.fail(kind, times, "PUT", "run/")
        save(path, 1, tables)
        assert store.num_failures == times
        store.mend()
    else:
        save(path, 1, tables)
        store.fail(kind, times, "GET")
    assert holds(latest_checkpoint(path) or "", tables)
    assert store.num_failures == times
    # s3fs itself may try a request again that took too long, and says nothing of it.
    assert kind == "slow" or "trying again in" in caplog.text


@pytest.mark.parametrize("kind", ["InternalError", "dropped"])
@pytest.mark.parametrize("part", ["shard-", "manifest"])
def test_what_goes_on_failing_fails_that_save_alone(path: str, store: ObjectStore, kind: str, part: str) -> None:
    tables = example_tables()
    save(path, 1, tables, 2)
    store.fail(kind, 10**6, "PUT", part)
    with pytest.raises(CheckpointError, match=rf"step 2 was not saved .*{part}.* could not be .* in 5 tries over"):
        save(path, 2, tables, 2)
    store.mend()
    assert [found.step for found in find_checkpoints(path)] == [1]
    assert holds(latest_checkpoint(path) or "", tables)
    save(path, 2, tables, 2)
    assert [found.step for found in find_checkpoints(path)] == [1, 2]


def test_a_commit_is_exclusive(path: str) -> None:
    saved = save(path, 1, example_tables())
    with pytest.raises(FileExistsError):
        storage.create(f"{saved}/manifest.json", b"another's", "")
    assert holds(saved, example_tables())
    with pytest.raises(CheckpointError, match="already has a complete checkpoint"):
        save(path, 1, example_tables())


def test_a_commit_whose_answer_was_lost_is_a_commit(path: str, store: ObjectStore) -> None:
    store.fail("unheard", 1, "PUT", "manifest")
    saved = save(path, 1, example_tables())
    assert store.num_failures == 1
    assert holds(saved, example_tables())


def test_an_object_of_which_a_part_was_kept_is_never_counted(path: str, store: ObjectStore) -> None:
    store.fail("half", 1, "PUT", "shard-")
    with pytest.raises(CheckpointError, match=r"a rank wrote .* with \d+ bytes, but rank 0 finds \d+"):
        save(path, 1, example_tables())
    assert store.num_failures == 1
    assert find_checkpoints(path) == []


def test_access_denied_is_told_at_once(path: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*arguments: Any, **options: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", deny)
    with pytest.raises(CheckpointError, match="PermissionError: Access Denied"):
        save(path, 1, example_tables())


@pytest.mark.slow
def test_a_run_on_s3_is_trained_resumed_and_exported(path: str, store: ObjectStore, tmp_path: Path) -> None:
    environment = {"AWS_ENDPOINT_URL": store.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    job = make_job(tmp_path, environment)
    run = path.replace("checkpoints", "trained")
    options = ("checkpoint.every_steps=20", "checkpoint.keep_last=2", "train.epochs=2")
    first = job.start(*job.train_arguments(run, *options))
    store.fail("InternalError", 2, "PUT", "shard-")
    while latest_checkpoint(f"{run}/checkpoints") is None and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    _, errors = first.communicate()
    assert store.num_failures == 2
    assert "could not be written, trying again in" in errors
    store.mend()
    done = job.run(*job.train_arguments(run, *options))
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stderr
    assert job.run(*job.train_arguments("local", *options)).returncode == 0
    found, expected = latest_checkpoint(f"{run}/checkpoints"), latest_checkpoint(f"{tmp_path}/local/checkpoints")
    assert found is not None and expected is not None
    with CheckpointReader(found) as there, CheckpointReader(expected) as here:
        assert there.step == here.step
        for name, info in here.tensors.items():
            assert torch.equal(there.read(name, 0, info.shape[0]), here.read(name, 0, info.shape[0]))
    assert job.run("export", run, "--format", "npy", "--output", "vectors.npy").returncode == 0


def test_a_run_folder_on_s3_has_one_job(path: str) -> None:
    with RunLock(path, ONE_PROCESS, beat_seconds=0.2), pytest.raises(ValueError, match="is in use"):
        RunLock(path, ONE_PROCESS, beat_seconds=0.2).__enter__()
    with RunLock(path, ONE_PROCESS, beat_seconds=0.2):
        pass
    assert storage.list_files(path) == {}
