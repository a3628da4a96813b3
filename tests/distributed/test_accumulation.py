"""A step in micro-batches against the same step as one batch, on any number of ranks; and the precision of products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import embedtrain as et
from embedtrain.checkpoint import SaveOptions
from embedtrain.config.sections import TrainConfig
from embedtrain.data.skipgram import TextBatch
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.errors import UserError
from embedtrain.ops.sample_text import TextSample
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.recipes.ranking.model import Ranking
from embedtrain.recipes.retrieval.model import Scoring
from embedtrain.recipes.word2vec.model import Word2Vec
from embedtrain.testing.ranks import run_ranks
from embedtrain.testing.threads import run_threads
from embedtrain.train.checkpoints import Checkpoints, SavePolicy
from embedtrain.train.state import TrainState
from embedtrain.train.step import StepOptions, has_bfloat16, micro_batches, step_options, train_step
from embedtrain.train.task import Objective, Task
from embedtrain.train.trainer import Trainer
from tests.distributed.test_ranking_ranks import (
    FEATURES,
    NUM_DENSE,
    OPTIONS,
    START,
    TABLES,
    assert_same_at_each_step,
    global_batch,
    part_of,
    train_oracle,
)
from tests.distributed.test_retrieval_model import batches_of, make
from tests.records import without_costs

NUM_STEPS = 3


def history_of(
    model: Any,
    dense: nn.Module | None,
    batch_of: Callable[[int], Any],
    ranks: Ranks,
    accumulate_steps: int,
    options: StepOptions | None = None,
) -> list[dict[str, Tensor]]:
    """Returns the losses, the tables and the dense parameters after each step."""
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1, eps=1e-8, initial_accumulator_value=START)
    dense_optimizer = None if dense is None else DenseOptimizer(dense, ranks=ranks, name="adam", lr=0.01)
    options = options or StepOptions()
    history = []
    for step in range(NUM_STEPS):
        first, *further = micro_batches(batch_of(step), accumulate_steps)
        objective = train_step(model, optimizer, first, dense_optimizer, further=further, options=options)
        sums = ranks.all_reduce(torch.stack([objective.total, torch.tensor(float(objective.num_predictions))]))
        names = list(model.tables.shards)
        history.append(
            {
                "loss": sums[0] / sums[1],
                **{name: model.tables.gather_table(name).clone() for name in names},
                **{f"{name}/state": model.tables.gather_table(name, "accumulator").clone() for name in names},
                **({} if dense is None else {name: value.clone() for name, value in dense.state_dict().items()}),
            }
        )
    return history


def rank_clicks(ranks: Ranks, accumulate_steps: int, options: StepOptions | None = None) -> list[dict[str, Tensor]]:
    model = Ranking(TABLES, FEATURES, NUM_DENSE, OPTIONS["dlrm"], ranks=ranks, seed=5)
    batches = [part_of(global_batch(step), ranks.rank, ranks.size) for step in range(NUM_STEPS)]
    return history_of(model, model.network, batches.__getitem__, ranks, accumulate_steps, options)


@pytest.mark.parametrize(("world_size", "accumulate_steps"), [(1, 4), (2, 3), (3, 4)])
def test_ranking_in_micro_batches_equals_the_unsharded_model_on_whole_batches(
    world_size: int, accumulate_steps: int
) -> None:
    expected = train_oracle(OPTIONS["dlrm"])[:NUM_STEPS]
    for history in run_threads(world_size, rank_clicks, accumulate_steps):
        assert_same_at_each_step([{name: step[name] for name in expected[0]} for step in history], expected)


def retrieve(ranks: Ranks, accumulate_steps: int, in_batch: bool) -> list[dict[str, Tensor]]:
    model = make(Scoring(temperature=0.3, negative_weight=1.2), towers=True, ranks=ranks)
    batches = batches_of(ranks, in_batch=in_batch)
    return history_of(model, model.dense, lambda step: batches.batch(0, step), ranks, accumulate_steps)


@pytest.mark.parametrize(("world_size", "in_batch"), [(1, True), (3, True), (2, False)])
def test_retrieval_scores_each_micro_batch_against_all_candidates_of_the_step(world_size: int, in_batch: bool) -> None:
    expected = retrieve(ONE_PROCESS, 1, in_batch)
    for found in run_threads(world_size, retrieve, 3, in_batch):
        assert_same_at_each_step(found, expected)


def text_batch(step: int, ranks: Ranks) -> TextBatch:
    """Sentences of ten words, whose number differs from rank to rank."""
    num_words = 60 // ranks.size
    generator = torch.Generator().manual_seed(step)
    words, *negatives = torch.randint(0, 23, (4, 60), generator=generator)[
        :, ranks.rank * num_words : (ranks.rank + 1) * num_words
    ]
    positions = torch.arange(num_words)
    borders = positions // 10 * 10
    starts, stops = (positions - 3).maximum(borders), (positions + 3).minimum(borders + 10)
    return TextBatch(TextSample(words, torch.stack([words, *negatives], dim=1), starts, stops), num_words)


def embed_words(ranks: Ranks, accumulate_steps: int, architecture: str) -> list[dict[str, Tensor]]:
    model = Word2Vec(23, 8, architecture=architecture, ranks=ranks, seed=2)  # type: ignore[arg-type]
    return history_of(model, None, lambda step: text_batch(step, ranks), ranks, accumulate_steps)


@pytest.mark.parametrize(("world_size", "architecture"), [(1, "skipgram"), (3, "skipgram"), (2, "cbow")])
def test_word_vectors_in_micro_batches_equal_whole_batches(world_size: int, architecture: str) -> None:
    expected = embed_words(ONE_PROCESS, 1, architecture)
    for found in run_threads(world_size, embed_words, 4, architecture):
        assert_same_at_each_step(found, expected)


def test_a_text_is_cut_at_sentences_and_loses_no_word() -> None:
    whole = text_batch(0, ONE_PROCESS)
    parts = whole.split(4)
    # Quarters of 60 words, moved on to the next border.
    assert [part.sample.words.numel() for part in parts] == [20, 10, 20, 10]
    assert [part.num_examples for part in parts] == [15, 15, 15, 15]
    assert torch.equal(torch.cat([part.sample.targets for part in parts]), whole.sample.targets)
    for part in parts:
        positions = torch.arange(part.sample.words.numel())
        assert bool(((part.sample.starts <= positions) & (part.sample.starts >= 0)).all())
        assert bool((part.sample.stops <= len(positions)).all())
    empty = TextBatch(TextSample(*(tensor[:0] for tensor in vars(whole.sample).values())), 0)
    assert [part.sample.words.numel() for part in empty.split(3)] == [0, 0, 0]


@dataclass(frozen=True)
class WholeNumbers:
    """Ids with whole numbers as gradients, so that sums are exact in any order."""

    ids: Tensor
    factors: Tensor

    @property
    def num_examples(self) -> int:
        return len(self.ids)

    def split(self, num_parts: int) -> list[WholeNumbers]:
        parts = zip(self.ids.tensor_split(num_parts), self.factors.tensor_split(num_parts), strict=True)
        return [WholeNumbers(*part) for part in parts]


class Products(nn.Module):
    """Many ids of three rows: all of a row's gradients are one sum before the optimizer sees any."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.tables = et.EmbeddingCollection([et.TableSpec("t", 3, 4)], ranks=ranks)

    def forward(self, batch: WholeNumbers) -> Objective:
        loss = (self.tables({"t": batch.ids})["t"] * batch.factors.unsqueeze(1)).sum() * self.tables.ranks.size
        return Objective(loss, loss.detach().double(), len(batch.ids))


def sum_up(ranks: Ranks, accumulate_steps: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids, factors = torch.randint(0, 3, (97,), generator=generator), torch.randint(-9, 9, (97,), generator=generator)
    batch = WholeNumbers(ids[ranks.rank :: ranks.size], factors[ranks.rank :: ranks.size].float())
    return history_of(Products(ranks), None, lambda step: batch, ranks, accumulate_steps)


@pytest.mark.parametrize(("world_size", "accumulate_steps"), [(1, 40), (3, 3)])
def test_sums_that_need_no_rounding_are_the_same_bits(world_size: int, accumulate_steps: int) -> None:
    expected = sum_up(ONE_PROCESS, 1)
    for found in run_threads(world_size, sum_up, accumulate_steps):
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours["t"], theirs["t"]) and torch.equal(ours["t/state"], theirs["t/state"])


def trainer_of(task: Task, state: TrainState, path: Path, ranks: Ranks, accumulate_steps: int) -> Trainer:
    """Returns a trainer of two epochs, from the newest checkpoint of the folder if there is one."""
    policy, facts = SavePolicy(3, None, SaveOptions("sync")), {"data_fingerprint": "x"}
    checkpoints = Checkpoints(str(path), task, state, facts=facts, policy=policy, ranks=ranks)
    checkpoints.restore()
    return Trainer(
        task,
        state,
        epochs=2,
        schedule=lambda done: 1 - done,
        checkpoints=checkpoints,
        ranks=ranks,
        options=StepOptions(accumulate_steps=accumulate_steps),
    )


class Stream:
    """Three batches that come once."""

    def next_batch(self, position: Mapping[str, Any]) -> tuple[WholeNumbers | None, Mapping[str, Any], bool]:
        step = int(position.get("step", 0))
        ids = torch.arange(20 * step, 20 * step + 20) % 3
        return (None, position, True) if step == 3 else (WholeNumbers(ids, ids + 1.0), {"step": step + 1}, False)


def test_a_stream_is_trained_on_in_micro_batches(tmp_path: Path) -> None:
    tables, calls = [], []
    for accumulate_steps in (1, 3):
        model = Products(ONE_PROCESS)
        model.register_forward_pre_hook(lambda *_, n=accumulate_steps: calls.append(n))
        task = Task(model, model.tables, et.optim.RowwiseAdagrad(model.tables, lr=0.1), Stream())
        trainer = trainer_of(task, TrainState(), tmp_path / str(accumulate_steps), ONE_PROCESS, accumulate_steps)
        assert trainer.run([], 10)
        tables.append(model.tables.gather_table("t"))
    assert torch.equal(*tables)
    assert (calls.count(1), calls.count(3)) == (3, 9)


class Clicks:
    steps_per_epoch, examples_per_epoch = NUM_STEPS, 25 * NUM_STEPS

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def batch(self, epoch: int, step: int) -> Any:
        return part_of(global_batch(NUM_STEPS * epoch + step), self._ranks.rank, self._ranks.size)


class StoppedError(Exception):
    pass


def run(ranks: Ranks, path: Path, stop_at: int | None) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Trains two epochs, or goes on where the newest checkpoint of the folder is."""
    model = Ranking(TABLES, FEATURES, NUM_DENSE, OPTIONS["dcn_v2"], ranks=ranks, seed=5)
    dense = DenseOptimizer(model.network, ranks=ranks, lr=0.01)
    task = Task(model, model.tables, et.optim.RowwiseAdagrad(model.tables, lr=0.1), Clicks(ranks), dense=dense)
    state = TrainState()
    trainer = trainer_of(task, state, path, ranks, accumulate_steps=3)
    records: list[dict[str, Any]] = []

    class Sink:
        def log(self, record: dict[str, Any]) -> None:
            records.append(without_costs(record))

        flush = close = staticmethod(lambda: None)

    def stop() -> None:
        if state.step == stop_at:
            raise StoppedError

    try:
        trainer.run([Sink()] if ranks.rank == 0 else [], 2, on_step=stop)
    except StoppedError:
        return {}, []
    tables = {name: model.tables.gather_table(name).clone() for name in model.tables.shards}
    return {**tables, **dense.tensors()}, records


def stopped_and_whole(ranks: Ranks, path: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    run(ranks, path, stop_at=4)
    return run(ranks, path, stop_at=None)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_run_ends_with_the_same_bits(world_size: int, tmp_path: Path) -> None:
    launch = run_threads if world_size == 1 else run_ranks  # signals are for the main thread of a process
    whole = launch(world_size, run, tmp_path / "whole", None)
    resumed = launch(world_size, stopped_and_whole, tmp_path / "stopped")
    for (expected, records), (found, later) in zip(whole, resumed, strict=True):
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        assert later == [record for record in records if record["step"] > 3]
    _, records = whole[0]
    assert [record["examples"] for record in records] == [50, 100, 150]
    assert records[0]["ids/looked_up"] > 25 * 3, "of all micro-batches of a step"


def test_a_batch_that_cannot_be_divided_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"train\.accumulate_steps=2: .*object has no method split\(num_parts\)"):
        micro_batches(object(), 2)


def test_forward_passes_run_under_autocast_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0].dtype, output.dtype))

    model = Ranking(TABLES, FEATURES, NUM_DENSE, OPTIONS["dlrm"], seed=5)
    model.network.top[0].register_forward_hook(note)  # type: ignore[union-attr]
    history = history_of(model, model.network, global_batch, ONE_PROCESS, 2, StepOptions(precision=torch.bfloat16))
    assert {output for _, output in seen} == {torch.bfloat16}
    assert len(seen) == 2 * NUM_STEPS
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    expected = rank_clicks(ONE_PROCESS, 2)
    for ours, theirs in zip(history, expected, strict=True):
        assert 0 < abs(float(ours["loss"]) - float(theirs["loss"])) < 0.01
        for name in theirs:
            assert ours[name].dtype == theirs[name].dtype
            torch.testing.assert_close(ours[name], theirs[name], rtol=0.3, atol=0.12)


def test_ranks_under_autocast_equal_one_process() -> None:
    options = StepOptions(precision=torch.bfloat16)
    expected = rank_clicks(ONE_PROCESS, 1, options)
    for history in run_threads(3, rank_clicks, 2, options):
        assert_same_at_each_step(history[:1], expected[:1])


def test_scores_of_retrieval_are_products_in_bfloat16_with_a_float32_correction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = make(Scoring(temperature=0.3)), batches_of(in_batch=True).batch(0, 0)
    found: list[Tensor] = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *given: found.append(linear(*given)) or found[-1])
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)
    assert [scores.dtype for scores in found] == [torch.float32, torch.bfloat16]
    assert rounded.loss.dtype == torch.float32
    assert 0 < abs(float(exact.total - rounded.total)) < 0.02 * float(exact.total)
    # A correction that differs by a rounding of bfloat16 changes the loss.
    of_positives, of_candidates = batch.expected
    moved = replace(batch, expected=(of_positives, of_candidates * (1 + 2**-12)))
    with torch.autocast("cpu", torch.bfloat16):
        assert float(model(moved).total) != float(rounded.total)


def test_tf32_holds_within_a_step_alone() -> None:
    seen: list[str] = []
    model = Products(ONE_PROCESS)
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1)
    before = torch.get_float32_matmul_precision()
    batch = WholeNumbers(torch.arange(3), torch.ones(3))
    for options in (StepOptions(tf32=True), StepOptions()):
        train_step(model, optimizer, batch, options=options)
    assert seen == ["high", before]
    assert torch.get_float32_matmul_precision() == before


def test_what_the_device_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    section = TrainConfig(tf32=True)
    with pytest.raises(UserError, match=r"train\.tf32=true needs a GPU .* this run is on the CPU"):
        step_options(section, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match=r"train\.tf32=true .* Tesla T4 has none"):
        step_options(section, torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"train\.precision=bfloat16 .* Tesla T4 is not"):
        step_options(replace(section, tf32=False, precision="bfloat16"), torch.device("cuda", 0))
    for has_amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        assert has_bfloat16(torch.device("cpu")) == has_amx
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert step_options(section, torch.device("cuda", 0)).tf32
