"""A checkpoint exists as a whole or not at all, whenever saving fails, and is never overwritten."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embedtrain import storage
from embedtrain.checkpoint import (
    CheckpointReader,
    ShardView,
    find_checkpoints,
    latest_checkpoint,
    save_checkpoint,
    sweep_leftovers,
    verify,
)
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import CheckpointError, UserError
from tests.unit.checkpoint.example import example_tables, run_threads, save, views_of

_STORAGE_CALLS = ["make_folder", "list_files", "write", "create", "remove", "remove_empty_folder"]
_SYSTEM_CALLS = ["fsync", "link", "unlink"]


class Killed(BaseException):
    """Ends a save as a signal does: nothing after it runs."""


class Fault:
    """Fails the n-th of the calls it stands before; a kill fails all that come after it too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, *, kills: bool) -> None:
        self.calls_left = 0
        self.happened = False
        self._monkeypatch = monkeypatch
        self._error = error
        self._kills = kills

    def before(self, module: Any, names: list[str]) -> None:
        for name in names:
            self._monkeypatch.setattr(module, name, self._guard(getattr(module, name)))

    def _guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            self.calls_left -= 1
            if self.calls_left == 0 or (self.calls_left < 0 and self._kills and self.happened):
                self.happened = True
                raise self._error
            return function(*args, **options)

        return guarded


@pytest.mark.parametrize("kills", [True, False], ids=["killed", "failed"])
@pytest.mark.parametrize("base", ["local", "memory"])
def test_failing_at_any_call_leaves_the_previous_checkpoint(
    base: str, kills: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "checkpoints") if base == "local" else f"memory://{tmp_path.name}-{kills}"
    before = save(root, 1, example_tables())
    survived = 0
    while True:
        with monkeypatch.context() as patch:
            fault = Fault(patch, Killed() if kills else OSError(errno.EIO, "broken"), kills=kills)
            fault.before(storage, _STORAGE_CALLS)
            if base == "local":
                fault.before(os, _SYSTEM_CALLS)
            fault.calls_left = survived + 1
            with contextlib.suppress(Killed, CheckpointError):
                save_checkpoint(root, 2, views_of(example_tables()), {}, ONE_PROCESS)
        latest = latest_checkpoint(root)
        assert latest is not None
        verify(latest)
        if latest != before:
            break
        sweep_leftovers(root, ONE_PROCESS)
        assert storage.list_files(storage.join(root, "step-000000002")) == {}
        survived += 1
    assert survived >= (7 if base == "local" else 4)


def test_a_rank_that_cannot_write_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    tables = example_tables()
    before = save(tmp_path, 1, tables, 3)
    write = storage.write

    def full_disk(url: str, chunks: Any) -> None:
        if "-00001-of-" in url:
            write(url, [next(iter(chunks))])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(url, chunks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write", full_disk)
        outcomes = run_threads(
            3, lambda ranks, rank: save_checkpoint(str(tmp_path), 2, views_of(tables, rank, 3), {}, ranks)
        )
    assert {type(outcome) for outcome in outcomes} == {CheckpointError}
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "step 2 was not saved" in str(outcomes[0])
    assert "rank 1: OSError: [Errno 28] No space left on device" in str(outcomes[0])
    assert latest_checkpoint(str(tmp_path)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_a_rank_that_dies_takes_no_committed_file_with_it(tmp_path: Path) -> None:
    """Rank 0 commits and dies before the others hear of it: their files are part of the checkpoint."""
    tables = example_tables()
    create = storage.create

    def commit_and_die(*args: Any) -> None:
        create(*args)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "create", commit_and_die)
        outcomes = run_threads(
            2, lambda ranks, rank: save_checkpoint(str(tmp_path), 2, views_of(tables, rank, 2), {}, ranks)
        )
    assert isinstance(outcomes[0], Killed)
    assert isinstance(outcomes[1], ConnectionError)
    latest = latest_checkpoint(str(tmp_path))
    assert latest is not None
    verify(latest)


def test_a_complete_step_is_never_overwritten(tmp_path: Path) -> None:
    tables = example_tables()
    path = save(tmp_path, 1, tables, 2)
    contents = {file.name: file.read_bytes() for file in Path(path).iterdir()}
    outcomes = run_threads(
        2, lambda ranks, rank: save_checkpoint(str(tmp_path), 1, views_of(tables, rank, 2), {}, ranks)
    )
    for outcome in outcomes:
        assert isinstance(outcome, CheckpointError)
        assert "already has a complete checkpoint" in str(outcome)
    assert contents == {file.name: file.read_bytes() for file in Path(path).iterdir()}


@pytest.mark.parametrize("base", ["local", "memory"])
def test_of_two_jobs_that_save_one_step_one_succeeds(base: str, tmp_path: Path) -> None:
    root = str(tmp_path) if base == "local" else f"memory://{tmp_path.name}"
    both_written = threading.Barrier(2)
    create = storage.create

    def create_at_once(*args: Any) -> None:
        both_written.wait(10)
        create(*args)

    outcomes: list[Any] = [None, None]

    def job(index: int) -> None:
        try:
            tables = example_tables(seed=index)
            outcomes[index] = save_checkpoint(root, 1, views_of(tables), {"job": index}, ONE_PROCESS)
        except CheckpointError as error:
            outcomes[index] = error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "create", create_at_once)
        jobs = [threading.Thread(target=job, args=(index,)) for index in range(2)]
        for thread in jobs:
            thread.start()
        for thread in jobs:
            thread.join()
    (winner,) = (index for index in range(2) if isinstance(outcomes[index], str))
    assert "another job has completed this step in the meantime" in str(outcomes[1 - winner])
    with CheckpointReader(outcomes[winner]) as reader:
        assert reader.state == {"job": winner}
        expected = example_tables(seed=winner)["item/weight"]
        assert torch.equal(reader.read("item/weight", 0, 37), expected)
    assert len(storage.list_files(outcomes[winner])) == 2


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 4), (5, 10)], r"t/weight: rows \[4, 5\) are missing before shard-.*-00001-of-00002"),
        ([(0, 6), (5, 10)], r"t/weight: rows \[5, 6\) are stored twice before shard-.*-00001-of-00002"),
        ([(0, 4), (4, 9)], "t/weight: the pieces end at row 9 of 10"),
        ([(1, 4), (4, 10)], r"t/weight: rows \[0, 1\) are missing before shard-.*-00000-of-00002"),
    ],
)
def test_shards_that_do_not_tile_are_refused(ranges: list[tuple[int, int]], message: str, tmp_path: Path) -> None:
    table = torch.randn(10, 2)

    def save_range(ranks: Any, rank: int) -> str:
        start, stop = ranges[rank]
        shard = ShardView("t/weight", (10, 2), start, table[start:stop])
        return save_checkpoint(str(tmp_path), 1, [shard], {}, ranks)

    for outcome in run_threads(2, save_range):
        with pytest.raises(CheckpointError, match=message):
            raise outcome  # type: ignore[misc]
    assert find_checkpoints(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    def save_rank(ranks: Any, rank: int) -> str:
        rows = torch.zeros(5, 2, dtype=[torch.float32, torch.float64][rank])
        return save_checkpoint(str(tmp_path), 1, [ShardView("t/weight", (10, 2), 5 * rank, rows)], {}, ranks)

    for outcome in run_threads(2, save_rank):
        with pytest.raises(CheckpointError, match=r"disagree on t/weight: torch.float32 .* torch.float64"):
            raise outcome  # type: ignore[misc]


@pytest.mark.parametrize("state", [{"a": object()}, {"a": float("nan")}, {"a": {1, 2}}])
def test_a_state_that_is_not_json_is_refused_before_anything_is_written(state: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        save_checkpoint(str(tmp_path), 1, views_of(example_tables()), state, ONE_PROCESS)
    assert list(tmp_path.iterdir()) == []


def test_a_layout_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        shard = ShardView("t", (2,), 0, torch.zeros(2), {"kind": object()})
        save_checkpoint(str(tmp_path), 1, [shard], {}, ONE_PROCESS)
    assert list(tmp_path.iterdir()) == []


def test_a_negative_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        save_checkpoint(str(tmp_path), -1, [], {}, ONE_PROCESS)


def test_names_and_dtypes_that_safetensors_cannot_hold_are_refused(tmp_path: Path) -> None:
    for name, dtype in (("__metadata__", torch.float32), ("t", torch.complex64)):
        with pytest.raises(CheckpointError, match=f"cannot save tensor '{name}' of {dtype}"):
            shard = ShardView(name, (2,), 0, torch.zeros(2, dtype=dtype))
            save_checkpoint(str(tmp_path), 1, [shard], {}, ONE_PROCESS)
    twice = ShardView("t", (2,), 0, torch.zeros(2))
    with pytest.raises(CheckpointError, match="two shards of one rank have the same name"):
        save_checkpoint(str(tmp_path), 1, [twice, twice], {}, ONE_PROCESS)


def test_an_unknown_kind_of_path_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="'nosuch://x/step-000000001' is not a path that can be opened"):
        save_checkpoint("nosuch://x", 1, [], {}, ONE_PROCESS)
