"""The busiest rows of each table against a plain choice, in every implementation."""

from __future__ import annotations

import pytest
import torch

from embedtrain.ops.busiest_rows import NUM_BUCKETS, busiest_rows, count_buckets

NUM_TABLES = 3


def draw(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, counts and tables; the last table has no row."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 5000, (n,), generator=generator).float() ** 2 / 5000
    return torch.randperm(n, generator=generator), counts, torch.randint(0, NUM_TABLES - 1, (n,), generator=generator)


@pytest.mark.parametrize(("n", "number"), [(0, 3), (1, 3), (700, 1), (700, 40), (700, 1000)])
def test_rows_of_the_upper_buckets_are_chosen(backend: str, n: int, number: int) -> None:
    rows, counts, tables = draw(n, seed=n)
    histogram = count_buckets(counts, tables, NUM_TABLES)
    assert histogram.sum(dim=1).tolist() == [int((tables == table).sum()) for table in range(NUM_TABLES)]
    found = busiest_rows(rows, counts, tables, histogram, number)
    for table, (chosen, of_chosen) in enumerate(found):
        expected = {
            int(row): float(count) for row, count in zip(rows, counts, strict=True) if tables[rows == row] == table
        }
        assert dict(zip(chosen.tolist(), of_chosen.tolist(), strict=True)).items() <= expected.items()
        left_out = [count for row, count in expected.items() if row not in chosen.tolist()]
        if left_out:
            # The least is enough: without the lowest bucket there would be fewer than `number` rows.
            assert max(left_out) < min(of_chosen.tolist()) and len(chosen) >= number
            lowest = min(of_chosen.tolist())
            assert sum(count >= 1.25 * lowest for count in of_chosen.tolist()) < number
        else:
            assert len(chosen) == len(expected)


def test_the_choice_is_the_same_if_two_ranks_own_the_rows(backend: str) -> None:
    rows, counts, tables = draw(500, seed=5)
    whole = busiest_rows(rows, counts, tables, count_buckets(counts, tables, NUM_TABLES), 20)
    parts = [[tensor[own] for tensor in (rows, counts, tables)] for own in (slice(0, 180), slice(180, 500))]
    both = sum(count_buckets(*part[1:], NUM_TABLES) for part in parts)
    assert isinstance(both, torch.Tensor)
    shares = [busiest_rows(*part, both, 20) for part in parts]
    for table, (chosen, of_chosen) in enumerate(whole):
        assert torch.equal(torch.cat([share[table][0] for share in shares]), chosen)
        assert torch.equal(torch.cat([share[table][1] for share in shares]), of_chosen)


def test_counts_beyond_the_buckets_are_in_the_first_and_the_last(backend: str) -> None:
    counts = torch.tensor([0.0, 0.3, 1.0, 2.0**40, float("inf")])
    (histogram,) = count_buckets(counts, torch.zeros(5, dtype=torch.int64), 1)
    assert histogram.nonzero().flatten().tolist() == [0, NUM_BUCKETS - 1]
    assert histogram[[0, -1]].tolist() == [3, 2]


def test_what_does_not_fit_is_refused(backend: str) -> None:
    counts, tables, histogram = torch.ones(2), torch.tensor([0, 1]), torch.zeros(2, NUM_BUCKETS, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected counts \[n\] float32, got torch.float64"):
        count_buckets(counts.double(), tables, 2)
    with pytest.raises(ValueError, match=r"expected tables \[2\] int64, got torch.int64 \(1,\)"):
        count_buckets(counts, tables[:1], 2)
    with pytest.raises(ValueError, match=r"expected rows \[2\] int64, got torch.float32"):
        busiest_rows(counts, counts, tables, histogram, 1)
    with pytest.raises(ValueError, match=rf"expected histogram \[num_tables, {NUM_BUCKETS}\] int64, got torch.int64"):
        busiest_rows(tables, counts, tables, histogram[:, :5], 1)
    for wrong in (torch.tensor([0, 2]), torch.tensor([-1, 0])):
        with pytest.raises(IndexError, match=r"tables must lie in \[0, 2\)"):
            count_buckets(counts, wrong, 2)
        with pytest.raises(IndexError, match=r"tables must lie in \[0, 2\)"):
            busiest_rows(tables, counts, wrong, histogram, 1)
