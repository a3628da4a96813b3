"""Rows between host memory and a pretended GPU: in chunks, in order, and beside the stream that computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

import embedtrain as et
from embedtrain.checkpoint.parts import StagedParts
from embedtrain.distributed.ranks import Ranks
from embedtrain.embedding import copy_stream, row_changes
from embedtrain.embedding.copy_stream import CopyStream
from embedtrain.embedding.placement import Auto, place_rows
from embedtrain.embedding.row_changes import MemoryBudget

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu uses it", allow_module_level=True)

from tests.fake_cuda.device import CUDA, FakeDevice
from tests.fake_cuda.ranks import run_on_devices

T = TypeVar("T")


def on_device(monkeypatch: pytest.MonkeyPatch, function: Callable[[FakeDevice], T]) -> T:
    def run(device: FakeDevice, ranks: Ranks) -> T:
        result = function(device)
        assert not device.hazards
        return result

    return run_on_devices(1, monkeypatch, run)[0]


@pytest.mark.parametrize("dim", [None, 6])
def test_a_table_goes_to_the_device_through_two_small_buffers(dim: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_stream, "_STAGING_BYTES", 400)
    table = torch.randn(500) if dim is None else torch.randn(500, dim)
    rows = torch.arange(0, 500, 2)

    def fill(device: FakeDevice) -> torch.Tensor:
        copied = CopyStream(CUDA).gather_chunks(table, rows)
        assert copied.is_cuda
        sizes = [pinned.storage.nbytes() for pinned in device.pinned.values()]
        assert len(sizes) <= 2 and max(sizes, default=0) <= 400
        assert device.launches.count("copy to device") > 1
        return copied.cpu()

    assert torch.equal(on_device(monkeypatch, fill), table[rows])


def test_the_host_does_not_wait_for_rows_that_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(device: FakeDevice) -> None:
        stream = CopyStream(CUDA)
        sent = stream.gather(torch.randn(50, 4), torch.arange(10))
        back = stream.to_host(sent * 2)
        assert not device.waits
        back.values()
        assert len(device.waits) == 1

    on_device(monkeypatch, send)


def _collection(device: torch.device, **options: object) -> et.EmbeddingCollection:
    tables = et.EmbeddingCollection([et.TableSpec("item", 40, 4)], device=device, **options)
    et.optim.RowwiseAdagrad(tables, lr=0.1)
    return tables


def test_a_save_reads_rows_as_they_were_beside_the_stream_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_changes, "_BLOCK_BYTES", 160)

    def save(device: FakeDevice) -> None:
        tables = _collection(CUDA)
        (group,) = tables.table_groups
        before = group.weight.cpu()
        staged = StagedParts(tables.shard_views(), is_delta=False, budget=MemoryBudget(None))
        (part,) = (part for part in staged.parts if part.name.endswith("weight"))
        rows = []
        for number, block in enumerate(part.blocks()):
            rows.append(block.clone())
            if number == 1:  # the save is under way
                changed = torch.arange(5, 40, device=CUDA)
                group.changes.before_update(changed)
                group.weight.index_fill_(0, changed, 0.0)
        assert len(rows) > 3
        assert torch.equal(torch.cat(rows), before)
        streams = {stream for stream, _ in device.copies_to_host}
        assert streams == {"main", "stream 1"}, "on the main stream, what the test itself looked at"
        assert all(is_async for stream, is_async in device.copies_to_host if stream != "main")
        staged.release()

    on_device(monkeypatch, save)


def test_tables_in_host_memory_are_not_pinned_and_keep_their_cache_through_a_save(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(device: FakeDevice) -> None:
        tables = _collection(CUDA, placement="host", cache_bytes=10**6)
        (group,) = tables.table_groups
        assert not group.weight.is_cuda and not device.is_pinned(group.weight)
        optimizer = et.optim.SGD(tables, lr=0.1)
        batch = {"item": et.Jagged.from_ids(torch.arange(10))}
        tables(batch)["item"].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        cache = group.access._cache
        assert cache is not None
        tables.shard_views()
        assert group.access._cache is cache
        tables.write_back()
        assert group.access._cache is None

    run_on_devices(1, monkeypatch, lambda device, ranks: train(device), runs_kernels=False)


def test_auto_leaves_room_for_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    groups = [[et.TableSpec("item", 10, 10)]]  # 400 bytes
    assert not place_rows("auto", None, groups, 1, CUDA).is_host
    assert not place_rows(Auto(200), None, groups, 1, CUDA).is_host
    assert place_rows(Auto(201), None, groups, 1, CUDA).is_host
