"""Every implementation against plain Python integers, bit for bit."""

from __future__ import annotations

import pytest
import torch

from embedtrain.ops.sample_text import SamplingTables, sample_text

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(key: int, counter: int) -> int:
    value = (key + (counter + 1) * GOLDEN) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def plain(
    tokens: list[int], positions: list[int], parts: list[int], tables: SamplingTables, window: int, k: int, key: int
) -> list:
    keep, part_starts = tables.keep.tolist(), tables.part_starts.tolist()
    own = [column >> 32 & 0xFFFFFFFF for column, _ in tables.columns.tolist()]
    other = [column & 0xFFFFFFFF for column, _ in tables.columns.tolist()]
    rows = tables.columns[:, 1].tolist()
    kept = []  # word, sentence, width, negatives
    sentence = 0
    for token, position, part in zip(tokens, positions, parts, strict=True):
        start, stop = part_starts[part : part + 2]
        sentence += token < 0
        row = ~token if token < 0 else token
        draw = splitmix64(key, position * (1 + k))
        if (draw >> 40) >= keep[row]:
            continue
        negatives = []
        for i in range(k):
            drawn = splitmix64(key, position * (1 + k) + 1 + i)
            column = start + (((drawn >> 32) * (stop - start)) >> 32)
            negative = rows[column] if (drawn & 0xFFFFFFFF) < own[column] else other[column]
            negatives.append(negative)
        kept.append((row, sentence, 1 + (((draw & 0xFFFFFFFF) * window) >> 32), negatives))
    starts, stops = [], []
    for i, (_, sentence, width, _) in enumerate(kept):
        inside = [j for j, other_word in enumerate(kept) if other_word[1] == sentence and abs(j - i) <= width]
        starts.append(inside[0])
        stops.append(inside[-1] + 1)
    return [[word[0] for word in kept], [[word[0], *word[3]] for word in kept], starts, stops]


def make(num_tokens: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, SamplingTables]:
    generator = torch.Generator().manual_seed(num_tokens + num_rows)
    tokens = torch.randint(0, num_rows, (num_tokens,), generator=generator, dtype=torch.int32)
    tokens = torch.where(torch.rand(num_tokens, generator=generator) < 0.15, ~tokens, tokens)
    positions = torch.arange(num_tokens) + 10**10
    own = torch.randint(-(1 << 31), 1 << 31, (num_rows,), generator=generator)  # any 32 bits
    other = torch.randint(0, num_rows, (num_rows,), generator=generator)
    columns = torch.stack([own << 32 | other, torch.randperm(num_rows, generator=generator)], dim=1)
    keep = torch.randint(0, (1 << 24) + 1, (num_rows,), generator=generator).int()
    return tokens, positions, SamplingTables(keep, columns, torch.tensor([0, num_rows // 3, num_rows]))


@pytest.mark.parametrize("key", [0, -(1 << 63), 123456789])
@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "window", "k"),
    [(200, 17, 5, 5), (60, 3, 2, 3), (50, 40, 1, 0), (0, 3, 5, 5), (1100, 9, 3, 2)],
)
def test_equals_plain_integers(backend: str, num_tokens: int, num_rows: int, window: int, k: int, key: int) -> None:
    tokens, positions, tables = make(num_tokens, num_rows)
    parts = (torch.arange(num_tokens) // 7 % 2).int()
    sample = sample_text(tokens, positions, tables, window=window, num_negatives=k, key=key, parts=parts)
    expected = plain(tokens.tolist(), positions.tolist(), parts.tolist(), tables, window, k, key)
    found = [sample.words, sample.targets, sample.starts, sample.stops]
    assert [tensor.tolist() for tensor in found] == expected
    assert sample.targets.shape == (sample.words.numel(), 1 + k)


def test_without_parts_the_first_is_meant(backend: str) -> None:
    tokens, positions, tables = make(100, 20)
    first = sample_text(tokens, positions, tables, window=5, num_negatives=5, key=1)
    again = sample_text(tokens, positions, tables, window=5, num_negatives=5, key=1, parts=torch.zeros_like(tokens))
    assert torch.equal(first.targets, again.targets)
    other = sample_text(tokens, positions, tables, window=5, num_negatives=5, key=1, parts=torch.ones_like(tokens))
    assert not torch.equal(first.targets, other.targets)


@pytest.mark.parametrize("bad", [-1, 2])
def test_a_part_that_does_not_exist_is_refused(backend: str, bad: int) -> None:
    tokens, positions, tables = make(20, 5)
    parts = torch.zeros_like(tokens)
    parts[7] = bad
    with pytest.raises(ValueError, match=r"parts must lie in \[0, 2\)"):
        sample_text(tokens, positions, tables, window=5, num_negatives=5, key=1, parts=parts)
    with pytest.raises(ValueError, match="expected parts int32"):
        sample_text(tokens, positions, tables, window=5, num_negatives=5, key=1, parts=parts.long())


def test_a_token_outside_the_vocabulary_is_refused(backend: str) -> None:
    tokens, positions, tables = make(20, 5)
    for bad in (5, ~5):
        tokens[3] = bad
        with pytest.raises(ValueError, match="rows below 5"):
            sample_text(tokens, positions, tables, window=5, num_negatives=5, key=1)


def test_shapes_that_disagree_are_refused(backend: str) -> None:
    tokens, positions, tables = make(20, 5)
    with pytest.raises(ValueError, match="of one shape"):
        sample_text(tokens, positions[:-1], tables, window=5, num_negatives=5, key=1)
