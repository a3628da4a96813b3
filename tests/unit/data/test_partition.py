from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedtrain.data.partition import StepPlan, block_order, num_steps, random_generator, share_of_rank


@given(st.integers(0, 200), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_visits_every_block_once(num_blocks: int, seed: int, epoch: int) -> None:
    order = block_order(num_blocks, seed, epoch)
    assert sorted(order.tolist()) == list(range(num_blocks))
    assert order.tolist() == block_order(num_blocks, seed, epoch).tolist()


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [tuple(block_order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4


@given(st.integers(0, 100), st.integers(1, 12))
def test_shares_tile_the_items_evenly(num_items: int, world_size: int) -> None:
    shares = [share_of_rank(num_items, rank, world_size) for rank in range(world_size)]
    assert [item for share in shares for item in share] == list(range(num_items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_last_step_takes_what_is_left() -> None:
    assert [num_steps(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_draws_are_a_function_of_the_key() -> None:
    first, second = random_generator(1, "block", 2).random(4), random_generator(1, "block", 2).random(4)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, random_generator(1, "block", 3).random(4))
    # A separator keeps (1, 23) apart from (12, 3).
    assert not np.array_equal(random_generator(1, 23).random(4), random_generator(12, 3).random(4))


@given(
    st.integers(1, 300), st.integers(1, 40), st.sampled_from([None, 0.05, 0.1, 0.5, 1.0]), st.integers(1, 12), st.data()
)
def test_steps_tile_every_epoch_and_grow_with_the_blocks_so_far(
    num_blocks: int, most: int, growth: float | None, at_first: int, data: st.DataObject
) -> None:
    plan = StepPlan(num_blocks, most, growth=growth, blocks_at_first=at_first)
    for epoch in sorted({0, 1, data.draw(st.integers(0, 60))}):
        pieces = [plan.blocks(epoch, step) for step in range(plan.steps_of(epoch))]
        assert [block for piece in pieces for block in range(piece.start, piece.stop)] == list(range(num_blocks))
        for piece in pieces[:-1]:
            so_far = epoch * num_blocks + piece.start
            grown = most if growth is None else max(int(growth * so_far), at_first)
            assert piece.stop - piece.start == min(most, grown)


def test_steps_do_not_grow_past_the_first_ones_of_their_own_size() -> None:
    assert not StepPlan(100, 8, growth=0.1, blocks_at_first=8).is_growing
    assert StepPlan(100, 9, growth=0.1, blocks_at_first=8).is_growing
