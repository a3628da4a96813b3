"""Kernels and training steps on one GPU, beside the card's own copy and torch.nn.EmbeddingBag; under ten minutes.

    python benchmarks/gpu.py

Each result is checked against the reference before it is timed. Times are medians between CUDA events, over input sets
that together are many times the size of the L2 cache. GB/s counts what must be read and written once, and the share
is of the bandwidth of a plain copy, measured first. "predicted" is what the machine code of the kernel allows by
`tests/ops/roofline.py`: what the card's multiprocessors can have in flight, and no more than the copy moves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import embedtrain as et
from embedtrain.data.skipgram import SamplingOptions, TextBatch, TextSampler, sampling_tables
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.gather_rows import reference as reference_gather
from embedtrain.ops.pool_rows import Bags, pool_rows
from embedtrain.ops.pool_rows import reference as reference_pool
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_update import Moments, RowStep, moment_update
from embedtrain.ops.row_update import reference as reference_update
from embedtrain.ops.segment_sum import reference as reference_sum
from embedtrain.ops.segment_sum import segment_sum
from embedtrain.ops.skipgram_block import TextBlock, skipgram_block
from embedtrain.ops.skipgram_block import reference as reference_skipgram
from embedtrain.ops.sort_unique import sort_unique
from embedtrain.recipes.word2vec.model import Word2Vec
from embedtrain.train.ahead import BatchesAhead
from embedtrain.train.step import train_step
from embedtrain.train.task import Objective, Task

NUM_SETS = 4
BAG_SIZE = 10
LR, EPS, ACCUMULATOR = 0.05, 1e-8, 100.0
WORDS_PER_STEP, VOCABULARY, WORD_DIM = 1 << 16, 100_000, 100
KERNELS = {"row-wise Adagrad": "rowwise_adagrad", "Adagrad": "adagrad", "SGD": "sgd"}
"""By name of an optimizer, how `kernel_roofline.json` calls it."""
ROOFLINE_PATH = Path(__file__).resolve().parents[1] / "tests" / "ops" / "kernel_roofline.json"


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        name: what it is.
        run: does it on the input set of a number.
        check: raises AssertionError where the result is not the reference's.
        num_bytes: that must move; 0 where bytes say nothing.
        num_items: done by a run, for a rate.
        kernel: which kernel moves the bytes, as `kernel_roofline.json` names it, without the architecture.
    """

    name: str
    run: Callable[[int], object]
    check: Callable[[], None]
    num_bytes: float = 0.0
    num_items: float = 0.0
    kernel: str = ""


def main() -> None:
    """Measures and prints the table."""
    options = parse_options()
    if not (torch.cuda.is_available() or options.rehearse):
        sys.exit("benchmarks/gpu.py needs a CUDA GPU, and PyTorch finds none: nothing was measured")
    device = torch.device("cpu" if options.rehearse else "cuda")
    torch.manual_seed(1)
    bandwidth = copy_bandwidth(device, 1 << 16 if options.rehearse else 1 << 28)
    print(f"{name_of(device)}, PyTorch {torch.__version__}")
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s; {options.num_ids:,} ids a step in {options.num_rows:,} rows")
    print("| what | ms | GB/s | of the copy | predicted | M items/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    attempts = Attempts()
    for case in cases(options.num_rows, options.num_ids, device, has_steps=not options.kernels):
        with attempts.at(case.name):
            case.check()
            seconds = median_seconds(case.run, device)
            rate = case.num_bytes / seconds
            moved = f"{rate / 1e9:.0f} | {rate / bandwidth:.0%}" if case.num_bytes else "- | -"
            moved += f" | {predicted(case.kernel, device, bandwidth)}"
            print(f"| {case.name} | {seconds * 1e3:.3f} | {moved} | {case.num_items / seconds / 1e6:.1f} |", flush=True)
        del case
        if device.type == "cuda":
            torch.cuda.empty_cache()
    attempts.end()


class Attempts:
    """Things that are tried one after another: one that fails is told, and the others are tried all the same."""

    def __init__(self) -> None:
        self._failed: list[str] = []

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Tries something."""
        try:
            yield
        except Exception:
            traceback.print_exc(file=sys.stdout)
            print(f"FAILED: {name}", flush=True)
            self._failed.append(name)

    def end(self) -> None:
        """Ends the program with what failed, if anything did."""
        if self._failed:
            sys.exit(f"FAILED: {'; '.join(self._failed)}")


def name_of(device: torch.device) -> str:
    """Returns what a table says of the machine."""
    if device.type == "cpu":
        return "CPU, a rehearsal: the figures mean nothing"
    import triton

    return f"{torch.cuda.get_device_name()}, Triton {triton.__version__}"


def predicted(kernel: str, device: torch.device, bandwidth: float) -> str:
    """Returns the gigabytes per second that the machine code of a kernel allows on this card; "-" if none is stored."""
    if not kernel:
        return "-"
    # A rehearsal reads the figures of one architecture, so that a name that is not stored is found.
    architecture, count = 90, 1
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        architecture, count = 90 if properties.major >= 9 else 80, properties.multi_processor_count
    speed = json.loads(ROOFLINE_PATH.read_text())[f"{kernel} sm_{architecture}"]["of_multiprocessor"]
    return f"{min(speed * count, bandwidth / 1e9):.0f}"


def parse_options() -> argparse.Namespace:
    """Returns the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rows", type=int, default=10_000_000, help="of each table")
    parser.add_argument("--num-ids", type=int, default=1_000_000, help="looked up a step")
    parser.add_argument("--kernels", action="store_true", help="leave out whole steps")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU; give small numbers")
    return parser.parse_args()


def median_seconds(run: Callable[[int], object], device: torch.device, repeats: int = 24) -> float:
    """Returns the median time on the device of a run, after a warm-up on every input set."""
    for number in range(NUM_SETS):
        run(number)
    if device.type == "cpu":
        began = time.perf_counter()
        run(0)
        return time.perf_counter() - began
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for number, (start, stop) in enumerate(events):
        start.record()
        run(number % NUM_SETS)
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3


def copy_bandwidth(device: torch.device, num_values: int = 1 << 28) -> float:
    """Returns the bytes per second, read and written, of a copy; of 1 GiB unless another size is given."""
    source, target = torch.zeros(2, num_values, device=device)
    return 2 * source.nbytes / median_seconds(lambda number: target.copy_(source), device)


def draw_ids(num_rows: int, num_ids: int, is_zipf: bool, device: torch.device) -> Tensor:
    """Returns ids spread over the table as the layout spreads them: uniform, or by a power law of exponent 1."""
    share = torch.rand(num_ids, device=device, dtype=torch.float64)
    ranks = (num_rows**share - 1 if is_zipf else share * num_rows).long().clamp(0, num_rows - 1)
    return (ranks * 6_180_339_887) % num_rows


def cases(num_rows: int, num_ids: int, device: torch.device, *, has_steps: bool = True) -> Iterator[Case]:
    """Yields the cases one after the other, so that their tables need not be there together."""
    for dim, is_zipf in itertools.product((64, 100, 128), (False, True)):
        kind = f"dim {dim}, {'Zipf' if is_zipf else 'uniform'}"
        ids = [draw_ids(num_rows, num_ids, is_zipf, device) for _ in range(NUM_SETS)]
        yield from row_cases(torch.randn(num_rows, dim, device=device), ids, kind)
        for dtype in (torch.float32, torch.bfloat16):
            yield from update_cases(torch.randn(num_rows, dim, device=device).to(dtype), ids, kind)
        if has_steps:
            yield from bag_cases(num_rows, dim, ids, kind)
    yield from word_cases(device, has_steps=has_steps)


def row_cases(table: Tensor, ids: list[Tensor], kind: str) -> Iterator[Case]:
    """Yields gather, pooling and sums of rows."""
    n, dim = ids[0].numel(), table.shape[1]
    row_bytes = 4 * dim
    yield Case(
        f"gather_rows, {kind}",
        lambda number: gather_rows(table, ids[number]),
        lambda: same(gather_rows(table, ids[0]), reference_gather.gather_rows(table, ids[0], table.dtype), 0.0),
        n * (2 * row_bytes + 8),
        n,
        f"_copy_tile to float32, dim {dim} float32",
    )
    lengths = torch.full((n // BAG_SIZE,), BAG_SIZE, device=table.device)
    bags = [Bags(n // BAG_SIZE * BAG_SIZE, lengths)]
    ids = [some[: bags[0].num_values] for some in ids]
    yield Case(
        f"pool_rows, bags of {BAG_SIZE}, {kind}",
        lambda number: pool_rows(table, ids[number], bags),
        lambda: same(pool_rows(table, ids[0], bags)[0], reference_pool.pool_rows(table, ids[0], bags)[0], 1e-5),
        n * (row_bytes + 8) + n // BAG_SIZE * row_bytes,
        n,
        f"_pool_bag bags, dim {dim} float32",
    )
    grads = [torch.randn(some.numel(), dim, device=table.device) for some in ids]
    keys = [sort_unique(some) for some in ids]
    yield Case(
        f"segment_sum, {kind}",
        lambda number: segment_sum(grads[number], keys[number]),
        # The hottest row is a sum of tens of thousands of terms, which float32 adds up in another order.
        lambda: same(segment_sum(grads[0], keys[0]), reference_sum.segment_sum(grads[0], keys[0], 1.0), 1e-4),
        n * (row_bytes + 8) + keys[0].unique.numel() * (row_bytes + 8),
        n,
        f"_sum_chunk values, dim {dim} float32",
    )


def update_cases(weight: Tensor, ids: list[Tensor], kind: str) -> Iterator[Case]:
    """Yields the updates of the distinct rows."""
    num_rows, dim = weight.shape
    rows = [some.unique() for some in ids]
    grads = [torch.randn(some.numel(), dim, device=weight.device) for some in rows]
    is_bfloat16 = weight.dtype == torch.bfloat16
    for name, shape in (("row-wise Adagrad", (num_rows,)), ("Adagrad", (num_rows, dim)), ("SGD", None)):
        if is_bfloat16 and shape != (num_rows,):
            continue
        second = None if shape is None else torch.ones(shape, device=weight.device)

        def update(
            number: int, weight: Tensor = weight, second: Tensor | None = second, is_reference: bool = False
        ) -> None:
            step = RowStep(lr=LR, rounding_keys=rows[number] if is_bfloat16 else None)
            moments = Moments(eps=EPS)
            if is_reference:
                reference_update.moment_update(weight, None, second, rows[number], grads[number], step, moments)
            else:
                gradient = RowGradient.of_rows(rows[number], grads[number], num_rows)
                moment_update(weight, None, second, gradient, step, moments)

        def check(update: Callable = update, second: Tensor | None = second) -> None:
            given, expected = (
                [None if tensor is None else tensor.clone() for tensor in (weight, second)] for _ in range(2)
            )
            update(0, *given)
            update(0, *expected, is_reference=True)
            for found, wanted in zip(given, expected, strict=True):
                if found is not None:
                    same(found[rows[0]].float(), wanted[rows[0]].float(), 2**-7 if is_bfloat16 else 1e-5)

        state_values = 0 if shape is None else 1 if len(shape) == 1 else dim
        yield Case(
            f"{name} step, {'bfloat16' if is_bfloat16 else 'float32'}, {kind}",
            update,
            check,
            rows[0].numel() * (dim * (2 * weight.itemsize + 4) + 8 * state_values + (16 if is_bfloat16 else 8)),
            rows[0].numel(),
            f"_update_tile {KERNELS[name]} plain, dim {dim} {'bfloat16' if is_bfloat16 else 'float32'}",
        )


def bag_cases(num_rows: int, dim: int, ids: list[Tensor], kind: str) -> Iterator[Case]:
    """Yields whole steps, look-up to update: ours, and EmbeddingBag's with PyTorch's optimizers."""
    num_bags = ids[0].numel() // BAG_SIZE
    ids = [some[: num_bags * BAG_SIZE] for some in ids]
    grad = torch.randn(num_bags, dim, device=ids[0].device) / num_bags
    yield our_step(num_rows, ids, grad, kind)
    yield step_of_embedding_bag(torch.optim.SparseAdam, num_rows, ids, grad, kind)
    yield step_of_embedding_bag(torch.optim.Adagrad, num_rows, ids, grad, kind)


def our_step(num_rows: int, ids: list[Tensor], grad: Tensor, kind: str) -> Case:
    """Returns our step."""
    spec = et.TableSpec("item", num_rows, grad.shape[1])
    tables = et.EmbeddingCollection([spec], [et.FeatureSpec("item", pooling="sum")], device=grad.device)
    optimizer = et.optim.RowwiseAdagrad(tables, lr=LR, eps=EPS)
    lengths = torch.full((grad.shape[0],), BAG_SIZE, device=grad.device)

    def step(number: int) -> Tensor:
        vectors = tables({"item": et.Jagged(ids[number], lengths)})["item"]
        vectors.backward(grad)
        optimizer.step()
        optimizer.zero_grad()
        return vectors.detach()

    def check() -> None:
        group = tables.table_groups[0]
        rows = group.keys_of([0], [ids[0]])[0]
        check_first_step(step, group.weight, rows, grad, Moments(eps=EPS), is_rowwise=True)

    return Case(f"EmbeddingCollection and RowwiseAdagrad, a step, {kind}", step, check, num_items=ids[0].numel())


def step_of_embedding_bag(
    kind_of_optimizer: type[torch.optim.Optimizer], num_rows: int, ids: list[Tensor], grad: Tensor, kind: str
) -> Case:
    """Returns PyTorch's step, with SparseAdam or Adagrad."""
    bag = torch.nn.EmbeddingBag(num_rows, grad.shape[1], mode="sum", sparse=True, device=grad.device)
    optimizer = kind_of_optimizer(bag.parameters(), lr=LR, eps=EPS)
    offsets = torch.arange(grad.shape[0], device=grad.device) * BAG_SIZE

    def step(number: int) -> Tensor:
        vectors = bag(ids[number], offsets)
        vectors.backward(grad)
        optimizer.step()
        optimizer.zero_grad()
        return vectors.detach()

    def check() -> None:
        is_adam = kind_of_optimizer is torch.optim.SparseAdam
        correction = math.sqrt(1 - 0.999)  # of Adam's second moment in the first step; its eps stands inside
        adam = Moments(
            first_decay=0.9,
            first_correction=1 - 0.9,
            second_decay=0.999,
            second_gain=1 - 0.999,
            second_correction=correction,
            eps=EPS / correction,
        )
        moments = adam if is_adam else Moments(eps=EPS)
        check_first_step(step, bag.weight.detach(), ids[0], grad, moments, has_first=is_adam)

    name = f"EmbeddingBag(sparse=True) and {kind_of_optimizer.__name__}, a step, {kind}"
    return Case(name, step, check, num_items=ids[0].numel())


def check_first_step(
    step: Callable[[int], Tensor],
    weight: Tensor,
    rows_of_ids: Tensor,
    grad: Tensor,
    moments: Moments,
    *,
    has_first: bool = False,
    is_rowwise: bool = False,
) -> None:
    """Runs the first step, from moments of zero, and compares it with the reference's pooling and update.

    Args:
        step: takes the step of input set 0 and returns the pooled vectors.
        weight: [num_rows, dim]; what the step updates.
        rows_of_ids: [num_values]; the rows looked up, `BAG_SIZE` a bag.
        grad: [num_bags, dim]; of the pooled vectors.
        moments: the formula.
        has_first: whether it keeps first moments.
        is_rowwise: whether its second moments are of rows, not of elements.
    """
    rows, places = rows_of_ids.unique(return_inverse=True)
    expected = weight[rows]
    bags = [Bags(places.numel(), torch.full((grad.shape[0],), BAG_SIZE, device=grad.device))]
    (pooled,) = reference_pool.pool_rows(expected, places, bags)
    row_grad = torch.zeros_like(expected).index_add_(0, places, grad.repeat_interleave(BAG_SIZE, dim=0))
    first = torch.zeros_like(expected) if has_first else None
    second = torch.zeros(rows.numel(), device=grad.device) if is_rowwise else torch.zeros_like(expected)
    numbers = torch.arange(rows.numel(), device=grad.device)
    reference_update.moment_update(expected, first, second, numbers, row_grad, RowStep(lr=LR), moments)
    same(step(0), pooled, 1e-5)
    same(weight[rows], expected, 1e-4)


class Text:
    """Text of a Zipf vocabulary, in memory, sampled as `train` does: the batches of `embedtrain.train.task`."""

    steps_per_epoch = 1 << 30
    examples_per_epoch = steps_per_epoch * WORDS_PER_STEP

    def __init__(self, device: torch.device) -> None:
        options = SamplingOptions(sample=0)
        self._sampler = TextSampler(sampling_tables(np.full(VOCABULARY, 10), options), options, device)
        self._tokens = []
        for _ in range(NUM_SETS):
            tokens = draw_ids(VOCABULARY, WORDS_PER_STEP, True, torch.device("cpu")).int()
            tokens[::20] = ~tokens[::20]  # where a sentence begins
            self._tokens.append(tokens)

    def batch(self, epoch: int, step: int) -> TextBatch:
        """Returns a step's words."""
        return self._sampler(self._tokens[step % NUM_SETS], torch.arange(WORDS_PER_STEP), key=step)


def word_cases(device: torch.device, *, has_steps: bool) -> Iterator[Case]:
    """Yields the skip-gram kernel, and whole steps of word vectors."""
    text = Text(device)
    samples = [text.batch(0, number).sample for number in range(NUM_SETS)]
    vectors = torch.randn(2 * VOCABULARY, WORD_DIM, device=device) / WORD_DIM
    blocks = [
        TextBlock(
            sample.words.to(device),
            (sample.targets + VOCABULARY).to(device),
            sample.starts.to(device),
            sample.stops.to(device),
            reach=5,
        )
        for sample in samples
    ]

    def check() -> None:
        expected = reference_skipgram.skipgram_block(vectors, blocks[0], "skipgram", 1.0)
        for found, wanted in zip(skipgram_block(vectors, blocks[0]), expected, strict=True):
            same(found, wanted, 1e-3)

    yield Case(
        f"skipgram_block, dim {WORD_DIM}", lambda number: skipgram_block(vectors, blocks[number]), check,
        num_items=WORDS_PER_STEP,
    )  # fmt: skip
    if has_steps:
        yield step_of_word_vectors(text, device)


def step_of_word_vectors(text: Text, device: torch.device) -> Case:
    """Returns a step of `train`, the next step prepared while this one runs."""
    model = Word2Vec(VOCABULARY, WORD_DIM, device=device)
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=LR, eps=EPS, initial_accumulator_value=ACCUMULATOR)
    task = Task(model, model.tables, optimizer, text)
    ahead = BatchesAhead(task)
    numbers = itertools.count()

    def step(_: int) -> Objective:
        number = next(numbers)
        batch = ahead.take(0, number).batch
        return train_step(model, optimizer, batch, meanwhile=lambda: ahead.prepare_next(0, number + 1))

    def check() -> None:
        sample = text.batch(0, 0).sample
        group = model.tables.table_groups[0]
        ids = [sample.words.to(device), sample.targets.flatten().to(device)]
        rows, places = group.keys_of([0, 1], ids)[0].unique(return_inverse=True)
        inputs, targets = places.split([some.numel() for some in ids])
        block = TextBlock(
            inputs, targets.view_as(sample.targets), sample.starts.to(device), sample.stops.to(device), reach=5
        )
        expected, accumulator = group.weight[rows], torch.full_like(rows, ACCUMULATOR, dtype=torch.float32)
        loss, grad = reference_skipgram.skipgram_block(expected, block, "skipgram", 1.0)
        places = torch.arange(rows.numel(), device=device)
        reference_update.moment_update(expected, None, accumulator, places, grad, RowStep(lr=LR), Moments(eps=EPS))
        same(step(0).total.to(device), loss, 1e-4)
        same(group.weight[rows], expected, 1e-3)

    return Case(f"word vectors, dim {WORD_DIM}, a step of training", step, check, num_items=WORDS_PER_STEP)


def same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises AssertionError where values differ by more than a share of them and of the largest."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


if __name__ == "__main__":
    started_at = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started_at:.0f} s in all")
