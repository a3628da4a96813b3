"""Saves in the background hold the rows as they were; deltas make up the whole; failures are counted, never lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embedtrain import storage
from embedtrain.checkpoint import (
    CheckpointReader,
    CheckpointSaver,
    Retention,
    RowChanges,
    SaveOptions,
    ShardView,
    compact,
    find_checkpoints,
    load_shards,
    retain,
    verify,
)
from embedtrain.checkpoint.retention import mode_of_best
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import CheckpointError, CorruptCheckpointError, UserError

NUM_ROWS = 2000
TABLES = {"item": (0, 1500), "word": (1500, 2000)}


class Group:
    """Two tables in one group of rows, as a collection holds them, and an optimizer that adds to rows."""

    def __init__(self, dim: int = 16) -> None:
        self.tensors = {"weight": torch.randn(NUM_ROWS, dim), "accumulator": torch.rand(NUM_ROWS)}
        self.changes = RowChanges(self.tensors)
        self.generator = torch.Generator().manual_seed(0)

    def update(self, num_rows: int = 50) -> None:
        rows = torch.randint(0, NUM_ROWS, (num_rows,), generator=self.generator).unique()
        self.changes.before_update(rows)
        for tensor in self.tensors.values():
            tensor[rows] += 1

    def views(self, offset: int = 0) -> list[ShardView]:
        return [
            ShardView(
                f"{table}/{name}",
                (stop - first, *tensor.shape[1:]),
                0,
                tensor[first:stop],
                {"kind": "spread", "multiplier": 1},
                self.changes,
                first,
            )
            for table, (first, stop) in TABLES.items()
            for name, tensor in self.tensors.items()
        ]

    def copies(self) -> dict[str, Tensor]:
        return {view.name: view.tensor.clone() for view in self.views()}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Writing a file takes one permit a block; blocks are small."""
    permits = threading.Semaphore(0)
    write = storage.write

    def slowly(url: str, chunks: Any) -> None:
        def one_by_one() -> Iterator[Any]:
            for chunk in chunks:
                permits.acquire()
                yield chunk

        write(url, one_by_one())

    monkeypatch.setattr(storage, "write", slowly)
    monkeypatch.setattr("embedtrain.embedding.row_changes._BLOCK_BYTES", 4096)
    monkeypatch.setattr("embedtrain.embedding.row_changes._CHUNK_BYTES", 2048)
    yield permits
    permits.release(10**6)


def saver_of(root: object, **options: Any) -> CheckpointSaver:
    return CheckpointSaver(str(root), ONE_PROCESS, ONE_PROCESS, SaveOptions(**options))


def saved(path: str) -> dict[str, Tensor]:
    with CheckpointReader(path) as reader:
        return {name: reader.read(name, 0, info.shape[0]) for name, info in reader.tensors.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("full_every", [1, 3])
def test_rows_are_saved_as_they_were_while_training_goes_on(
    full_every: int, tmp_path: Path, gate: threading.Semaphore
) -> None:
    group = Group()
    saver = saver_of(tmp_path, full_every=full_every)
    expected = {}
    for step in (1, 2, 3):
        expected[step] = group.copies()
        saver.save(step, group.views(), {})
        for _ in range(60):
            group.update()
            gate.release()
        gate.release(10**4)
        saver.settle()
        while gate.acquire(blocking=False):
            pass
    for found in find_checkpoints(str(tmp_path)):
        assert_equal(saved(found.path), expected[found.step])


def test_saving_does_not_hold_up_training(tmp_path: Path, gate: threading.Semaphore) -> None:
    group = Group()
    saver = saver_of(tmp_path)
    saver.save(1, group.views(), {})
    for _ in range(20):
        group.update()
    assert find_checkpoints(str(tmp_path)) == []
    assert not saver.has_failed
    assert saver.complete_step is None
    gate.release(10**4)
    while not saver.is_idle:
        time.sleep(0.001)
    assert saver.complete_step == 1, "before anybody settles it"
    saver.settle()
    assert saver.complete_step == 1
    assert [found.step for found in find_checkpoints(str(tmp_path))] == [1]


@pytest.mark.parametrize("limit", [0, 4 * NUM_ROWS + 5000])
def test_where_memory_does_not_suffice_training_waits_and_says_so_once(
    limit: int, tmp_path: Path, gate: threading.Semaphore, caplog: pytest.LogCaptureFixture
) -> None:
    group = Group()
    saver = saver_of(tmp_path, max_extra_memory_bytes=limit)
    for step in (1, 2):
        expected = group.copies()
        saver.save(step, group.views(), {})
        threading.Timer(0.2, gate.release, [10**4]).start()
        for _ in range(100):
            group.update()
        saver.settle()
        assert_equal(saved(find_checkpoints(str(tmp_path))[-1].path), expected)
        while gate.acquire(blocking=False):
            pass
    warnings = [record.message for record in caplog.records if "max_extra_memory_bytes" in record.message]
    assert len(warnings) == 1


def test_other_tensors_and_the_state_are_copied_when_the_save_begins(tmp_path: Path, gate: threading.Semaphore) -> None:
    plain, dense, state = torch.zeros(5), torch.zeros(3), {"step": [1]}
    saver = saver_of(tmp_path)
    saver.save(1, [ShardView("t/weight", (5,), 0, plain)], state, {"dense": dense})
    plain += 1
    dense += 1
    state["step"].append(2)
    gate.release(100)
    saver.settle()
    with CheckpointReader(find_checkpoints(str(tmp_path))[0].path) as reader:
        assert not reader.read("t/weight", 0, 5).any()
        assert not reader.replicated()["dense"].any()
        assert reader.state == {"step": [1]}


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Callable[[], None]:
    write = storage.write

    def fail(url: str, chunks: Any) -> None:
        raise error

    monkeypatch.setattr(storage, "write", fail)
    return lambda: monkeypatch.setattr(storage, "write", write)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_few_failures_are_warned_of_and_the_next_save_is_full(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = Group()
    saver = saver_of(tmp_path, mode=mode, max_failures=2, full_every=10)
    saver.save(1, group.views(), {})
    saver.settle()
    repair = failing(monkeypatch, OSError(28, "No space left on device"))
    for step in (2, 3):
        group.update()
        saver.save(step, group.views(), {})
        saver.settle()
        assert saver.step is None
    assert sum("training continues" in record.message for record in caplog.records) == 2
    repair()
    saver.save(4, group.views(), {})
    saver.settle()
    assert [found.step for found in find_checkpoints(str(tmp_path))] == [1, 4]
    newest = find_checkpoints(str(tmp_path))[1].path
    with CheckpointReader(newest) as reader:
        assert reader.manifest.parent is None
    failing(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError, match=r"No space left on device \(consecutive failed saves: 3\)"):
        for step in range(5, 10):
            saver.save(step, group.views(), {})
            saver.settle()
    assert step == 7


def test_the_last_save_and_the_users_mistakes_are_not_tolerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group()
    with pytest.raises(UserError, match="nosuch"):
        saver = saver_of("nosuch://x")
        saver.save(1, group.views(), {})
        saver.settle()
    repair = failing(monkeypatch, OSError(5, "broken"))
    saver = saver_of(tmp_path)
    with pytest.raises(CheckpointError, match="broken"):
        saver.save(1, group.views(), {}, is_last=True)
    repair()
    saver.save(1, group.views(), {}, is_last=True)
    assert [found.step for found in find_checkpoints(str(tmp_path))] == [1]


def test_a_background_failure_is_seen_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, OSError(5, "broken"))
    group = Group()
    saver = saver_of(tmp_path, max_failures=0)
    saver.save(1, group.views(), {})
    for thread in threading.enumerate():
        if thread.name == "embedtrain-checkpoint":
            thread.join()
    assert saver.has_failed
    with pytest.raises(CheckpointError, match="broken"):
        saver.settle()


@pytest.fixture
def chain(tmp_path: Path) -> tuple[str, dict[int, dict[str, Tensor]]]:
    """Six checkpoints, steps 1 to 6, of which 1 and 4 are full."""
    group, root = Group(), str(tmp_path / "checkpoints")
    saver = saver_of(root, full_every=3)
    expected = {}
    for step in range(1, 7):
        expected[step] = group.copies()
        saver.save(step, group.views(), {"metrics": {"loss": abs(step - 3) + 1.0}})
        for _ in range(2):
            group.update()
    saver.settle()
    return root, expected


def test_a_chain_is_read_as_the_whole(chain: tuple[str, dict[int, dict[str, Tensor]]]) -> None:
    root, expected = chain
    found = find_checkpoints(root)
    parents = []
    for checkpoint in found:
        verify(checkpoint.path)
        with CheckpointReader(checkpoint.path) as reader:
            parents.append(reader.manifest.parent.step if reader.manifest.parent else None)
            for name, table in expected[checkpoint.step].items():
                assert torch.equal(reader.read(name, 0, len(table)), table)
                assert torch.equal(reader.read(name, 33, 487), table[33:487])
                slots = torch.randint(0, len(table), (700,))
                assert torch.equal(reader.gather(name, slots), table[slots])
                strided = torch.empty(len(table), 2, *table.shape[1:])[:, 1]
                reader.read_into(name, 0, strided)
                assert torch.equal(strided, table)
    assert parents == [None, 1, 2, None, 4, 5]
    sizes = [sum(storage.list_files(checkpoint.path).values()) for checkpoint in found]
    assert sizes[1] < sizes[0] / 4


def test_a_chain_is_loaded_in_place(chain: tuple[str, dict[int, dict[str, Tensor]]]) -> None:
    root, expected = chain
    group = Group()
    with CheckpointReader(find_checkpoints(root)[2].path) as reader:
        load_shards(reader, group.views())
    assert_equal(group.copies(), expected[3])


def test_a_broken_chain_is_refused(chain: tuple[str, dict[int, dict[str, Tensor]]], tmp_path: Path) -> None:
    root, _ = chain
    paths = [Path(found.path) for found in find_checkpoints(root)]
    shard = next(paths[1].glob("*.safetensors"))
    data = shard.read_bytes()
    for byte in range(0, len(data), 997):
        shard.write_bytes(data[:byte] + bytes([data[byte] ^ 1]) + data[byte + 1 :])
        with pytest.raises(CorruptCheckpointError, match=shard.name):
            verify(str(paths[2]))
    with pytest.raises(CorruptCheckpointError, match=shard.name):
        saved(str(paths[2]))
    shard.write_bytes(data)
    verify(str(paths[2]))
    manifest = paths[1] / "manifest.json"
    kept = manifest.read_bytes()
    manifest.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"step-000000003 is a delta of .*000000002, which is missing"):
        CheckpointReader(str(paths[2]))
    other = saver_of(tmp_path / "other")
    group = Group()
    other.save(2, group.views(), {}, is_last=True)
    manifest.write_bytes((tmp_path / "other" / "step-000000002" / "manifest.json").read_bytes())
    with pytest.raises(CorruptCheckpointError, match="is a delta of another checkpoint than the one now in"):
        CheckpointReader(str(paths[2]))
    manifest.write_bytes(kept)
    verify(str(paths[2]))


def test_compaction_makes_one_of_a_chain(
    chain: tuple[str, dict[int, dict[str, Tensor]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedtrain.checkpoint.compaction._BLOCK_BYTES", 5000)
    root, expected = chain
    path = compact(find_checkpoints(root)[2].path, str(tmp_path / "compacted"))
    verify(path)
    assert_equal(saved(path), expected[3])
    with CheckpointReader(path) as reader:
        assert reader.manifest.parent is None
        assert reader.state == {"metrics": {"loss": 1.0}}


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(keep_last=1), [4, 5, 6]),
        (Retention(keep_last=3), [4, 5, 6]),
        (Retention(keep_last=1, keep_every=2), [1, 2, 4, 5, 6]),
        (Retention(keep_best=1), [1, 2, 3, 4, 5, 6]),
        (Retention(keep_best=1, best_mode="max"), [4, 5, 6]),
        (Retention(keep_best=1, best_metric="nothing", best_mode="max"), [4, 5, 6]),
    ],
)
def test_what_a_kept_delta_changes_is_kept(
    retention: Retention, kept: list[int], chain: tuple[str, dict[int, dict[str, Tensor]]]
) -> None:
    root, expected = chain
    retain(root, retention, ONE_PROCESS)
    assert [found.step for found in find_checkpoints(root)] == kept
    for found in find_checkpoints(root):
        verify(found.path)
        assert_equal(saved(found.path), expected[found.step])


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(keep_last=1, keep_best=1, best_metric="auc"), [200, 400]),
        (Retention(keep_last=1, keep_best=2, best_metric="auc"), [100, 200, 400]),
        (Retention(keep_last=1, keep_best=3, best_metric="auc"), [100, 200, 400]),
        (Retention(keep_last=1, keep_best=2, best_metric="auc", best_mode="min"), [100, 400]),
    ],
)
def test_checkpoints_that_hold_the_same_measurement_count_once(
    retention: Retention, kept: list[int], tmp_path: Path
) -> None:
    saver = saver_of(tmp_path)
    for step, value, measured_at in [
        (100, 0.7, 100),
        (200, 0.8, 200),
        (250, 0.8, 200),
        (300, 0.8, 200),
        (400, 0.6, 400),
    ]:
        state = {"metrics": {"auc": value}, "measured_at": {"auc": measured_at}}
        saver.save(step, Group().views(), state, is_last=True)
    retain(str(tmp_path), retention, ONE_PROCESS)
    assert [found.step for found in find_checkpoints(str(tmp_path))] == kept


def test_a_damaged_newest_one_does_not_cost_the_last_whole_one(
    chain: tuple[str, dict[int, dict[str, Tensor]]],
) -> None:
    root, _ = chain
    newest = Path(find_checkpoints(root)[-1].path)
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    retain(root, Retention(keep_last=1), ONE_PROCESS)
    assert [found.step for found in find_checkpoints(root)] == [4, 5, 6]
    (newest / "manifest.json").write_text("{}")
    retain(root, Retention(keep_last=1), ONE_PROCESS)
    verify(find_checkpoints(root)[1].path)


def test_a_disk_that_is_too_full_fails_the_save_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda url: 1000)
    with pytest.raises(CheckpointError, match=r"the checkpoint needs 136,000 bytes, but the disk has 1,000 bytes left"):
        saver_of(tmp_path).save(1, Group().views(), {}, is_last=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("loss", "min"), ("valid_log_loss", "min"), ("valid_auc", "max"), ("recall@20", "max"), ("similarity", "max")],
)
def test_it_is_known_which_values_of_a_measure_are_the_best(metric: str, mode: str) -> None:
    assert mode_of_best(metric, "auto") == mode
    assert mode_of_best(metric, "min") == "min"


def test_the_best_of_another_measure_must_be_said() -> None:
    with pytest.raises(
        UserError, match=r"best_metric=words_per_second does not tell .*: set checkpoint\.best_mode=min or"
    ):
        mode_of_best("words_per_second", "auto")
