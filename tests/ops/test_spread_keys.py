"""Keys of rows: one body for every implementation."""

from __future__ import annotations

import pytest
import torch

from embedtrain.ops._backend.row_memory import allocate_rows, empty_buffer
from embedtrain.ops.spread_keys import SpreadTable, spread_keys
from embedtrain.sharding.layout import SpreadLayout


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [1, 2, 10, 131_071, 131_072, 999_983, (1 << 31) - 1, 1 << 31, 1 << 36])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_keys_are_owner_and_local_row(backend: str, num_rows: int, world_size: int, dtype: torch.dtype) -> None:
    layout = SpreadLayout(num_rows, world_size)
    largest = min(num_rows, 1 << 31 if dtype == torch.int32 else num_rows) - 1
    drawn = torch.randint(0, largest + 1, (500,), generator=torch.Generator().manual_seed(num_rows % 97))
    ids = torch.cat([drawn, torch.tensor([0, largest])]).to(dtype)
    table = SpreadTable(num_rows, layout.multiplier, layout.rows_per_rank, 11, layout.block_rows)
    num_local_rows = layout.rows_per_rank + 20
    keys, outside = spread_keys([ids, ids[:3]], [table, table], num_local_rows)
    owner, row = layout.owner_of(layout.slot_of(ids.long()))
    assert torch.equal(keys[:502], owner * num_local_rows + row + 11)
    assert torch.equal(keys[502:], keys[:3])
    assert outside == [0, 0]


def test_ids_that_are_no_rows_are_counted(backend: str) -> None:
    table = SpreadTable(10, 7, 10, 0, 1)
    keys, outside = spread_keys([torch.tensor([3, 9]), torch.tensor([10, -1, 0, 2**62])], [table, table], 10)
    assert outside == [0, 3]
    assert keys[:2].tolist() == [1, 3]
    assert int(keys.min()) >= 0 and int(keys.max()) < 10
    assert spread_keys([torch.zeros(0, dtype=torch.int64)], [table], 10)[0].numel() == 0


def test_many_ids_of_few_rows_have_the_keys_of_each_alone(backend: str) -> None:
    table = SpreadTable(10, 7, 5, 3, 1)
    ids = torch.arange(-2, 12).repeat(9)
    keys, outside = spread_keys([ids], [table], 8)
    assert outside == [4 * 9]
    alone = torch.cat([spread_keys([torch.tensor([each])], [table], 8)[0] for each in range(10)])
    assert torch.equal(keys.view(9, 14)[:, 2:12], alone.expand(9, 10))
    assert int(keys.min()) >= 0 and int(keys.max()) < 16


def test_memory_for_rows_is_filled(backend: str) -> None:
    device = torch.device("cpu")
    assert torch.equal(allocate_rows((3000, 5), 0.5, torch.float32, device), torch.full((3000, 5), 0.5))
    assert allocate_rows((0, 5), 0.0, torch.bfloat16, device).shape == (0, 5)


def test_buffers_serve_again_when_nothing_refers_to_them() -> None:
    first = empty_buffer(1000, 300).fill_(1.0)
    other = empty_buffer(1000, 300).fill_(2.0)
    view, place = first[10:20], first.data_ptr()
    del first
    third = empty_buffer(1000, 300)
    assert third.data_ptr() not in (place, other.data_ptr())  # the view still lives there
    assert (view == 1).all() and (other == 2).all()
    del view
    assert empty_buffer(1000, 300).data_ptr() == place
    assert empty_buffer(0, 3).shape == (0, 3)
