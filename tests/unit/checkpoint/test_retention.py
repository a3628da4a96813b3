"""Which checkpoints are found, kept and deleted, and what is swept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from embedtrain import storage
from embedtrain.checkpoint import (
    Retention,
    agree_on_latest,
    find_checkpoints,
    latest_checkpoint,
    retain,
    sweep_leftovers,
    verify,
)
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import CheckpointError, UserError
from tests.unit.checkpoint.example import example_tables, run_threads, save


def save_steps(root: object, *steps: int) -> list[str]:
    return [save(root, step, example_tables(), 2) for step in steps]


def names_in(root: str) -> set[str]:
    return {name for folder in storage.list_folders(root) for name in storage.list_files(f"{root}/{folder}")}


def test_complete_ones_are_found_in_order_of_steps(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert find_checkpoints(f"{root}/nothing-here") == []
    assert latest_checkpoint(root) is None
    paths = save_steps(root, 9, 1_234_567_890, 10)
    (tmp_path / "step-000000099").mkdir()
    for name in ("step-7", "step-00000000000000099", "step-abc", "other"):
        shutil.copytree(paths[0], tmp_path / name)
    assert [(found.path, found.step) for found in find_checkpoints(root)] == [
        (paths[0], 9),
        (paths[2], 10),
        (paths[1], 1_234_567_890),
    ]
    assert latest_checkpoint(root) == paths[1]


def test_all_ranks_take_what_rank_0_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = save_steps(tmp_path, 3)
    assert agree_on_latest(str(tmp_path), ONE_PROCESS) == path
    roots = [str(tmp_path), str(tmp_path / "not-seen-by-rank-1")]
    assert run_threads(2, lambda ranks, rank: agree_on_latest(roots[rank], ranks)) == [path, path]
    monkeypatch.setattr(storage, "list_folders", lambda url: 1 / 0)
    for outcome in run_threads(2, lambda ranks, rank: agree_on_latest(roots[rank], ranks)):
        assert isinstance(outcome, CheckpointError)
        assert "cannot find the latest checkpoint" in str(outcome)


@pytest.mark.parametrize(
    ("keep_last", "kept"),
    [(None, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])],
)
@pytest.mark.parametrize("base", ["local", "memory"])
def test_the_newest_are_kept(base: str, keep_last: int | None, kept: list[int], tmp_path: Path) -> None:
    root = str(tmp_path) if base == "local" else f"memory://{tmp_path.name}-{keep_last}"
    paths = save_steps(root, 1, 2, 3, 4)
    deleted = retain(root, Retention(keep_last), ONE_PROCESS)
    assert [found.step for found in find_checkpoints(root)] == kept
    assert deleted == paths[: 4 - len(kept)]
    assert sorted(storage.list_folders(root)) == [storage.base_name(path) for path in paths[4 - len(kept) :]]


def test_a_negative_count_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keep_last must be at least 1, .* got -1"):
        retain(str(tmp_path), Retention(-1), ONE_PROCESS)


def test_deletion_that_stops_half_way_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    paths = save_steps(root, 1, 2, 3)
    remove = storage.remove
    for allowed in range(3):
        removed: list[str] = []

        def remove_some(url: str, removed: list[str] = removed, allowed: int = allowed) -> None:
            if len(removed) == allowed:
                raise PermissionError("not allowed")
            removed.append(url)
            remove(url)

        monkeypatch.setattr(storage, "remove", remove_some)
        with pytest.raises(CheckpointError, match="were not deleted: PermissionError: not allowed"):
            retain(root, Retention(1), ONE_PROCESS)
        for found in find_checkpoints(root):
            verify(found.path)
    monkeypatch.setattr(storage, "remove", remove)
    retain(root, Retention(1), ONE_PROCESS)
    assert latest_checkpoint(root) == paths[2]
    assert len(sweep_leftovers(root, ONE_PROCESS)) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]


@pytest.mark.parametrize("base", ["local", "memory"])
def test_files_that_no_manifest_lists_are_swept(base: str, tmp_path: Path) -> None:
    root = str(tmp_path) if base == "local" else f"memory://{tmp_path.name}"
    paths = save_steps(root, 1, 2)
    complete = names_in(root)
    attempt = "0123456789abcdef"
    leftovers = {
        f"{root}/{step}/{name}"
        for step in ("step-000000000", "step-000000002", "step-000000003")
        for name in (
            f"shard-{attempt}-00000-of-00002.safetensors",
            f"replicated-{attempt}.safetensors",
            f"manifest-{attempt}.tmp",
        )
    }
    foreign = f"{paths[0]}/notes.txt"
    for url in (*leftovers, foreign):
        storage.make_folder(url.rpartition("/")[0])
        storage.write(url, [b"x"])
    assert [found.path for found in find_checkpoints(root)] == paths
    assert set(sweep_leftovers(root, ONE_PROCESS)) == leftovers
    assert names_in(root) == complete | {"notes.txt"}
    assert sweep_leftovers(root, ONE_PROCESS) == []
    for path in paths:
        verify(path)


def test_nothing_is_swept_beside_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (path,) = save_steps(tmp_path, 1)
    (Path(path) / "manifest.json").write_text("{}")
    before = names_in(str(tmp_path))
    assert sweep_leftovers(str(tmp_path), ONE_PROCESS) == []
    assert names_in(str(tmp_path)) == before


def test_a_listing_that_fails_is_not_taken_for_a_missing_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = save_steps(tmp_path, 1)

    def fail(url: str) -> dict[str, int]:
        raise ConnectionError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "list_files", fail)
        with pytest.raises(CheckpointError, match="no route to host"):
            sweep_leftovers(str(tmp_path), ONE_PROCESS)
        with pytest.raises(CheckpointError, match="no route to host"):
            save_steps(tmp_path, 1)
    verify(path)
