from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedtrain.sharding.layout import MAX_ROWS, SpreadLayout, overlap

num_rows_small = st.integers(1, 5000)
num_rows_any = st.integers(1, MAX_ROWS)


num_rows_in_blocks = st.integers(1 << 17, (1 << 17) + 5000)


@settings(deadline=None)
@given(num_rows_small | num_rows_in_blocks)
@example(1)
@example(2)
@example((1 << 17) - 1)
@example(1 << 17)
@example((1 << 17) + 15)
def test_slots_are_a_permutation_of_the_ids_and_id_of_inverts_it(num_rows: int) -> None:
    layout = SpreadLayout(num_rows)
    slots = layout.slot_of(torch.arange(num_rows))
    assert torch.equal(slots.sort().values, torch.arange(num_rows))
    assert torch.equal(layout.id_of(slots), torch.arange(num_rows))


@given(num_rows_any, st.data())
def test_the_arithmetic_is_exact_in_tables_of_any_size(num_rows: int, data: st.DataObject) -> None:
    layout = SpreadLayout(num_rows, 7)
    ids = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=20))
    slots = layout.slot_of(torch.tensor(ids))
    size = layout.block_rows
    num_blocks = num_rows // size
    moved = [i // size * layout.multiplier % num_blocks * size + i % size for i in ids]
    assert slots.tolist() == [j if i < num_blocks * size else i for i, j in zip(ids, moved, strict=True)]
    assert layout.id_of(slots).tolist() == ids
    owner, row = layout.owner_of(slots)
    for slot, rank, local in zip(slots.tolist(), owner.tolist(), row.tolist(), strict=True):
        start, stop = layout.shard_range(rank)
        assert start <= slot < stop
        assert local == slot - start


@settings(deadline=None)
@given(num_rows_small | num_rows_in_blocks, st.integers(1, 16))
def test_every_prefix_of_the_ids_lies_evenly_on_the_ranks(num_rows: int, world_size: int) -> None:
    """The bound that `sharding/layout.py` states, for every prefix and every rank."""
    layout = SpreadLayout(num_rows, world_size)
    owner, _ = layout.owner_of(layout.slot_of(torch.arange(num_rows)))
    prefix = torch.arange(1, num_rows + 1)
    size = layout.block_rows
    bound = size * ((1 if size == 1 else 3) + torch.log2(prefix / size + 1.0))
    for rank in range(world_size):
        start, stop = layout.shard_range(rank)
        held = (owner == rank).cumsum(0)
        assert ((held - prefix * (stop - start) / num_rows).abs() <= bound).all()
        # The cut gives the last ranks up to world_size - 1 slots fewer than an even share.
        assert ((held - prefix / world_size).abs() <= bound + world_size - 1).all()


@given(num_rows_any, st.integers(1, 1000))
def test_the_ranges_of_the_ranks_tile_the_slots(num_rows: int, world_size: int) -> None:
    layout = SpreadLayout(num_rows, world_size)
    ranges = [layout.shard_range(rank) for rank in range(world_size)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_rows
    assert all(first[1] == second[0] for first, second in itertools.pairwise(ranges))


def test_the_cut_is_torchs_even_chunk_split() -> None:
    sizes = [len(chunk) for chunk in torch.arange(10).chunk(4)]
    layout = SpreadLayout(10, 4)
    assert [stop - start for start, stop in map(layout.shard_range, range(4))] == sizes


def test_the_slots_do_not_depend_on_the_world_size() -> None:
    ids = torch.arange(1000)
    assert torch.equal(SpreadLayout(1000, 1).slot_of(ids), SpreadLayout(1000, 7).slot_of(ids))


def test_the_multiplier_is_near_the_golden_section() -> None:
    layout = SpreadLayout(1_000_000)
    num_blocks = 1_000_000 // layout.block_rows
    assert abs(layout.multiplier - 0.618034 * num_blocks) < 64
    assert math.gcd(layout.multiplier, num_blocks) == 1


def test_ids_of_a_block_lie_side_by_side_in_large_tables_alone() -> None:
    slots = SpreadLayout(1_000_000).slot_of(torch.arange(32))
    assert slots.reshape(2, 16).diff().eq(1).all()
    assert abs(int(slots[16] - slots[0])) > 100_000
    assert not SpreadLayout(100_000).slot_of(torch.arange(32)).diff().eq(1).any()


@pytest.mark.parametrize(("num_rows", "world_size"), [(0, 1), (MAX_ROWS + 1, 1), (5, 0)])
def test_impossible_layouts_are_refused(num_rows: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        SpreadLayout(num_rows, world_size)


@given(*[st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted)] * 2)
def test_overlap_is_what_both_intervals_hold(first: list[int], second: list[int]) -> None:
    shared = sorted(set(range(*first)) & set(range(*second)))
    expected = (shared[0], shared[-1] + 1) if shared else None
    assert overlap(tuple(first), tuple(second)) == expected
