"""The parts of `first_gpu.sh`: what the first minutes on a GPU find out. Each part prints a table or raises.

    python benchmarks/first_gpu.py steps [--rehearse]

`--rehearse` runs a part on the CPU at a tiny size, so that the program is known to work before there is a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import torch
from torch import Tensor

import embedtrain as et
from embedtrain.checkpoint import SaveOptions
from embedtrain.data.bags import Bags
from embedtrain.data.click_batches import ClickBatch
from embedtrain.data.corpus import PreparedCorpus
from embedtrain.data.prepare import CorpusOptions, prepare_corpus
from embedtrain.data.retrieval_batches import DrawOptions, RetrievalBatches
from embedtrain.data.skipgram import SamplingOptions, TextBatches
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.metrics.sinks import MetricSink
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.recipes.ranking.model import NetworkOptions, Ranking
from embedtrain.recipes.retrieval.model import Retrieval, Scoring, Side
from embedtrain.recipes.word2vec.model import Word2Vec
from embedtrain.train.checkpoints import Checkpoints, SavePolicy
from embedtrain.train.state import TrainState
from embedtrain.train.step import DEFAULT_OPTIONS, StepOptions
from embedtrain.train.task import Task
from embedtrain.train.trainer import Trainer

MODELS = ("word2vec", "cbow", "retrieval", "two towers", "ranking, dlrm", "ranking, dcn_v2")
NUM_DENSE, NUM_FEATURES = 13, 26
LEARNING_RATE, ACCUMULATOR = 0.05, 0.1


@dataclass(frozen=True)
class Size:
    """How large the models and steps are.

    Attributes:
        vocabulary: words, users and items, and rows of each table of a ranking model.
        text: words of the text.
        words: of a step.
        examples: of a step.
        dim: of the tables.
        steps: that are timed.
    """

    vocabulary: int
    text: int
    words: int
    examples: int
    dim: int
    steps: int


FULL = Size(vocabulary=100_000, text=4_000_000, words=65_536, examples=8_192, dim=64, steps=200)
CHECKED = Size(vocabulary=1_000, text=20_000, words=4_096, examples=512, dim=64, steps=6)
TINY = Size(vocabulary=60, text=1_000, words=128, examples=32, dim=8, steps=4)
SMALL_KERNELS = 500, 200
"""Rows and ids of the cases that a sanitizer watches, which is a hundred times slower."""


class Clicks:
    """Examples of a click log with the layout of Criteo's, drawn anew for each step."""

    def __init__(self, size: Size) -> None:
        self._size = size
        self.steps_per_epoch, self.examples_per_epoch = 1 << 30, 1 << 40

    def batch(self, epoch: int, step: int) -> ClickBatch:
        """Returns the examples of a step."""
        generator = torch.Generator().manual_seed(step)
        n, rows = self._size.examples, self._size.vocabulary
        share = torch.rand(NUM_FEATURES, n, generator=generator, dtype=torch.float64)
        ids = (rows**share - 1).long().clamp(0, rows - 1)
        features = {f"C{number}": et.Jagged.from_ids(own) for number, own in enumerate(ids)}
        labels = (ids.sum(dim=0) % 3 == 0).float()
        return ClickBatch(labels, torch.randn(n, NUM_DENSE, generator=generator), features, n)


def make_corpus(size: Size, folder: str) -> PreparedCorpus:
    """Writes a text of a Zipf vocabulary and prepares it, once per folder."""
    path = Path(folder, "text.txt")
    if not path.exists():  # another time of writing would have it counted again
        share = np.random.default_rng(1).random(size.text)
        words = np.char.add("w", (size.vocabulary**share).astype(np.int64).astype(str))
        path.write_text("\n".join(" ".join(line) for line in words.reshape(-1, 20)))
    return prepare_corpus(
        CorpusOptions(path=str(path), tokenizer="whitespace", min_count=1), f"{folder}/cache", ONE_PROCESS
    )


def make_task(model: str, size: Size, device: torch.device, folder: str, placement: str = "device") -> Task:
    """Returns a model with its batches and optimizers, the same on every device."""
    options: dict[str, Any] = {"device": device, "seed": 1, "placement": placement}
    if model in ("word2vec", "cbow"):
        corpus = make_corpus(size, folder)
        blocks = {"block_words": min(512, size.words // 2), "blocks_per_step": max(2, size.words // 512)}
        batches: Any = TextBatches(corpus, SamplingOptions(sample=0), **blocks, seed=1, device=device)
        architecture: Any = "cbow" if model == "cbow" else "skipgram"
        words = Word2Vec(len(corpus.vocabulary), size.dim, architecture=architecture, **options)
        return _task(words, batches, None, LEARNING_RATE * 10, 100.0)
    if model.startswith("ranking"):
        names = [f"C{number}" for number in range(NUM_FEATURES)]
        tables = [et.TableSpec(name, size.vocabulary, size.dim) for name in names]
        network = NetworkOptions(architecture=model.partition(", ")[2])  # type: ignore[arg-type]
        ranking = Ranking(tables, [et.FeatureSpec(name) for name in names], NUM_DENSE, network, **options)
        return _task(ranking, Clicks(size), ranking.network)
    known = np.random.default_rng(2).integers(size.vocabulary, size=(size.vocabulary, 8))
    users = Bags.from_rows(np.repeat(np.arange(size.vocabulary), 8), np.sort(known, axis=1).ravel(), size.vocabulary)
    hidden = (128,) if model == "two towers" else ()
    sides = [Side(size.vocabulary, hidden=hidden) for _ in range(2)]
    retrieval = Retrieval(*sides, size.dim, Scoring(), **options)
    draw = DrawOptions(size.examples // 4, items_per_example=4, num_negatives=512, in_batch=True)
    return _task(retrieval, RetrievalBatches(users, size.vocabulary, draw, seed=1), retrieval.dense if hidden else None)


def _task(
    model: Any,
    batches: Any,
    dense: torch.nn.Module | None,
    lr: float = LEARNING_RATE,
    accumulator: float = ACCUMULATOR,
) -> Task:
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=lr, initial_accumulator_value=accumulator)
    dense_optimizer = None if dense is None else DenseOptimizer(dense, ranks=ONE_PROCESS, lr=1e-3)
    return Task(model, model.tables, optimizer, batches, dense=dense_optimizer)


class Stopped(Exception):
    """Ends a run in its middle."""


class Losses:
    """A sink of metrics that keeps the losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def log(self, record: Mapping[str, float | int | str]) -> None:
        """Keeps the loss of a record."""
        self.values.append(float(record["loss"]))

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Run:
    """A run as `train` makes it, a number of steps at a time.

    Args:
        task: what to train.
        path: folder of its checkpoints; it goes on where the newest one is.
        options: of the steps.
        save_every: steps between two saves, in the background; None for no save.
    """

    def __init__(
        self, task: Task, path: str, options: StepOptions = DEFAULT_OPTIONS, save_every: int | None = None
    ) -> None:
        self._task, self._state = task, TrainState()
        policy, facts = SavePolicy(save_every, None, SaveOptions("async")), {"data_fingerprint": "generated"}
        self._checkpoints = Checkpoints(path, task, self._state, facts=facts, policy=policy, ranks=ONE_PROCESS)
        self._checkpoints.restore()
        self._trainer = Trainer(
            task,
            self._state,
            epochs=1 << 20,
            schedule=lambda done: 1.0,
            checkpoints=self._checkpoints,
            ranks=ONE_PROCESS,
            options=options,
        )

    def train_to(self, last: int, sinks: Sequence[MetricSink] = ()) -> float:
        """Makes the steps up to a number; returns the seconds of the longest one.

        If there are sinks, each of these steps is logged, which is done when the one after it begins: one more is made.
        """
        ended = [time.perf_counter()]

        def stop() -> None:
            ended.append(time.perf_counter())
            if self._state.step == last + bool(sinks):
                raise Stopped

        try:
            self._trainer.run(sinks, 1 if sinks else 1 << 30, on_step=stop)
        except Stopped:
            self._checkpoints.settle()
        return float(np.diff(ended)[1:].max(initial=0.0))

    def train(self, count: int) -> None:
        """Makes so many further steps."""
        self.train_to(self._state.step + count)


def results(task: Task) -> dict[str, Tensor]:
    """Returns the tables, their state and the dense parameters, on the CPU."""
    task.optimizer.settle()
    found = {view.name: view.tensor.cpu().clone() for view in task.tables.shard_views()}
    return found | {name: tensor.cpu().clone() for name, tensor in (task.dense.tensors() if task.dense else {}).items()}


def steps(device: torch.device, size: Size, folder: str) -> None:
    """Makes steps of each model on the device and on the CPU, and compares losses and all that was trained."""
    print("| model | loss | largest difference of a loss | of a trained value |\n| --- | --- | --- | --- |")
    attempts = gpu.Attempts()
    for model in MODELS:
        with attempts.at(model):
            compare_steps(model, device, size, folder)
    attempts.end()


def compare_steps(model: str, device: torch.device, size: Size, folder: str) -> None:
    """Does what `steps` says for a model."""
    losses, trained = [], []
    for place in (device, torch.device("cpu")):
        task, sink = make_task(model, size, place, folder), Losses()
        Run(task, tempfile.mkdtemp(dir=folder)).train_to(3, [sink])
        losses.append(torch.tensor(sink.values))
        trained.append(results(task))
    apart = max(float((trained[0][name] - value).abs().max()) for name, value in trained[1].items())
    print(f"| {model} | {losses[0][-1]:.5f} | {(losses[0] - losses[1]).abs().max():.2g} | {apart:.2g} |", flush=True)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)
    for name, value in trained[1].items():
        torch.testing.assert_close(trained[0][name], value, rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def loop(device: torch.device, size: Size, folder: str) -> None:
    """Times steps of each model; counts the host's waits, and the time in which the device has nothing to do."""
    print("| model | step, ms | examples/s | host waits per step | device idle | MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    kind = device.type
    faster = {"TF32": StepOptions(tf32=True), "bfloat16": StepOptions(precision=torch.bfloat16, device_type=kind)}
    runs = [(model, "", StepOptions()) for model in MODELS]
    runs += [(model, f" in {name}", options) for model in MODELS[3:] for name, options in faster.items()]
    attempts = gpu.Attempts()
    for model, how, options in runs:
        with attempts.at(model + how):
            print(f"| {model}{how} | {time_model(model, size, device, folder, options)} |", flush=True)
    attempts.end()


def time_model(model: str, size: Size, device: torch.device, folder: str, options: StepOptions) -> str:
    """Returns the cells of a model in the table of `loop`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = Run(make_task(model, size, device, folder), tempfile.mkdtemp(dir=folder), options)
    run.train(min(10, size.steps))
    waits = count_waits(run, device)
    idle = idle_share(run, device)
    seconds = time_steps(run, size.steps, device)
    of_step = size.words if model in ("word2vec", "cbow") else size.examples
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0
    return f"{seconds * 1e3:.2f} | {of_step / seconds:,.0f} | {waits} | {idle} | {memory:,.0f}"


def time_steps(run: Run, count: int, device: torch.device) -> float:
    """Returns the seconds of a step, the mean over several that follow each other as in training."""
    synchronize(device)
    began = time.perf_counter()
    run.train(count)
    synchronize(device)
    return (time.perf_counter() - began) / count


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_waits(run: Run, device: torch.device, count: int = 8) -> str:
    """Returns how often the host waits for the device in a step: by torch's own warnings, and by waits for events."""
    if device.type != "cuda":
        return "-"
    events, wait = [0], torch.cuda.Event.synchronize

    def counted(event: torch.cuda.Event) -> None:
        events[0] += not event.query()
        wait(event)

    torch.cuda.Event.synchronize = counted  # type: ignore[method-assign]
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.train(count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.Event.synchronize = wait  # type: ignore[method-assign]
    synchronizing = sum("synchronizing" in str(warning.message) for warning in caught)
    return f"{synchronizing / count:.1f}, and {events[0] / count:.1f} for events"


def idle_share(run: Run, device: torch.device, count: int = 24) -> str:
    """Returns the share of the time of some steps in which no kernel and no copy ran."""
    if device.type != "cuda":
        return "-"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.train(count)
        synchronize(device)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        return "-, the profiler saw no kernel"
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return f"{1 - busy / (end - spans[0][0]):.0%}"


def sanitized(device: torch.device, size: Size, folder: str) -> None:
    """Runs and checks one case of each kernel, small enough to be watched by a sanitizer."""
    seen: set[str] = set()
    attempts = gpu.Attempts()
    gpu.WORDS_PER_STEP, gpu.VOCABULARY = SMALL_KERNELS[1], 50
    for case in gpu.cases(*SMALL_KERNELS, device):
        kind = case.name.partition(", dim")[0]
        if kind not in seen and "EmbeddingBag" not in kind:
            seen.add(kind)
            with attempts.at(kind):
                case.check()
    synchronize(device)
    print(f"{len(seen)} cases: {'; '.join(sorted(seen))}")
    attempts.end()


def tables(device: torch.device, size: Size, folder: str) -> None:
    """Times a step of 26 tables beside FBGEMM's, or beside EmbeddingBag and Adagrad if FBGEMM is not installed."""
    dim, rows, batch = (128, 1_000_000, 65_536) if device.type == "cuda" else (8, 100, 64)
    num_ids = NUM_FEATURES * batch
    ids = [gpu.draw_ids(rows, num_ids, True, device).view(NUM_FEATURES, batch) for _ in range(gpu.NUM_SETS)]
    grad = torch.randn(NUM_FEATURES, batch, dim, device=device) / batch
    print(
        f"{NUM_FEATURES} tables of {rows:,} rows, dim {dim}, {batch:,} examples\n| tables | step, ms |\n| --- | --- |"
    )
    seconds = gpu.median_seconds(our_step(rows, dim, ids, grad), device)
    print(f"| embedtrain | {seconds * 1e3:.3f} |", flush=True)
    peer, make = ("FBGEMM", fbgemm_step) if has_fbgemm() else ("EmbeddingBag and Adagrad", embedding_bag_step)
    print(f"| {peer} | {gpu.median_seconds(make(rows, dim, ids, grad), device) * 1e3:.3f} |", flush=True)
    if peer != "FBGEMM":
        print("FBGEMM's GPU tables are not installed: bring the wheel of fbgemm-gpu to compare with them")


def our_step(rows: int, dim: int, ids: list[Tensor], grad: Tensor) -> Callable[[int], object]:
    """Returns our step."""
    names = [f"C{number}" for number in range(len(grad))]
    ours = et.EmbeddingCollection(
        [et.TableSpec(name, rows, dim) for name in names],
        [et.FeatureSpec(name, pooling="sum") for name in names],
        device=grad.device,
    )
    optimizer = et.optim.RowwiseAdagrad(ours, lr=LEARNING_RATE)

    def step(number: int) -> None:
        vectors = ours(dict(zip(names, ids[number], strict=True)))
        torch.autograd.backward([vectors[name] for name in names], list(grad))
        optimizer.step()
        optimizer.zero_grad()

    return step


def has_fbgemm() -> bool:
    """Returns whether FBGEMM's GPU tables can be imported."""
    try:
        import fbgemm_gpu.split_table_batched_embeddings_ops_training  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return torch.cuda.is_available()


def fbgemm_step(rows: int, dim: int, ids: list[Tensor], grad: Tensor) -> Callable[[int], object]:
    """Returns a step of FBGEMM's split tables, whose backward is their update."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)] * len(grad),
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        pooling_mode=PoolingMode.SUM,
    )
    offsets = torch.arange(ids[0].numel() + 1, device=grad.device)
    # [batch, tables * dim], as it returns vectors.
    beside = grad.transpose(0, 1).reshape(grad.shape[1], -1).contiguous()
    return lambda number: module(ids[number].flatten(), offsets).backward(beside)


def embedding_bag_step(rows: int, dim: int, ids: list[Tensor], grad: Tensor) -> Callable[[int], object]:
    """Returns a step of EmbeddingBags with sparse gradients and torch's Adagrad."""
    bags = torch.nn.ModuleList(
        torch.nn.EmbeddingBag(rows, dim, mode="sum", sparse=True, device=grad.device) for _ in grad
    )
    optimizer = torch.optim.Adagrad(bags.parameters(), lr=LEARNING_RATE)

    def step(number: int) -> None:
        vectors = [bag(own.unsqueeze(1)) for bag, own in zip(bags, ids[number], strict=True)]
        torch.autograd.backward(vectors, list(grad))
        optimizer.step()
        optimizer.zero_grad()

    return step


def resume(device: torch.device, size: Size, folder: str) -> None:
    """Stops runs, resumes them and compares every bit; saves go on in the background, rows live here and there."""
    print("| model | rows | same bits after a resume | the longest step, saves among them, ms |")
    print("| --- | --- | --- | --- |")
    attempts = gpu.Attempts()
    on_device = [(model, "device") for model in ("word2vec", "cbow", "ranking, dlrm")]
    for model, placement in (*on_device, ("word2vec", "host")):
        with attempts.at(f"{model}, rows on the {placement}"):
            compare_resumed(model, placement, device, size, tempfile.mkdtemp(dir=folder))
    attempts.end()


def compare_resumed(model: str, placement: str, device: torch.device, size: Size, work: str) -> None:
    """Does what `resume` says for a model."""
    trained = []
    # Saves follow steps 3 and 6: the second run is stopped after one, and the third goes on from there.
    for name, last in (("whole", 8), ("stopped", 5), ("stopped", 8)):
        task = make_task(model, size, device, work, placement)
        longest = Run(task, f"{work}/{name}", save_every=3).train_to(last)
        trained.append(results(task))
    whole, _, resumed = trained
    differing = [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
    same = "no" if differing else "yes"
    print(f"| {model} | {placement} | {same} | {longest * 1e3:.1f} |", flush=True)
    assert not differing, f"{differing} differ after a resume"


def words(device: torch.device, size: Size, folder: str) -> None:
    """Prints how many words per second training takes, everything included."""
    print("| dim | words/s | step, ms |\n| --- | --- | --- |")
    for dim in (100, 128) if device.type == "cuda" else (size.dim,):
        sized = Size(**{**vars(size), "dim": dim})
        task = make_task("word2vec", sized, device, folder)
        run = Run(task, tempfile.mkdtemp(dir=folder))
        run.train(10)
        seconds = time_steps(run, sized.steps, device)
        print(f"| {dim} | {sized.words / seconds:,.0f} | {seconds * 1e3:.2f} |", flush=True)


PARTS: dict[str, tuple[Callable[[torch.device, Size, str], None], Size]] = {
    "steps": (steps, CHECKED),
    "sanitized": (sanitized, CHECKED),
    "loop": (loop, FULL),
    "tables": (tables, FULL),
    "resume": (resume, CHECKED),
    "words": (words, FULL),
}


def main(arguments: Iterable[str]) -> None:
    """Runs a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args([*arguments])
    if not given.rehearse and not torch.cuda.is_available():
        sys.exit("benchmarks/first_gpu.py needs a CUDA GPU, and PyTorch finds none; --rehearse runs it on the CPU")
    run, size = PARTS[given.part]
    with tempfile.TemporaryDirectory() as folder:
        run(torch.device("cpu" if given.rehearse else "cuda"), TINY if given.rehearse else size, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
