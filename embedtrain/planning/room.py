"""Checks that a run fits into this host's memory and the disk of the run folder, before tables are created."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from embedtrain import storage
from embedtrain.config.sections import Config
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.planning.plan import Memory, checkpoint_bytes, memory_of, remedies
from embedtrain.planning.sizes import format_bytes
from embedtrain.recipes.building import workload_of
from embedtrain.recipes.workload import Sizes, Workload
from embedtrain.train.run_folder import RunFolder


def require_room(config: Config, runtime: Runtime, sizes: Sizes) -> None:
    """Checks that this host has enough memory for a run, and the disk of the run folder enough space.

    Memory for background saves is not counted, because a save with less memory only takes longer.

    Raises:
        UserError: memory or disk is too small; the message says what is needed, what is available, and what would help.
    """
    workload = workload_of(config, sizes)
    _require_memory(workload, runtime)
    if runtime.rank == 0:
        _require_disk(workload, config)


def _require_memory(workload: Workload, runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        num_ranks, available = 1, int(torch.cuda.mem_get_info(runtime.device)[0])
        where = f"{runtime.device} of {socket.gethostname()}"
    else:
        num_ranks, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), available_memory_bytes()
        where = socket.gethostname()
        if found is None:
            return
        available = found
    workload = replace(workload, save_bytes=0)
    memory = memory_of(workload, runtime.world_size)
    needed = memory.total
    if needed * num_ranks <= available:
        return
    changes = [
        # More ranks on the same host would not help, because each needs its own memory.
        f"{remedy.change}, {num_ranks} per host" if remedy.change.endswith(" ranks") else remedy.change
        for remedy in remedies(workload, runtime.world_size, available // num_ranks)
    ]
    helps = f"it would fit with {' or '.join(changes)}" if changes else "no single change of dtype, ranks or dim helps"
    ranks = "1 rank needs" if num_ranks == 1 else f"{num_ranks} ranks need"
    raise UserError(
        f"{ranks} {format_bytes(needed * num_ranks)} of memory on {where} ({_listed(memory)} per rank), but "
        f"{format_bytes(available)} are available: {helps}; see embedtrain plan"
    )


def _listed(memory: Memory) -> str:
    parts = {
        "weights": memory.weights,
        "optimizer state": memory.state,
        "dense part": memory.dense,
        "buffers": memory.buffers,
    }
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)


def _require_disk(workload: Workload, config: Config) -> None:
    free = _free_bytes(config.run.path)
    if free is None:
        return
    whole = checkpoint_bytes(workload)
    folder = RunFolder(config.run.path).checkpoints_path
    there = sum(
        size for name in storage.list_folders(folder) for size in storage.list_files(f"{folder}/{name}").values()
    )
    needed = whole * workload.num_checkpoints - there
    if needed > free:
        raise UserError(
            f"the disk of run.path={config.run.path} needs {format_bytes(needed)} of free space for "
            f"{workload.num_checkpoints} checkpoints of {format_bytes(whole)}, but has {format_bytes(free)}: free "
            "space, "
            "choose another run.path, or keep fewer checkpoints with checkpoint.keep_last"
        )


def _free_bytes(url: str) -> int | None:
    """Returns the free space of the disk of an existing or future folder; None if unknown."""
    path = storage.local_path(url)
    if path is None:
        return None
    nearest = next(folder for folder in (Path(path), *Path(path).parents) if folder.is_dir())
    return storage.free_bytes(str(nearest))


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Returns the memory available on this host or in its container; None if the kernel does not report it.

    Args:
        root: folder that contains `proc` and `sys`.
    """
    found = []
    host = _numbers(root / "proc/meminfo", 1024)
    if "MemAvailable:" in host:
        found.append(host["MemAvailable:"])
    limit, used = (_number(root / "sys/fs/cgroup" / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        # Cached file pages count as used, but the kernel frees them on demand.
        cached = _numbers(root / "sys/fs/cgroup/memory.stat", 1).get("inactive_file", 0)
        found.append(max(0, limit - used + cached))
    return min(found, default=None)


def _numbers(path: Path, unit_bytes: int) -> Mapping[str, int]:
    """Parses lines such as "MemAvailable: 123 kB" into bytes by name."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) * unit_bytes for words in lines if len(words) > 1 and words[1].isdigit()}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
