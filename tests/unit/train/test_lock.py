"""One job at a time on a run folder."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
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
    assert "is held by process" in caplog.text and "waiting up to 0 s" in caplog.text
    assert "on elsewhere" in caplog.text and "which is gone" in caplog.text


@pytest.mark.usefixtures("short_patience")
def test_who_lost_the_folder_learns_it_before_saving(folder: str) -> None:
    with lock_of(folder) as stalled:
        stalled._is_leaving.set()  # its heartbeat stops
        stalled._thread.join()
        with lock_of(folder) as second:
            with pytest.raises(CheckpointError, match=r"was taken over by process .*: this job saves nothing more"):
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


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"beat_seconds": float("nan")}, "beat_seconds: expected a finite number, found nan"),
        ({"beat_seconds": 1e9}, "beat_seconds: expected less than or equal to 60, found 1000000000.0"),
        ({"beat_seconds": None}, "beat_seconds: expected a valid number, found None"),
        ({"beat_seconds": 0}, "beat_seconds: expected greater than 0, found 0"),
        ({"pid": "../1"}, "pid: expected a valid integer, found '../1'"),
        ({"beat": -1}, "beat: expected greater than or equal to 0, found -1"),
        ({"host": ["x"]}, r"host: expected a valid string, found \['x'\]"),
    ],
)
def test_an_owner_file_that_no_job_wrote_is_refused(tmp_path: Path, changes: dict[str, object], fault: str) -> None:
    owner = {**asdict(lock_of(str(tmp_path))._own), **changes}
    (tmp_path / "owner-00000007.json").write_text(json.dumps(owner))
    with (
        pytest.raises(UserError, match=rf"owner-00000007\.json is not an owner file: {fault}.*Remove it"),
        lock_of(str(tmp_path)),
    ):
        pass


def test_what_is_no_file_is_no_owner_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    owner = tmp_path / "run" / "owner-00000001.json"
    owner.parent.mkdir()
    puts: list[tuple[Callable[[], object], str]] = [
        (lambda: owner.write_text("{"), "is not an owner file"),
        (lambda: owner.mkdir(), "it is a folder"),
        (lambda: os.mkfifo(owner), "it is a pipe"),
        (lambda: owner.symlink_to("nowhere"), "it is a link to nowhere"),
        (lambda: owner.symlink_to(tmp_path / "elsewhere"), "it is a link to .*elsewhere"),
    ]
    for put, fault in puts:
        put()
        with pytest.raises(UserError, match=fault), lock_of(str(owner.parent)):
            pass
        owner.rmdir() if owner.is_dir() else owner.unlink()
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_folders_that_were_made_for_a_refused_start_are_removed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the data"), lock_of(str(tmp_path / "runs" / "x")):
        raise UserError("the data cannot be used")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with lock_of(str(tmp_path / "mine")):
        pass
    assert (tmp_path / "mine").is_dir()


def test_what_an_owner_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    with lock_of(str(tmp_path)) as lock:
        saved = json.loads((tmp_path / "owner-00000001.json").read_text())
        assert {**saved, "beat": 0} == {**asdict(lock._own), "beat": 0}
        assert (saved["pid"], saved["job"]) == (os.getpid(), "job-7")
