"""Steps on a pretended GPU: one wait of the host a step, every access ordered, and the CPU's losses.

What a real GPU does wrong now and then, and slows down always, is seen here at once; see `tests.fake_cuda`.
"""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embedtrain as et
from embedtrain.distributed.failure import is_of_the_group
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.embedding.copy_stream import host_blocks
from embedtrain.embedding.row_changes import MemoryBudget
from embedtrain.embedding.table_group import TableGroup
from embedtrain.errors import DeviceTimeoutError
from embedtrain.metrics.classification import ClassificationMeter
from embedtrain.ops._backend import transfer
from embedtrain.ops._backend.transfer import to_device
from embedtrain.ops.sort_unique import OrderedKeys
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.train.ahead import BatchesAhead, PreparesBatches, tensors_of
from embedtrain.train.step import train_step
from embedtrain.train.task import Objective
from embedtrain.train.trainer import _Window

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu takes the steps on it", allow_module_level=True)

from tests.fake_cuda.device import CUDA, FakeDevice
from tests.fake_cuda.modes import Event, Stream
from tests.fake_cuda.ranks import TIMEOUT, run_on_devices
from tests.fake_cuda.steps import RECIPES, Record, train_library, train_recipe

SLOW = pytest.mark.slow
LIBRARY: dict[str, Callable[[FakeDevice | None, Ranks], Record]] = {
    "library": train_library,
    "library, ids on the host": functools.partial(train_library, ids_are_on_host=True),
    "library, asked ahead": functools.partial(train_library, is_ahead=True),
}
NAMES = [*RECIPES, *LIBRARY]


def steps_of(name: str) -> Callable[[FakeDevice | None, Ranks], Record]:
    return LIBRARY.get(name) or (lambda device, ranks: train_recipe(name, device, ranks))


def check(record: Record, name: str) -> None:
    assert not record.hazards
    assert len(record.waits) <= 1, record.waits
    if name not in LIBRARY:
        assert all(wait.num_left > 0 for wait in record.waits), "the device has nothing to do while the host waits"


_IN_FAST_RUN = ("retrieval",)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_one_rank_waits_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = run_on_devices(1, monkeypatch, steps_of(name), runs_kernels=False)
    check(record, name)
    assert not record.unordered_sums, "a resumed run would round otherwise"


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
        check(record, name)
    of_groups = [
        {group: [each for each in record.collectives if each.group == group] for group in ("the job", "group 1")}
        for record in records
    ]
    # The second rank's batches are smaller, and one is empty.
    assert of_groups[0] == of_groups[1]
    assert of_groups[0]["the job"] and bool(of_groups[0]["group 1"]) == (name not in LIBRARY or "ahead" in name)


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
    ahead.prepare_next(0, 0)
    prepared = ahead.take(0, 0).batch
    assert {id(tensor) for tensor in tensors_of(prepared)} == _reachable(prepared) != set()


def _look_up(ranks: Ranks, batch_of: Callable[[int], dict[str, Any]], is_ahead: bool) -> tuple[str, bool]:
    """Returns what a look-up of wrong ids raises, and whether a right one works after it."""
    tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)], device="cuda", ranks=ranks)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        tables.look_up(tables.ask(batch_of(ranks.rank), is_ahead=is_ahead))
    rows = tables({"item": to_device(torch.tensor([3]), tables.device)})["item"]
    return str(raised.value), rows.shape == (1, 4)


WRONG = {
    "an id": (
        lambda rank: {"item": to_device(torch.tensor([1, 10 if rank == 0 else 2]), CUDA)},
        "id 10 at position 1 of the batch (bag 1) on rank 0 is outside the table's range 0 to 9",
    ),
    "lengths": (
        lambda rank: {
            "item": et.Jagged(to_device(torch.arange(3), CUDA), to_device(torch.tensor([1, 2 if rank else 1]), CUDA))
        },
        "feature 'item': lengths must not be negative and must add up to the 3 values, got a sum of 2",
    ),
}


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_ids_on_a_gpu_are_refused_on_every_rank(
    what: str, world_size: int, is_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_of, text = WRONG[what]
    found = run_on_devices(
        world_size, monkeypatch, lambda device, ranks: _look_up(ranks, batch_of, is_ahead), runs_kernels=False
    )
    for message, goes_on in found:
        assert text in message
        assert goes_on


def _skip_a_step(device: FakeDevice | None, ranks: Ranks, name: str, at: int | None) -> dict[str, Tensor]:
    """Trains a dense layer beside a table for three steps, one of which is not finite; returns what was trained."""
    where = torch.device("cpu" if device is None else "cuda")
    tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)], device=where, ranks=ranks)
    torch.manual_seed(0)
    layer = nn.Linear(4, 1).to(where)
    dense = DenseOptimizer(layer, name=name, ranks=ranks, lr=0.1)
    optimizer = et.optim.Adam(tables, lr=0.1, nonfinite="skip")
    optimizer.looks_later = dense.takes_found_inf

    def model(batch: Any) -> Objective:
        loss = layer(tables({"item": batch})["item"]).square().sum()
        if step == at:
            loss = loss * torch.full((), torch.inf, device=where)
        return Objective(loss, loss.detach().double(), 1)

    for step in range(3):
        train_step(model, optimizer, to_device(torch.arange(3 + step), where), dense)
    optimizer.settle()
    assert optimizer.num_skipped == (at is not None)
    tensors = {"rows": tables.gather_table("item"), **dense.tensors()}
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["adam", pytest.param("sgd", marks=SLOW), pytest.param("adamw", marks=SLOW)])
def test_a_step_that_is_not_finite_leaves_dense_parameters_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _skip_a_step(None, ONE_PROCESS, name, at=1)
    (found,) = run_on_devices(1, monkeypatch, lambda device, ranks: _skip_a_step(device, ranks, name, at=1))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-6), key


def test_a_rank_that_is_gone_is_named_and_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of NCCL whose peer died never ends: the host must not block in the driver."""

    def ask(device: FakeDevice, ranks: Ranks) -> None:
        _hang(monkeypatch)
        tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)], device="cuda", ranks=ranks)
        _check_gives_up(device, lambda: tables({"item": torch.tensor([3])}))

    run_on_devices(2, monkeypatch, ask, runs_kernels=False)


def _hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the device come to no further event, and the host wait a short time for it."""
    monkeypatch.setattr(Event, "query", lambda self: False)
    transfer.wait_at_most(0.02)


def _check_gives_up(device: FakeDevice, wait: Callable[[], object]) -> None:
    """Checks that the host gives up, and that it has not waited in any other way, which would have no end."""
    device.forget_step()
    with pytest.raises(DeviceTimeoutError, match="another rank did not take part in a collective") as raised:
        wait()
    assert is_of_the_group(raised.value), "the ranks tell each other which one is to blame"
    assert not device.waits


def _trained(looks_later: bool, **options: Any) -> tuple[et.EmbeddingCollection, et.optim.SparseOptimizer]:
    """Returns tables whose optimizer has a step to settle, or gradients to take."""
    tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)], device="cuda", **options)
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
    optimizer.looks_later = looks_later
    tables({"item": torch.tensor([3, 9])})["item"].sum().backward()
    if looks_later:
        optimizer.step()
    return tables, optimizer


def _wait_for_the_verdict() -> Callable[[], object]:
    return _trained(looks_later=True)[1].settle


def _wait_for_gradients() -> Callable[[], object]:
    return _trained(looks_later=False)[1].step


def _wait_for_a_save() -> Callable[[], object]:
    tables, optimizer = _trained(looks_later=True)
    optimizer.settle()
    views = tables.shard_views()
    return lambda: next(iter(host_blocks([view.tensor.clone() for view in views], CUDA)))


def _wait_for_rows_aside() -> Callable[[], object]:
    tables, _ = _trained(looks_later=True)
    changes = tables.table_groups[0].changes
    changes.snapshot(MemoryBudget(None), None)
    return lambda: changes.before_update(to_device(torch.tensor([3]), CUDA))


def _wait_for_rows_in_host_memory() -> Callable[[], object]:
    tables, optimizer = _trained(looks_later=True, placement="host", cache_bytes=100)
    optimizer.settle()
    return tables.write_back


def _wait_for_ids() -> Callable[[], object]:
    tables, _ = _trained(looks_later=True)
    ids = to_device(torch.tensor([3]), CUDA)
    return lambda: tables({"item": ids})


def _wait_for_the_number_of_rows() -> Callable[[], object]:
    keys = OrderedKeys(to_device(torch.tensor([3, 3]), CUDA))
    return lambda: keys.sorted


def _wait_for_losses() -> Callable[[], object]:
    window = _Window()
    window.add(Objective(torch.zeros(1, device=CUDA), torch.zeros((), device=CUDA), 1), 1)
    return lambda: window.local


def _wait_for_predictions() -> Callable[[], object]:
    logits = torch.zeros(3, device=CUDA)
    return lambda: ClassificationMeter().add(logits, logits)


@pytest.mark.parametrize(
    "prepare",
    [
        _wait_for_the_verdict,
        _wait_for_gradients,
        _wait_for_a_save,
        _wait_for_rows_aside,
        _wait_for_rows_in_host_memory,
        _wait_for_ids,
        _wait_for_the_number_of_rows,
        _wait_for_losses,
        _wait_for_predictions,
    ],
)
def test_no_wait_for_a_device_that_hangs_is_without_end(
    prepare: Callable[[], Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_wait(device: FakeDevice, ranks: Ranks) -> None:
        wait = prepare()
        _hang(monkeypatch)
        _check_gives_up(device, wait)

    run_on_devices(1, monkeypatch, check_wait, runs_kernels=False)


def test_a_process_waits_for_its_device_as_long_as_the_job_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def patience(device: FakeDevice, ranks: Ranks) -> float | None:
        ranks.beside()  # checks the time-out of the group that it makes
        return transfer._patience.seconds

    assert run_on_devices(2, monkeypatch, patience) == [TIMEOUT.total_seconds()] * 2
    assert run_on_devices(1, monkeypatch, patience) == [None]
