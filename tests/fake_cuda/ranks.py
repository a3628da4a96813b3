"""Process groups of NCCL between ranks that are threads and have a `FakeDevice` each."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from embedtrain.distributed import ranks as ranks_module
from embedtrain.distributed.ranks import ONE_PROCESS, GroupRanks, Ranks
from embedtrain.ops._backend import transfer
from embedtrain.testing.threads import ThreadRanks, run_threads
from tests.fake_cuda.device import CUDA, FakeDevice, current, paused
from tests.fake_cuda.modes import install, running_on

T = TypeVar("T")


TIMEOUT = timedelta(seconds=77)


class _Group:
    """Stands for a process group, and is kept by its job as one is by torch."""

    def __init__(self, through: ThreadRanks, name: str, device: FakeDevice) -> None:
        self.through, self.name, self.device = through, name, device
        self.made: list[_Group] = []
        self.options = SimpleNamespace(_timeout=TIMEOUT)

    def _get_backend(self, device: torch.device) -> SimpleNamespace:
        assert device.type == "cuda"
        return SimpleNamespace(options=self.options)


class _Dist:
    """Stands for `torch.distributed` in `embedtrain.distributed.ranks`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def get_rank(self, group: _Group) -> int:
        return group.through.rank

    def get_world_size(self, group: _Group) -> int:
        return group.through.size

    def get_process_group_ranks(self, group: _Group) -> list[int]:
        return list(range(group.through.size))

    def get_backend_config(self, group: _Group) -> str:
        return "cpu:gloo,cuda:nccl"

    def new_group(self, ranks: Sequence[int], **options: Any) -> _Group:
        device = current()
        assert device is not None
        assert options["timeout"] == TIMEOUT and options["device_id"] == CUDA, "a group of its own defaults"
        device.num_groups += 1
        group = _Group(_through(device), f"group {device.num_groups}", device)
        _jobs[id(device)].made.append(group)
        return group

    def all_to_all_single(
        self, output: Tensor, rows: Tensor, output_sizes: list[int], input_sizes: list[int], group: _Group
    ) -> None:
        group.device.collective(group.name, "all_to_all", [output, rows], [output])
        with paused():
            sent = [part.clone() for part in rows.split(input_sizes)]
            arrived = self._meet(group, "all_to_all", sent)
            parts = [parts[group.through.rank] for parts in arrived]
            assert [len(part) for part in parts] == output_sizes, "ranks disagree on what travels"
            output.copy_(torch.cat(parts))

    def all_reduce(self, values: Tensor, op: Any, group: _Group) -> None:
        group.device.collective(group.name, "all_reduce", [values], [values])
        with paused():
            arrived = self._meet(group, "all_reduce", values.clone())
            values.copy_(torch.stack(arrived).sum(dim=0))

    def broadcast(self, values: Tensor, group_src: int, group: _Group) -> None:
        group.device.collective(group.name, "broadcast", [values], [values])
        with paused():
            values.copy_(self._meet(group, "broadcast", values.clone())[group_src])

    def all_gather_object(self, gathered: list[Any], value: Any, group: _Group) -> None:
        group.device.collective(group.name, "all_gather_object", [], [])
        with paused():
            gathered[:] = [pickle.loads(sent) for sent in self._meet(group, "all_gather_object", pickle.dumps(value))]

    def _meet(self, group: _Group, kind: str, value: Any) -> list[Any]:
        return group.through._turns.meet(group.through.rank, f"{kind} of {group.name}", value)


_jobs: dict[int, _Group] = {}


def _through(device: FakeDevice) -> ThreadRanks:
    return _jobs[id(device)].through


def run_on_devices(
    world_size: int, monkeypatch: pytest.MonkeyPatch, function: Callable[[FakeDevice, Ranks], T], **options: Any
) -> list[T]:
    """Calls `function(device, ranks)` on each rank, and returns the results in rank order; options are the devices'."""
    install(monkeypatch)
    monkeypatch.setattr(ranks_module, "dist", _Dist())
    monkeypatch.setattr(transfer, "_patience", transfer._Patience())

    def run(through: Ranks) -> T:
        device = FakeDevice(**options)
        with running_on(device):
            if through is ONE_PROCESS:
                return function(device, through)
            assert isinstance(through, ThreadRanks)
            group = _jobs[id(device)] = _Group(through, "the job", device)
            try:
                return function(device, GroupRanks(group))  # type: ignore[arg-type]
            finally:
                del _jobs[id(device)]

    return run_threads(world_size, run)
