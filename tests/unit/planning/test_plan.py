"""The arithmetic of plans, against sums by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from embedtrain.planning.plan import (
    Bandwidths,
    checkpoint_bytes,
    exchange_of,
    least_seconds,
    memory_of,
    remedies,
    traffic_bytes,
)
from embedtrain.recipes.workload import IdDistribution, TableLoad, Workload
from embedtrain.sharding.cost import Wire, bytes_of_rows, bytes_of_sums

UNIFORM = IdDistribution.zipf(1000, 0.0)


def table(**changes: object) -> TableLoad:
    load = TableLoad("item", 1000, 10, 4, state_row_bytes=4, state_value_bytes=0, draws=((600.0, UNIFORM),))
    return replace(load, **changes)  # type: ignore[arg-type]


def test_memory_is_that_of_the_fullest_rank() -> None:
    memory = memory_of(Workload((table(),), dense_bytes=77, save_bytes=None), 3)
    assert (memory.weights, memory.state, memory.dense) == (334 * 40, 334 * 4, 77)
    assert memory.save == memory.weights + memory.state
    assert memory.total == sum((memory.weights, memory.state, memory.dense, memory.buffers, memory.save))
    by_element = memory_of(Workload((table(state_row_bytes=0, state_value_bytes=8),)), 3)
    assert by_element.state == 334 * 80
    assert by_element.save == 0


def test_a_checkpoint_holds_each_row_once_and_the_dense_part() -> None:
    assert checkpoint_bytes(Workload((table(), table(num_rows=7)), dense_bytes=50)) == 1007 * 44 + 50


@pytest.mark.parametrize("exponent", [0.0, 0.75, 1.0, 1.2])
def test_distinct_rows_of_zipf_ids_are_those_of_the_sum_over_all_rows(exponent: float) -> None:
    num_rows, draws = 50_000, 20_000.0
    law = IdDistribution.zipf(num_rows, exponent)
    assert float(np.dot(law.shares, law.num_rows)) == pytest.approx(1.0)
    shares = np.arange(1, num_rows + 1, dtype=np.float64) ** -exponent
    expected = -np.expm1(-draws * shares / shares.sum()).sum()
    assert table(num_rows=num_rows, draws=((draws, law),)).num_distinct == pytest.approx(expected, rel=2e-3)


def test_a_law_of_ten_billion_rows_is_a_few_blocks() -> None:
    law = IdDistribution.zipf(10**10, 1.05)
    assert law.num_rows.size < 5000
    assert law.num_rows.sum() == pytest.approx(1e10)
    assert IdDistribution.zipf(7, 1.0).num_rows.tolist() == [1.0] * 7


def test_draws_that_are_kept_by_chance_follow_their_own_law() -> None:
    law, kept = IdDistribution.zipf(4, 0.0).thinned(lambda shares: np.array([1.0, 0.5, 0.5, 0.0]))
    assert kept == pytest.approx(0.5)
    assert law.shares.tolist() == [0.5, 0.25, 0.25, 0.0]


def test_each_rank_sends_what_lies_elsewhere() -> None:
    exchange = exchange_of(Workload((table(),)), 3)
    distinct = 1000 * -math.expm1(-200 / 1000)
    assert exchange.ids == round(distinct * 2 / 3 * 4)
    assert exchange.vectors == exchange.gradients == round(distinct * 2 / 3 * 40)
    narrow = exchange_of(Workload((table(wire_bytes=2),)), 3)
    assert narrow.vectors == narrow.gradients == round(distinct * 2 / 3 * 20)
    stored_narrow = exchange_of(Workload((table(value_bytes=2),)), 3)
    assert stored_narrow.gradients == 2 * stored_narrow.vectors
    assert exchange_of(Workload((table(),), reduced_bytes=9), 1).total == 0
    with_dense = exchange_of(Workload((table(),), reduced_bytes=9), 3)
    assert with_dense.dense == 12
    assert with_dense.total == exchange.total + 12


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_what_a_rank_draws_from_its_own_rows_does_not_travel(world_size: int) -> None:
    parts = 4
    load = table(draws=((400.0, UNIFORM),), home_draws=((600.0, UNIFORM),), home_parts=parts)
    assert load.num_ids == 1000
    assert load.num_distinct == pytest.approx(1000 * -math.expm1(-1.0))
    # Counted out: a rank draws its share of the 600 from one of so many parts of the 1,000 rows.
    used = min(world_size, parts)
    in_part = 1000 / used * -math.expm1(-(400 / world_size + 600 / world_size * used) / 1000)
    elsewhere = (1000 - 1000 / used) * -math.expm1(-400 / world_size / 1000)
    away = elsewhere + in_part * (1 - used / world_size)
    assert load.distinct_of_rank(world_size) == pytest.approx((in_part + elsewhere, away))
    assert exchange_of(Workload((load,)), world_size).vectors == round(away * 40)


def test_long_bags_travel_as_sums() -> None:
    bags = table(num_rows=10**6, draws=((4000.0, IdDistribution.zipf(10**6, 0.0)),), num_bags=40.0)
    exchange = exchange_of(Workload((bags,)), 2)
    assert exchange.at_owner == ("item",)
    # 20 bags a rank, each with rows on both; half of all stays here.
    assert exchange.ids == 2000 * 4 // 2
    assert exchange.vectors == exchange.gradients == 20 * 40
    short = replace(bags, num_bags=4000.0)
    assert exchange_of(Workload((short,)), 2).at_owner == ()


def test_bytes_of_rows_and_of_sums() -> None:
    wire = Wire(id_bytes=4, vector_bytes=2, gradient_bytes=4)
    assert bytes_of_rows(3, 8, wire) == 3 * (4 + 16 + 32)
    assert bytes_of_sums(10, 3, 8, wire) == 40 + 3 * 64
    assert bytes_of_sums(10, 3, 8, wire, is_weighted=True) == 80 + 3 * 64
    assert bytes_of_rows(3, 8, replace(wire, has_gradients=False)) == 3 * (4 + 16)


def test_a_step_takes_at_least_its_bytes_over_the_bandwidths() -> None:
    workload = Workload((table(), table(name="narrow", dim=2, state_value_bytes=8)), reduced_bytes=60)
    owned = 1000 * -math.expm1(-0.6) / 2
    # Each row is read and written once: 40 + 4 bytes of one table, 8 + 4 + 16 of the other.
    assert traffic_bytes(workload, 2) == round(owned * 2 * (44 + 28))
    both = least_seconds(workload, 2, Bandwidths(memory=8.0, exchange=4.0))
    assert both == {"rows": traffic_bytes(workload, 2) / 8, "exchange": exchange_of(workload, 2).total / 4}
    assert set(least_seconds(workload, 2, Bandwidths(exchange=4.0))) == {"exchange"}
    assert least_seconds(workload, 1, Bandwidths(exchange=4.0)) == {"exchange": 0.0}
    assert least_seconds(workload, 2, Bandwidths()) == {}


def test_a_batch_and_the_next_one_lie_in_memory() -> None:
    without, with_batch = (memory_of(Workload((table(),), batch_bytes=size), 3).buffers for size in (0, 900))
    assert with_batch - without == 2 * 300


def test_micro_batches_need_less_memory_and_send_rows_more_than_once() -> None:
    whole, parts = (Workload((table(),), accumulate_steps=count) for count in (1, 3))
    one_of_three = exchange_of(Workload((table(draws=((200.0, UNIFORM),)),)), 3)
    assert exchange_of(parts, 3).vectors == pytest.approx(3 * one_of_three.vectors, abs=3)
    assert exchange_of(parts, 3).vectors > exchange_of(whole, 3).vectors
    assert memory_of(parts, 3).buffers < memory_of(whole, 3).buffers
    assert traffic_bytes(parts, 3) == traffic_bytes(whole, 3), "rows are updated once per step"


def test_remedies_fit_and_the_next_smaller_change_does_not() -> None:
    workload = Workload((table(num_rows=10**6, dim=64, draws=((100.0, IdDistribution.zipf(10**6, 1.0)),)),))
    needed = memory_of(workload, 2).total
    limit = int(needed * 0.59)
    found = {remedy.change: remedy.total_bytes for remedy in remedies(workload, 2, limit)}
    assert set(found) == {"rows in bfloat16", "4 ranks", "dim 37"}
    assert all(size <= limit for size in found.values())
    assert memory_of(workload, 3).total > limit
    wider = replace(workload, tables=(replace(workload.tables[0], dim=38),))
    assert memory_of(wider, 2).total > limit
    assert remedies(workload, 2, 100) == []
