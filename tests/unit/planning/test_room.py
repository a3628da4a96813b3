"""Too little memory or disk is found before any table is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedtrain.config.sections import Config
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.planning import room
from embedtrain.planning.room import available_memory_bytes, require_room
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.workload import Sizes
from embedtrain.testing.threads import thread_ranks

SIZES = Sizes({"input": 1_000_000, "output": 1_000_000})
RUNTIME, OTHER_RUNTIME = (Runtime(ranks, ranks.rank, torch.device("cpu")) for ranks in thread_ranks(2))
GIB = 2**30


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(
        None, ["data.path=none", f"run.path={tmp_path}/deep/run", "table.dim=128", "train.words_per_step=16384"]
    )


def have(monkeypatch: pytest.MonkeyPatch, memory: int | None, disk: int) -> None:
    monkeypatch.setattr(room, "available_memory_bytes", lambda: memory)
    monkeypatch.setattr(room.storage, "free_bytes", lambda path: disk if Path(path).is_dir() else None)


def test_memory_is_that_of_all_ranks_of_the_host(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two tables of a million rows of 512 bytes: a GiB, half of it on each rank, and buffers.
    have(monkeypatch, int(1.5 * GIB), 100 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    require_room(config, RUNTIME, SIZES)
    have(monkeypatch, int(0.9 * GIB), 100 * GIB)
    with pytest.raises(UserError, match=r"2 ranks need .* GiB of memory on \S+ \(weights 488.28 MiB.* but 921"):
        require_room(config, RUNTIME, SIZES)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    require_room(config, RUNTIME, SIZES)
    have(monkeypatch, None, 100 * GIB)
    require_room(config, RUNTIME, SIZES)


def test_what_would_help_is_said(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, int(0.4 * GIB), 100 * GIB)
    with pytest.raises(UserError, match=r"it would fit with rows in bfloat16 or \d ranks, 1 per host or dim"):
        require_room(config, RUNTIME, SIZES)


def test_disk_holds_all_checkpoints_that_may_lie_there(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, 100 * GIB, 4 * GIB)
    require_room(config, RUNTIME, SIZES)
    have(monkeypatch, 100 * GIB, 3 * GIB)
    with pytest.raises(UserError, match=r"needs 3.\d+ GiB of free space for 4 checkpoints .* has 3.00 GiB"):
        require_room(config, RUNTIME, SIZES)
    # Another rank says nothing: one is enough. What lies there already is not needed again.
    require_room(config, OTHER_RUNTIME, SIZES)
    step = tmp_path / "deep" / "run" / "checkpoints" / "step-000000001"
    step.mkdir(parents=True)
    with (step / "shard").open("wb") as file:
        file.truncate(GIB)
    require_room(config, RUNTIME, SIZES)


def test_the_memory_of_a_container_is_its_own(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable:  800 kB\n")
    assert available_memory_bytes(tmp_path) == 800 * 1024
    cgroup = tmp_path / "sys" / "fs" / "cgroup"
    cgroup.mkdir(parents=True)
    for name, text in (("memory.max", "600000\n"), ("memory.current", "500000\n")):
        (cgroup / name).write_text(text)
    assert available_memory_bytes(tmp_path) == 100_000
    (cgroup / "memory.stat").write_text("anon 5\ninactive_file 40000\n")
    assert available_memory_bytes(tmp_path) == 140_000
    (cgroup / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) == 800 * 1024
    here = available_memory_bytes()
    assert here is None or here > 0
