from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from embedtrain.data.corpus import PreparedCorpus
from embedtrain.data.negatives import NUM_COMMON_WORDS, alias_table, num_parts_of, part_vocabulary
from embedtrain.data.prepare import CorpusOptions, prepare_corpus
from embedtrain.data.skipgram import (
    SamplingOptions,
    TextBatch,
    TextBatches,
    keep_probabilities,
)
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.ops.sample_text import SamplingTables
from embedtrain.sharding.layout import SpreadLayout


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedCorpus:
    generator = np.random.default_rng(0)
    vocabulary = [first + second for first in "abcdefg" for second in "hijklmn"]
    lines = [
        " ".join(vocabulary[int(i)] for i in 48 * generator.random(generator.integers(1, 12)) ** 2) for _ in range(200)
    ]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return prepare_corpus(
        CorpusOptions(path=str(tmp_path / "text.txt"), min_count=1), str(tmp_path / "cache"), ONE_PROCESS
    )


def batches(
    corpus: PreparedCorpus, rank: int = 0, world_size: int = 1, device: torch.device | None = None, **options
) -> TextBatches:
    return TextBatches(
        corpus,
        SamplingOptions(**options),
        block_words=64,
        blocks_per_step=4,
        seed=3,
        rank=rank,
        world_size=world_size,
        device=device,
    )


def as_lists(batch: TextBatch) -> list:
    return [getattr(batch.sample, name).tolist() for name in ("words", "targets", "starts", "stops")]


def test_a_batch_is_a_function_of_epoch_and_step(corpus: PreparedCorpus) -> None:
    first, second = batches(corpus), batches(corpus)
    for epoch, step in ((1, 2), (0, 0), (1, 2)):
        assert as_lists(first.batch(epoch, step)) == as_lists(second.batch(epoch, step))
    assert as_lists(first.batch(0, 0)) != as_lists(first.batch(1, 0))


def test_a_sample_for_a_device_is_the_hosts_with_its_windows_in_host_memory(
    corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(corpus, sample=0.02, negative_parts=2).batch(0, 1)
    # The way of a GPU, whose tensors stay on the CPU here.
    monkeypatch.setattr("embedtrain.data.skipgram.to_device", lambda values, device: values)
    monkeypatch.setattr(SamplingTables, "to", lambda tables, device: tables)
    found = batches(corpus, device=torch.device("cuda"), sample=0.02, negative_parts=2).batch(0, 1)
    assert as_lists(found) == as_lists(expected)
    assert found.on_host is not None and found.on_host is found.windows and expected.on_host is None
    for name in ("words", "starts", "stops"):
        assert torch.equal(getattr(found.windows, name), getattr(expected.sample, name))
    for ours, theirs in zip(found.split(3), expected.split(3), strict=True):
        assert as_lists(ours) == as_lists(theirs)
        assert torch.equal(ours.windows.starts, theirs.sample.starts)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_a_steps_words_do_not_depend_on_the_number_of_ranks(corpus: PreparedCorpus, world_size: int) -> None:
    whole = batches(corpus)
    parts = [batches(corpus, rank, world_size) for rank in range(world_size)]
    assert {part.steps_per_epoch for part in parts} == {whole.steps_per_epoch}
    for step in range(whole.steps_per_epoch):
        expected = whole.batch(0, step)
        found = [part.batch(0, step) for part in parts]
        assert torch.cat([batch.sample.words for batch in found]).tolist() == expected.sample.words.tolist()
        assert torch.cat([batch.sample.targets for batch in found]).tolist() == expected.sample.targets.tolist()
        widths = torch.cat([batch.sample.stops - batch.sample.starts for batch in found])
        assert widths.tolist() == (expected.sample.stops - expected.sample.starts).tolist()


def test_an_epoch_covers_every_word_once(corpus: PreparedCorpus) -> None:
    all_batches = batches(corpus, sample=0.0)
    seen = [all_batches.batch(0, step) for step in range(all_batches.steps_per_epoch)]
    assert sum(batch.num_examples for batch in seen) == corpus.num_tokens == all_batches.examples_per_epoch
    counts = torch.cat([batch.sample.words for batch in seen]).bincount()
    assert counts.tolist() == corpus.vocabulary.counts.tolist()


def test_windows_hold_their_centre_and_stay_in_their_sentence(corpus: PreparedCorpus) -> None:
    all_batches = batches(corpus, sample=0.0, window=4)
    batch = all_batches.batch(0, 0)
    positions = torch.arange(batch.sample.words.numel())
    assert ((batch.sample.starts <= positions) & (positions < batch.sample.stops)).all()
    assert ((positions - batch.sample.starts <= 4) & (batch.sample.stops - positions - 1 <= 4)).all()


def test_keep_probabilities_are_word2vecs() -> None:
    counts = np.array([50_000, 1_000, 10])
    expected = [min(1.0, ((c / 51_010 / 1e-3) ** 0.5 + 1) * 1e-3 / (c / 51_010)) for c in counts]
    np.testing.assert_allclose(keep_probabilities(counts, 1e-3), expected, rtol=1e-6)
    assert keep_probabilities(counts, 0.0).tolist() == [1.0, 1.0, 1.0]


def test_subsampling_keeps_words_at_their_probability(corpus: PreparedCorpus) -> None:
    all_batches = batches(corpus, sample=0.01)
    kept = torch.cat(
        [all_batches.batch(e, s).sample.words for e in range(20) for s in range(all_batches.steps_per_epoch)]
    ).bincount(minlength=len(corpus.vocabulary))
    counts = corpus.vocabulary.counts * 20
    share = keep_probabilities(corpus.vocabulary.counts, 0.01)
    error = np.sqrt(counts * share * (1 - share) + 1)
    assert (np.abs(kept.numpy() - counts * share) < 5 * error).all()


@pytest.mark.parametrize("power", [0.75, 0.0, 1.0])
def test_the_alias_table_is_the_distribution(power: float) -> None:
    weights = np.array([1000, 300, 300, 20, 5, 1.0]) ** power
    own, other = alias_table(weights)
    mass = own.copy()
    np.add.at(mass, other, 1 - own)
    np.testing.assert_allclose(mass / 6, weights / weights.sum(), rtol=1e-12)


def test_negatives_follow_the_power_of_the_counts(corpus: PreparedCorpus) -> None:
    all_batches = batches(corpus, sample=0.0, negatives=30)
    samples = [all_batches.batch(0, step).sample for step in range(all_batches.steps_per_epoch)]
    drawn = torch.cat([sample.targets[:, 1:] for sample in samples]).flatten()
    found = drawn.bincount(minlength=len(corpus.vocabulary)).numpy()
    share = corpus.vocabulary.counts**0.75
    expected = share / share.sum() * drawn.numel()
    assert (np.abs(found - expected) < 5 * np.sqrt(expected) + 1).all()


def test_widths_are_uniform(corpus: PreparedCorpus) -> None:
    all_batches = batches(corpus, sample=0.0, window=4)
    samples = [all_batches.batch(e, s).sample for e in range(4) for s in range(all_batches.steps_per_epoch)]
    left = torch.cat([torch.arange(sample.words.numel()) - sample.starts for sample in samples])
    right = torch.cat([sample.stops - torch.arange(sample.words.numel()) - 1 for sample in samples])
    widest = torch.maximum(left, right)
    # Sentence borders only narrow windows, so a width of 4 is seen at most a quarter of the time.
    assert set(widest.tolist()) == {0, 1, 2, 3, 4}
    assert 0.15 < (widest == 4).float().mean() <= 0.26


NUM_PARTS = 4


@pytest.fixture
def large_corpus(tmp_path: Path) -> PreparedCorpus:
    """A text of a vocabulary large enough to be parted: 10,000 words by Zipf's law, each there."""
    generator = np.random.default_rng(1)
    ids = np.concatenate([np.arange(10_000), (10_000 * generator.random(60_000) ** 4).astype(int)])
    words = [f"w{number}" for number in generator.permutation(ids)]
    lines = [" ".join(words[at : at + 20]) for at in range(0, len(words), 20)]
    (tmp_path / "large.txt").write_text("\n".join(lines))
    options = CorpusOptions(path=str(tmp_path / "large.txt"), min_count=1, tokenizer="whitespace")
    return prepare_corpus(options, str(tmp_path / "cache"), ONE_PROCESS)


def parted(corpus: PreparedCorpus, rank: int = 0, world_size: int = 1) -> TextBatches:
    return TextBatches(
        corpus,
        SamplingOptions(sample=0.0, negatives=10, negative_parts=NUM_PARTS),
        block_words=64,
        blocks_per_step=16,
        seed=3,
        rank=rank,
        world_size=world_size,
    )


def test_parts_share_the_frequent_words_and_have_others_that_a_rank_owns(large_corpus: PreparedCorpus) -> None:
    weights = large_corpus.vocabulary.counts**0.75
    parts = part_vocabulary(weights, NUM_PARTS)
    layout = SpreadLayout(10_000, NUM_PARTS)
    drawn = np.zeros(10_000)
    others = []
    for rank, part in enumerate(parts):
        assert set(range(NUM_COMMON_WORDS)) <= set(part.rows.tolist())
        own = part.rows[part.rows >= NUM_COMMON_WORDS]
        others += own.tolist()
        owner, _ = layout.owner_of(layout.slot_of(torch.from_numpy(own)))
        assert (owner == rank).double().mean() > 0.9
        drawn[part.rows] += part.weights / part.weights.sum() / NUM_PARTS
    assert sorted(others) == list(range(NUM_COMMON_WORDS, 10_000))
    np.testing.assert_allclose(drawn, weights / weights.sum(), rtol=0.01)


def test_the_parts_of_a_steps_blocks_do_not_depend_on_the_number_of_ranks(large_corpus: PreparedCorpus) -> None:
    assert large_corpus.num_tokens % 64 > 0  # the last block is short, and blocks that follow it in a step are not
    whole = parted(large_corpus)
    ranks = [parted(large_corpus, rank, 3) for rank in range(3)]
    for step in range(whole.steps_per_epoch):
        found = torch.cat([rank.batch(0, step).sample.targets for rank in ranks])
        assert found.equal(whole.batch(0, step).sample.targets)


def test_a_small_vocabulary_is_parted_less_or_not_at_all() -> None:
    sizes = [NUM_COMMON_WORDS + count for count in (-500, 3999, 4000, 8200, 18000)]
    assert [num_parts_of(size, 8) for size in sizes] == [1, 1, 2, 4, 8]
    assert len(part_vocabulary(np.ones(10_000), 8)) == 4
    (whole,) = part_vocabulary(np.ones(3), 8)
    assert whole.rows.tolist() == [0, 1, 2]


def test_ranks_draw_their_negatives_from_rows_of_their_own(large_corpus: PreparedCorpus) -> None:
    layout = SpreadLayout(10_000, 2)
    for rank in range(2):
        for step in range(3):
            drawn = parted(large_corpus, rank, 2).batch(0, step).sample.targets[:, 1:].flatten()
            owner, _ = layout.owner_of(layout.slot_of(drawn[drawn >= NUM_COMMON_WORDS]))
            assert (owner == rank).double().mean() > 0.9


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_what_is_drawn_from_parts_does_not_depend_on_the_ranks(large_corpus: PreparedCorpus, world_size: int) -> None:
    whole = parted(large_corpus)
    ranks = [parted(large_corpus, rank, world_size) for rank in range(world_size)]
    for step in (0, 1, whole.steps_per_epoch - 1):
        found = torch.cat([batches.batch(2, step).sample.targets for batches in ranks])
        assert torch.equal(found, whole.batch(2, step).sample.targets)


def test_negatives_from_parts_follow_the_power_of_the_counts(large_corpus: PreparedCorpus) -> None:
    """Over epochs every word meets every other as often as if it drew from the whole vocabulary."""
    batches = parted(large_corpus)
    found = np.zeros(10_000)
    of_hottest = np.zeros(10_000)  # what the most frequent word meets
    for epoch in range(6):
        for step in range(batches.steps_per_epoch):
            sample = batches.batch(epoch, step).sample
            found += sample.targets[:, 1:].flatten().bincount(minlength=10_000).numpy()
            of_hottest += sample.targets[sample.words == 0, 1:].flatten().bincount(minlength=10_000).numpy()
    share = large_corpus.vocabulary.counts**0.75
    share = share / share.sum()
    for counts in (found, of_hottest):
        expected = share * counts.sum()
        hot = expected > 100
        # Words of one part are drawn together, by blocks: their counts vary more than independent draws would.
        np.testing.assert_allclose(counts[hot], expected[hot], rtol=0.35)
        cold = ~hot
        np.testing.assert_allclose(counts[cold].sum(), expected[cold].sum(), rtol=0.02)


def test_a_step_of_few_blocks_leaves_no_part_out(large_corpus: PreparedCorpus) -> None:
    batches = TextBatches(
        large_corpus, SamplingOptions(negative_parts=NUM_PARTS), block_words=64, blocks_per_step=1, seed=3
    )
    layout = SpreadLayout(10_000, NUM_PARTS)
    met = set()
    for step in range(40):
        drawn = batches.batch(0, step).sample.targets[:, 1:].flatten()
        owner, _ = layout.owner_of(layout.slot_of(drawn[drawn >= NUM_COMMON_WORDS]))
        met.add(int(owner.mode().values))
    assert met == set(range(NUM_PARTS))
