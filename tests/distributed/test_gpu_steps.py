"""Steps on a pretended GPU: one wait of the host a step, every access ordered, and the CPU's losses.

What a real GPU does wrong now and then, and slows down always, is seen here at once; see `tests.fake_cuda`.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.embedding.table_group import TableGroup
from embedtrain.train.ahead import BatchesAhead, PreparesBatches, tensors_of

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu takes the steps on it", allow_module_level=True)

from tests.fake_cuda.device import FakeDevice
from tests.fake_cuda.modes import Event, Stream
from tests.fake_cuda.ranks import run_on_devices
from tests.fake_cuda.steps import RECIPES, Record, train_library, train_recipe

SLOW = pytest.mark.slow
MOST_WAITS = {"library": (1, 2)}
"""Waits of the host in a step, on one rank and on two: one, but for a look-up whose ids nobody prepared."""


def steps_of(name: str) -> Callable[[FakeDevice | None, Ranks], Record]:
    if name == "library":
        return train_library
    return lambda device, ranks: train_recipe(name, device, ranks)


def check(record: Record, most_waits: int, name: str) -> None:
    assert not record.hazards
    assert len(record.waits) <= most_waits, record.waits
    if name != "library":
        assert all(wait.num_left > 0 for wait in record.waits), "the device has nothing to do while the host waits"


NAMES = [*RECIPES, "library"]
_IN_FAST_RUN = ("retrieval",)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_one_rank_waits_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = run_on_devices(1, monkeypatch, steps_of(name), runs_kernels=False)
    check(record, MOST_WAITS.get(name, (1, 1))[0], name)


@pytest.mark.parametrize("name", [name if name in _IN_FAST_RUN else pytest.param(name, marks=SLOW) for name in NAMES])
def test_steps_have_the_losses_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels compute here, in Triton's interpreter, which takes seconds."""
    expected = steps_of(name)(None, ONE_PROCESS)
    (record,) = run_on_devices(1, monkeypatch, steps_of(name))
    assert not record.hazards
    assert record.losses == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_two_ranks_waits_once_and_orders_what_it_sends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = run_on_devices(2, monkeypatch, steps_of(name), runs_kernels=False)
    for record in records:
        check(record, MOST_WAITS.get(name, (1, 1))[1], name)
    of_groups = [
        {group: [each for each in record.collectives if each.group == group] for group in ("the job", "group 1")}
        for record in records
    ]
    # The second rank's batches are smaller, and one is empty.
    assert of_groups[0] == of_groups[1]
    assert of_groups[0]["the job"] and bool(of_groups[0]["group 1"]) == (name != "library")


LEFT_OUT = {
    "wait_stream": (1, Stream, "wait_stream", lambda self, other: None, "in no order"),
    "record_stream": (1, Tensor, "record_stream", lambda self, stream: None, "record_stream does not name it"),
    "wait_event": (2, Stream, "wait_event", lambda self, event: None, "a collective of the job are in no order"),
    "synchronize": (1, Event, "synchronize", lambda self: None, "while a copy of it is under way"),
}


@pytest.mark.parametrize("call", LEFT_OUT)
def test_what_keeps_streams_apart_is_missed_if_it_is_left_out(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world_size, owner, name, nothing, hazard = LEFT_OUT[call]

    def train(device: FakeDevice, ranks: Ranks) -> Record:
        monkeypatch.setattr(owner, name, nothing)
        return train_recipe("skip-gram", device, ranks)

    records = run_on_devices(world_size, monkeypatch, train, runs_kernels=False)
    assert any(hazard in found for found in records[0].hazards), records[0].hazards


_NO_PART_OF_A_BATCH = (TableGroup, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)


def _reachable(value: Any) -> set[int]:
    """Returns the tensors that a value refers to by any way that Python's collector knows, apart from tables."""
    found, seen, waiting = set(), set(), [value]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, _NO_PART_OF_A_BATCH):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            found.add(id(each))
        else:
            waiting += gc.get_referents(each)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_of_a_prepared_batch_is_found(name: str) -> None:
    task = RECIPES[name](ONE_PROCESS, torch.device("cpu"), **{} if "host" in name else {"placement": "host"})
    ahead = BatchesAhead(task)
    assert isinstance(task.model, PreparesBatches)
    ahead.prepare([(0, 0)])
    prepared = ahead.take(0, 0).batch
    assert {id(tensor) for tensor in tensors_of(prepared)} == _reachable(prepared) != set()
