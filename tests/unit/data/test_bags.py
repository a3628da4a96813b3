"""Rows of several columns, each once and in order."""

from __future__ import annotations

import numpy as np

from embedtrain.data.bags import Bags, distinct, without


def test_rows_come_once_and_ascending() -> None:
    generator = np.random.default_rng(0)
    columns = [generator.integers(-1, 4, 200) for _ in range(3)]
    expected = np.unique(np.stack(columns, axis=1), axis=0)
    assert np.array_equal(np.stack(distinct(*columns), axis=1), expected)
    assert [len(column) for column in distinct(*(column[:0] for column in columns))] == [0, 0, 0]


def test_a_value_that_cannot_be_found_takes_nothing_from_the_row_before() -> None:
    bags = Bags.from_rows(np.array([0, 0, 1]), np.array([2, 5, 5]), 2)
    others = Bags.from_rows(np.array([1, 1]), np.array([-1, 5]), 2)
    left = without(bags, others)
    assert (left.rows().tolist(), left.values.tolist()) == ([0, 0], [2, 5])
