"""Measures what this machine does in a second, by the ops that a step is made of, on all ranks at once."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from embedtrain import optim
from embedtrain.distributed.collectives import all_gather_object, all_to_all_rows
from embedtrain.distributed.runtime import Runtime
from embedtrain.distributed.shared_memory import connect
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.jagged import Jagged
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_memory import allocate_rows
from embedtrain.ops.rowwise_adagrad import RowwiseAdagradStep, rowwise_adagrad
from embedtrain.ops.sample_text import KEEP_BITS, SamplingTables, sample_text
from embedtrain.ops.segment_sum import segment_sum
from embedtrain.ops.skipgram_block import TextBlock, count_predictions, skipgram_block
from embedtrain.ops.sort_unique import sort_unique
from embedtrain.sharding.machine import Machine
from embedtrain.sharding.plan import ROW_STAGES, Law, TableLoad, Workload, seconds_of
from embedtrain.spec import FeatureSpec, TableSpec

_REPEATS = 7
_ROWS, _DIM = 1 << 20, 64
_TOUCHED = 1 << 16
_WORDS, _NEGATIVES, _WINDOW, _VECTOR_DIM = 4096, 5, 5, 100


def measure_machine(runtime: Runtime) -> Machine:
    """Measures for about ten seconds. Collective: every rank; each returns the slowest rank's rates.

    Random places are those of a table of 256 MiB a rank, of rows of 256 bytes.
    """
    torch.manual_seed(runtime.rank)
    group, device = runtime.group, runtime.device
    seconds = _row_seconds(device)
    seconds.update(_text_seconds(device))
    left, right = torch.rand(2048, 512, device=device), torch.rand(512, 512, device=device)
    rates = {
        "gather_bytes_per_second": _TOUCHED * _DIM * 4 / seconds["gather"],
        "update_bytes_per_second": _TOUCHED * (_DIM + 1) * 4 / seconds["update"],
        "sum_bytes_per_second": _TOUCHED * _DIM * 4 / seconds["sum"],
        "sort_ids_per_second": _TOUCHED / seconds["sort"],
        "sample_draws_per_second": _WORDS * (1 + _NEGATIVES) / seconds["sample"],
        "skipgram_products_per_second": seconds["products"] / seconds["skipgram"],
        "dense_products_per_second": left.numel() * right.shape[1] / _seconds(lambda: left @ right, device),
        **_exchange_rates(group, device),
    }
    slowest = {name: min(of_ranks) for name, of_ranks in _gathered(rates, group).items()}
    one, many = (_step_seconds(runtime, num_features) for num_features in (1, 9))
    waits = {"collective_seconds": _collective_seconds(group, device)}
    # A step's five collectives are counted apart.
    waits["step_seconds"] = max(one - 5 * waits["collective_seconds"] * (runtime.world_size > 1), 1e-6)
    waits["feature_seconds"] = max((many - one) / 8, 1e-9)
    longest = {name: max(of_ranks) for name, of_ranks in _gathered(waits, group).items()}
    machine = Machine(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        num_ranks=runtime.world_size,
        seconds_per_predicted_second=1.0,
        **slowest,
        **longest,
    )
    factors = _gathered({"factor": _reference_factor(runtime, machine)}, group)
    return replace(machine, seconds_per_predicted_second=max(factors["factor"]))


def _row_seconds(device: torch.device) -> dict[str, float]:
    table = allocate_rows((_ROWS, _DIM), 0.1, torch.float32, device)
    state = allocate_rows((_ROWS,), 1.0, torch.float32, device)
    ids = torch.randint(_ROWS, (_TOUCHED,), device=device)
    rows = torch.randperm(_ROWS, device=device)[:_TOUCHED].sort().values
    grad = torch.full((_TOUCHED, _DIM), 1e-3, device=device)
    gradient = RowGradient.of_rows(rows, grad, _ROWS)
    keys = sort_unique(ids, bound=_ROWS)
    step = RowwiseAdagradStep(lr=1e-3, eps=1e-10)
    return {
        "gather": _seconds(lambda: gather_rows(table, ids), device),
        "update": _seconds(lambda: rowwise_adagrad(table, state, gradient, step), device),
        "sum": _seconds(lambda: segment_sum(grad, keys), device),
        "sort": _seconds(lambda: sort_unique(ids, bound=_ROWS), device),
    }


def _text_seconds(device: torch.device) -> dict[str, float]:
    num_words = 1 << 16
    everything = torch.full((num_words,), 1 << KEEP_BITS, dtype=torch.int32)
    tables = SamplingTables(everything, columns=torch.arange(num_words))
    tokens = torch.randint(num_words, (_WORDS,), dtype=torch.int32)
    positions = torch.arange(_WORDS)
    keys = iter(range(1 << 30))

    def draw() -> Tensor:
        sample = sample_text(tokens, positions, tables, window=_WINDOW, num_negatives=_NEGATIVES, key=next(keys))
        return sample.words

    sample = sample_text(tokens, positions, tables, window=_WINDOW, num_negatives=_NEGATIVES, key=0)
    vectors = torch.rand(4 * _WORDS, _VECTOR_DIM, device=device) - 0.5
    block = TextBlock(
        torch.randint(4 * _WORDS, (_WORDS,), device=device),
        torch.randint(4 * _WORDS, (_WORDS, 1 + _NEGATIVES), device=device),
        sample.starts.to(device),
        sample.stops.to(device),
    )
    return {
        "sample": _seconds(draw, torch.device("cpu")),
        # Backward multiplies the gradient by that of the loss.
        "skipgram": _seconds(lambda: skipgram_block(vectors, block)[1] * 1.0, device),
        "products": int(count_predictions(block)) * (1 + _NEGATIVES) * _VECTOR_DIM * 3.0,
    }


def _exchange_rates(group: dist.ProcessGroup | None, device: torch.device) -> dict[str, float]:
    if group is None or dist.get_world_size(group) == 1:
        # One rank exchanges nothing: any rate will do.
        return {"exchange_bytes_per_second": 1e12}
    world_size = dist.get_world_size(group)
    counts = [max(32768 // world_size, 1)] * world_size  # rows of 256 bytes: 8 MiB in all
    rows = torch.ones(sum(counts), _DIM, device=device)
    shared = connect(group, device)
    seconds = _seconds(lambda: all_to_all_rows(rows, counts, counts, group, shared), device)
    return {"exchange_bytes_per_second": rows.nbytes * (world_size - 1) / world_size / seconds}


def _collective_seconds(group: dist.ProcessGroup | None, device: torch.device) -> float:
    if group is None or dist.get_world_size(group) == 1:
        return 1e-9
    world_size = dist.get_world_size(group)
    ones = [1] * world_size
    counts = torch.ones(world_size, 1, device=device)
    shared = connect(group, device)
    seconds = _seconds(lambda: all_to_all_rows(counts, ones, ones, group, shared), device, inner=20)
    return seconds / (world_size - 1)


def _step_seconds(runtime: Runtime, num_features: int) -> float:
    """Returns the seconds of a step of next to no ids."""
    tables = EmbeddingCollection(
        [TableSpec("row", 1000, 8)],
        [FeatureSpec(f"row{number}", "row") for number in range(num_features)],
        device=runtime.device,
        process_group=runtime.group,
    )
    optimizer = optim.RowwiseAdagrad(tables)
    batch = {name: Jagged.from_ids(torch.arange(4, device=runtime.device)) for name in tables.features}

    def step() -> Tensor:
        loss = torch.stack([vectors.sum() for vectors in tables(batch).values()]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return _seconds(step, runtime.device, inner=10)


def _reference_factor(runtime: Runtime, machine: Machine) -> float:
    """Returns the time that rows take in a step over what its parts add up to. Collective: every rank."""
    num_ids, num_rows = _TOUCHED // 4, _ROWS // 4
    tables = EmbeddingCollection([TableSpec("row", num_rows, _DIM)], device=runtime.device, process_group=runtime.group)
    optimizer = optim.RowwiseAdagrad(tables)
    batch = {"row": Jagged.from_ids(torch.randint(num_rows, (num_ids,), device=runtime.device))}

    def step() -> None:
        vectors, _ = tables.distinct_rows(batch)
        (vectors * vectors).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    draws = ((float(num_ids * runtime.world_size), Law.zipf(num_rows, 0.0)),)
    load = TableLoad("row", num_rows, _DIM, 4, state_row_bytes=4, state_value_bytes=0, draws=draws)
    parts = seconds_of(Workload((load,), 1), runtime.world_size, machine)
    of_rows = sum(parts[name] for name in ROW_STAGES)
    return max(_seconds(step, runtime.device) - parts["rest"], 0.1 * of_rows) / of_rows


def _seconds(run: Callable[[], object], device: torch.device, inner: int = 1) -> float:
    """Returns the median of some runs, after two that map memory and fill caches."""
    found = []
    for _ in range(_REPEATS + 2):
        started_at = time.perf_counter()
        for _ in range(inner):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append((time.perf_counter() - started_at) / inner)
    return statistics.median(found[2:])


def _gathered(values: dict[str, float], group: dist.ProcessGroup | None) -> dict[str, list[float]]:
    of_ranks = all_gather_object(values, group)
    return {name: [of_rank[name] for of_rank in of_ranks] for name in values}


def cpu_name() -> str:
    """Returns the processor's name and the number of its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores"
