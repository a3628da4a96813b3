"""Damped steps: against a plain computation in one process, on ranks, in micro-batches and from copies of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import embedtrain as et
from embedtrain.data.skipgram import TextBatch
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.jagged import Jagged
from embedtrain.ops.sample_text import TextSample
from embedtrain.ops.skipgram_block import TextBlock, count_of_rows, skipgram_block
from embedtrain.ops.top_eigenpairs import top_eigenpairs
from embedtrain.optim.damping import has_row_rates
from embedtrain.recipes.word2vec.model import INPUT, OUTPUT, Word2Vec, word2vec_tables
from embedtrain.testing.threads import run_threads
from embedtrain.train.step import micro_batches, train_step

NUM_WORDS, DIM, NUM_STEPS = 23, 8, 3
OPTIONS = {"lr": 1.0, "initial_accumulator_value": 0.5}


def sample_of(step: int, rank: int, size: int) -> TextSample:
    """Sentences of ten words, whose number differs from rank to rank; the last rank of three has none in a step."""
    generator = torch.Generator().manual_seed(step)
    words, *negatives = torch.randint(0, NUM_WORDS, (4, 60), generator=generator)
    cuts = {1: [0, 60], 2: [0, 40, 60], 3: [0, 20, 60, 60]}[size]
    own = slice(cuts[rank], cuts[rank + 1])
    positions = torch.arange(cuts[rank + 1] - cuts[rank])
    borders = positions // 10 * 10
    starts, stops = (positions - 3).maximum(borders), (positions + 3).minimum(borders + 10)
    return TextSample(words[own], torch.stack([words, *negatives], dim=1)[own], starts, stops)


def train(
    ranks: Ranks, architecture: Any, dtype: torch.dtype = torch.float32, num_parts: int = 1, **options: Any
) -> dict[str, Tensor]:
    model = Word2Vec(NUM_WORDS, DIM, architecture=architecture, dtype=dtype, ranks=ranks, seed=3, **options)
    optimizer = et.optim.RowwiseAdagrad(model.tables, **OPTIONS)
    optimizer.preconditioner = et.optim.CurvatureDamping({INPUT: OUTPUT}, directions=2)
    model.counts_rows = True
    for step in range(NUM_STEPS):
        sample = sample_of(step, ranks.rank, ranks.size)
        first, *further = micro_batches(TextBatch(sample, sample.words.numel()), num_parts)
        train_step(model, optimizer, first, further=further)
    return {
        f"{name}/{state}": model.tables.gather_table(name, state).float()
        for name in (INPUT, OUTPUT)
        for state in ("weight", "accumulator")
    }


def train_plainly(architecture: Any) -> dict[str, Tensor]:
    """Trains the oracle with an optimizer that is told nothing of damping: its gradients are damped here, by `eigh`."""
    tables = et.UnshardedEmbeddingCollection(word2vec_tables(NUM_WORDS, DIM, torch.float32), seed=3)
    optimizer = et.optim.RowwiseAdagrad(tables, **OPTIONS)
    for step in range(NUM_STEPS):
        sample = sample_of(step, 0, 1)
        ids = {INPUT: Jagged.from_ids(sample.words), OUTPUT: Jagged.from_ids(sample.targets.flatten())}
        tables(ids)  # marks the rows as touched
        weights = {name: tables.tables[name].weight.double() for name in (INPUT, OUTPUT)}
        block = TextBlock(sample.words, sample.targets + NUM_WORDS, sample.starts, sample.stops)
        _, both = skipgram_block(torch.cat([weights[INPUT], weights[OUTPUT]]).float(), block, architecture)
        counts = count_of_rows(block, 2 * NUM_WORDS, architecture).double().split(NUM_WORDS)
        moments = [
            (weight * count[:, None]).T @ weight / count.sum()
            for weight, count in zip(weights.values(), counts, strict=True)
        ]
        for side, name in enumerate((INPUT, OUTPUT)):
            values, vectors = torch.linalg.eigh(moments[1 - side])
            grad = both.split(NUM_WORDS)[side].double()
            rates = OPTIONS["lr"] / tables.tables[name].state["accumulator"].double().sqrt()
            for value, vector in zip(values[-2:], vectors.T[-2:], strict=True):
                x = (0.15 * rates * counts[side] * value).clamp(min=1e-12)
                grad += ((-torch.expm1(-x) / x - 1) * (grad @ vector))[:, None] * vector
            tables.tables[name].leaf.grad = grad.float()
        optimizer.step()
        optimizer.zero_grad()
    return {
        f"{name}/{state}": tables.gather_table(name, state)
        for name in (INPUT, OUTPUT)
        for state in ("weight", "accumulator")
    }


@pytest.mark.parametrize(("world_size", "architecture"), [(1, "skipgram"), (2, "cbow"), (3, "skipgram")])
def test_ranks_train_as_a_plain_computation_does(world_size: int, architecture: str) -> None:
    expected = train_plainly(architecture)
    for found in run_threads(world_size, train, architecture):
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=2e-4, atol=2e-5, msg=name)


def test_damping_changes_the_step_and_bfloat16_rows_take_it_too() -> None:
    model = Word2Vec(NUM_WORDS, DIM, seed=3)
    plain = et.optim.RowwiseAdagrad(model.tables, **OPTIONS)
    for step in range(NUM_STEPS):
        sample = sample_of(step, 0, 1)
        train_step(model, plain, TextBatch(sample, sample.words.numel()))
    damped = train(ONE_PROCESS, "skipgram")
    undamped = model.tables.gather_table(INPUT)
    assert float((damped[f"{INPUT}/weight"] - undamped).norm()) > 0.1 * float(undamped.norm())
    for found in run_threads(2, train, "skipgram", torch.bfloat16):
        torch.testing.assert_close(found[f"{INPUT}/weight"], damped[f"{INPUT}/weight"], rtol=0.1, atol=0.05)


def test_micro_batches_are_damped_as_the_whole_step() -> None:
    expected = train(ONE_PROCESS, "skipgram")
    for found in run_threads(2, train, "skipgram", torch.float32, 3):
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=2e-4, atol=2e-5, msg=name)


def test_copies_of_rows_on_the_host_are_damped_alike() -> None:
    expected = train(ONE_PROCESS, "skipgram")
    found = train(ONE_PROCESS, "skipgram", placement="host", cache_bytes=1000)
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def rank_pairs(ranks: Ranks, moments: list[Tensor]) -> tuple[Tensor, Tensor]:
    return top_eigenpairs(ranks.all_reduce(moments[ranks.rank].clone())[None], 4)


def test_eigenpairs_are_the_same_bits_on_every_rank() -> None:
    rows = torch.randn(3, 2000, 20, generator=torch.Generator().manual_seed(0))
    found = run_threads(3, rank_pairs, [part.T @ part / 6000 for part in rows])
    for curvatures, directions in found[1:]:
        assert torch.equal(curvatures, found[0][0]) and torch.equal(directions, found[0][1])


def train_beside(ranks: Ranks, is_beside: bool) -> dict[str, Tensor]:
    """Trains two damped tables, and beside them a table of another dim that looks up ids without counts."""
    others = [et.TableSpec("other", 9, 3)] if is_beside else []
    tables = et.EmbeddingCollection(
        [et.TableSpec("u", 11, DIM), *others],
        [et.FeatureSpec("u", "u", pooling="none"), *(et.FeatureSpec("other", "other") for _ in others)],
        ranks=ranks,
        seed=3,
    )
    optimizer = et.optim.RowwiseAdagrad(tables, **OPTIONS)
    optimizer.preconditioner = et.optim.CurvatureDamping({"u": "u"})
    for step in range(NUM_STEPS):
        ids = torch.randint(0, 11, (6,), generator=torch.Generator().manual_seed(step))
        asked = tables.ask({"u": et.Jagged.from_ids(ids)})
        rows = tables.distinct_rows(asked, counts=torch.full((6,), 50.0))
        loss = (rows @ rows.T).square().sum()
        if is_beside and step:  # in the first step it has no gradient
            loss = loss + tables({"other": et.Jagged.from_ids(ids % 9)})["other"].square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tables.gather_table(name) for name in tables.shards}


@pytest.mark.parametrize("world_size", [1, 2])
def test_tables_outside_the_pairs_train_as_they_are(world_size: int) -> None:
    (alone, *_), (beside, *_) = (run_threads(world_size, train_beside, is_beside) for is_beside in (False, True))
    assert torch.equal(alone["u"], beside["u"])
    before = et.EmbeddingCollection([et.TableSpec("other", 9, 3)], seed=3).gather_table("other")
    assert not torch.equal(beside["other"], before)


def test_rates_are_asked_for_where_the_rows_live(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Word2Vec(NUM_WORDS, DIM, placement="host")
    optimizer = et.optim.RowwiseAdagrad(model.tables, **OPTIONS)
    for group in model.tables.table_groups:
        monkeypatch.setattr(group, "device", torch.device("meta"))  # any but that of the rows
    asked = []
    monkeypatch.setattr(optimizer, "row_rates", lambda store, rows, settings: asked.append(rows.device))
    assert not has_row_rates(optimizer)
    assert asked == [torch.device("cpu")]


def one_step(optimizer: et.optim.SparseOptimizer, model: Word2Vec) -> None:
    sample = sample_of(0, 0, 1)
    train_step(model, optimizer, TextBatch(sample, sample.words.numel()))


def test_what_cannot_be_damped_is_refused_by_name() -> None:
    model = Word2Vec(NUM_WORDS, DIM)
    optimizer: et.optim.SparseOptimizer = et.optim.RowwiseAdagrad(model.tables, **OPTIONS)
    optimizer.preconditioner = et.optim.CurvatureDamping({INPUT: OUTPUT})
    with pytest.raises(ValueError, match="the gradient of the tables input, output has no counts"):
        one_step(optimizer, model)
    with pytest.raises(ValueError, match="no table item"):
        optimizer.preconditioner = et.optim.CurvatureDamping({INPUT: OUTPUT, "item": "item"})
        one_step(optimizer, model)
    with pytest.raises(ValueError, match="a table can be in one pair only"):
        et.optim.CurvatureDamping({INPUT: OUTPUT, "item": OUTPUT})
    with pytest.raises(ValueError, match="must be positive"):
        et.optim.CurvatureDamping({INPUT: OUTPUT}, directions=0)
    model = Word2Vec(NUM_WORDS, DIM)
    model.counts_rows = True
    optimizer = et.optim.Adam(model.tables)
    optimizer.preconditioner = et.optim.CurvatureDamping({INPUT: OUTPUT})
    with pytest.raises(ValueError, match="Use SGD, or RowwiseAdagrad or Adagrad"):
        one_step(optimizer, model)


@pytest.mark.parametrize("kind", ["SGD", "Adagrad"])
def test_other_optimizers_are_damped_by_their_rates(kind: str) -> None:
    options = {} if kind == "SGD" else {"initial_accumulator_value": 0.5}
    moved = []
    for is_damped in (False, True):
        model = Word2Vec(NUM_WORDS, DIM, seed=3)
        optimizer = getattr(et.optim, kind)(model.tables, lr=2.0, **options)
        if is_damped:
            model.counts_rows = True
            optimizer.preconditioner = et.optim.CurvatureDamping({INPUT: OUTPUT})
        one_step(optimizer, model)
        moved.append(model.tables.gather_table(OUTPUT).norm())
    assert 0 < float(moved[1]) < 0.99 * float(moved[0])
