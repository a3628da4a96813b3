"""One job at a time on a run folder."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import CheckpointError, UserError
from embedtrain.train import lock as lock_module
from embedtrain.train.lock import RunLock

pytestmark = pytest.mark.serial

BEAT_SECONDS = 0.05


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run"


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lock_module, "STALE_BEATS", 4)
    yield


def owner_files(path: str) -> list[str]:
    return sorted(name for name in lock_module.storage.list_files(path) if name.startswith("owner-"))


def lock_of(path: str) -> RunLock:
    return RunLock(path, ONE_PROCESS, beat_seconds=BEAT_SECONDS)


def leave_behind(path: str, **changes: object) -> None:
    """Leaves the owner file of a job that ended without giving the folder back."""
    lock = lock_of(path)
    lock._own = replace(lock._own, **changes)
    assert lock._try_to_take()


def test_a_second_job_is_refused_while_the_first_lives(folder: str) -> None:
    with lock_of(folder) as first:
        first.check()
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on .*, since 20"), lock_of(folder):
            pass
        assert owner_files(folder) == ["owner-00000001.json"]
        first.check()
    assert owner_files(folder) == []
    with lock_of(folder):
        pass
    assert owner_files(folder) == []


def test_a_dead_process_of_this_host_loses_the_folder_at_once(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    os.waitpid(ended, 0)
    leave_behind(folder, pid=ended, started="123", beat_seconds=60.0)
    with lock_of(folder):
        assert owner_files(folder) == ["owner-00000002.json"]
    assert f"is taken over from process {ended} on" in caplog.text


def test_a_later_process_of_the_same_number_is_another(folder: str) -> None:
    leave_behind(folder, started="123", beat_seconds=60.0)
    with lock_of(folder):
        pass


@pytest.mark.usefixtures("short_patience")
def test_an_owner_elsewhere_that_does_not_beat_loses_the_folder(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    leave_behind(folder, host="elsewhere/boot")
    with lock_of(folder):
        assert owner_files(folder) == ["owner-00000002.json"]
    assert "is held by process" in caplog.text and "watching for up to 0 s" in caplog.text
    assert "on elsewhere" in caplog.text and "which is gone" in caplog.text


@pytest.mark.usefixtures("short_patience")
def test_who_lost_the_folder_learns_it_before_saving(folder: str) -> None:
    with lock_of(folder) as stalled:
        stalled._is_leaving.set()  # its heart stands still
        stalled._thread.join()
        with lock_of(folder) as second:
            with pytest.raises(CheckpointError, match=r"was taken over by process .*: nothing more is saved"):
                stalled.check()
            second.check()
    assert owner_files(folder) == []


@pytest.mark.usefixtures("short_patience")
def test_of_many_that_take_over_one_does(folder: str) -> None:
    leave_behind(folder, host="elsewhere/boot")
    owners, refused, all_tried = [], [], threading.Barrier(4)

    def try_to_own() -> None:
        try:
            with lock_of(folder) as lock:
                owners.append(lock)
                all_tried.wait(timeout=30)
        except UserError as error:
            refused.append(error)
            all_tried.wait(timeout=30)

    threads = [threading.Thread(target=try_to_own) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owners), len(refused)) == (1, 3)


def test_an_owner_file_that_is_not_one_is_shown(tmp_path: Path) -> None:
    (tmp_path / "owner-00000007.json").write_text("{")
    with (
        pytest.raises(UserError, match=r"owner-00000007\.json is not an owner file.*Remove it"),
        lock_of(str(tmp_path)),
    ):
        pass


def test_what_an_owner_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    with lock_of(str(tmp_path)) as lock:
        saved = json.loads((tmp_path / "owner-00000001.json").read_text())
        assert {**saved, "beat": 0} == {**asdict(lock._own), "beat": 0}
        assert (saved["pid"], saved["job"]) == (os.getpid(), "job-7")
