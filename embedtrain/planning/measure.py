"""Measures what this machine does in a second, by the ops that a step is made of, on all ranks at once."""

from __future__ import annotations

import itertools
import os
import platform
from dataclasses import replace
from pathlib import Path

import torch

from embedtrain import optim
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import Runtime
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.jagged import Jagged
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_memory import allocate_rows
from embedtrain.ops.rowwise_adagrad import RowwiseAdagradStep, rowwise_adagrad
from embedtrain.ops.segment_sum import segment_sum
from embedtrain.ops.sort_unique import sort_unique
from embedtrain.planning.measure_models import arithmetic_rates, loader_rates, skipgram_rates
from embedtrain.planning.timing import median_seconds
from embedtrain.sharding.machine import Machine
from embedtrain.sharding.plan import ROW_STAGES, Law, TableLoad, Workload, seconds_of
from embedtrain.spec import FeatureSpec, TableSpec

_ROWS, _DIM = 1 << 20, 64
_TOUCHED = 1 << 16
_DRAWS = 8


def measure_machine(runtime: Runtime) -> Machine:
    """Measures for about ten seconds. Collective: every rank; each returns the slowest rank's rates.

    Random places are those of a table of 256 MiB a rank, of rows of 256 bytes.
    """
    torch.manual_seed(runtime.rank)
    ranks, device = runtime.ranks, runtime.device
    seconds = _row_seconds(device)
    rates = {
        "gather_bytes_per_second": _TOUCHED * _DIM * 4 / seconds["gather"],
        "update_bytes_per_second": _TOUCHED * (_DIM + 1) * 4 / seconds["update"],
        "sum_bytes_per_second": _TOUCHED * _DIM * 4 / seconds["sum"],
        "sort_ids_per_second": _TOUCHED / seconds["sort"],
        **skipgram_rates(device),
        **loader_rates(),
        **_exchange_rates(ranks, device),
    }
    arithmetic = arithmetic_rates(device)
    waits = {"op_seconds": arithmetic.pop("op_seconds"), "collective_seconds": _collective_seconds(ranks, device)}
    slowest = {name: min(of_ranks) for name, of_ranks in _gathered({**rates, **arithmetic}, ranks).items()}
    one, many = (_step_seconds(runtime, num_features) for num_features in (1, 9))
    # A step's five collectives are counted apart.
    waits["step_seconds"] = max(one - 5 * waits["collective_seconds"] * (runtime.world_size > 1), 1e-6)
    waits["feature_seconds"] = max((many - one) / 8, 1e-9)
    longest = {name: max(of_ranks) for name, of_ranks in _gathered(waits, ranks).items()}
    machine = Machine(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        num_ranks=runtime.world_size,
        seconds_per_predicted_second=1.0,
        **slowest,
        **longest,
    )
    factors = _gathered({"factor": _reference_factor(runtime, machine)}, ranks)
    return replace(machine, seconds_per_predicted_second=max(factors["factor"]))


def _row_seconds(device: torch.device) -> dict[str, float]:
    table = allocate_rows((_ROWS, _DIM), 0.1, torch.float32, device)
    state = allocate_rows((_ROWS,), 1.0, torch.float32, device)
    grad = torch.full((_TOUCHED, _DIM), 1e-3, device=device)
    # Other rows each time: those of the time before are in the caches.
    ids = itertools.cycle([torch.randint(_ROWS, (_TOUCHED,), device=device) for _ in range(_DRAWS)])
    keys = itertools.cycle([sort_unique(next(ids), bound=_ROWS) for _ in range(_DRAWS)])
    gradients = itertools.cycle(
        [RowGradient.of_rows(rows, grad[: len(rows)], _ROWS) for rows in (next(keys).unique for _ in range(_DRAWS))]
    )
    step = RowwiseAdagradStep(lr=1e-3, eps=1e-10)
    return {
        "gather": median_seconds(lambda: gather_rows(table, next(ids)), device),
        "update": median_seconds(lambda: rowwise_adagrad(table, state, next(gradients), step), device),
        "sum": median_seconds(lambda: segment_sum(grad, next(keys)), device),
        "sort": median_seconds(lambda: sort_unique(next(ids), bound=_ROWS), device),
    }


def _exchange_rates(ranks: Ranks, device: torch.device) -> dict[str, float]:
    if ranks.size == 1:
        # One rank exchanges nothing: any rate will do.
        return {"exchange_bytes_per_second": 1e12}
    world_size = ranks.size
    counts = [max(32768 // world_size, 1)] * world_size  # rows of 256 bytes: 8 MiB in all
    rows = torch.ones(sum(counts), _DIM, device=device)
    seconds = median_seconds(lambda: ranks.all_to_all(rows, counts, counts), device)
    return {"exchange_bytes_per_second": rows.nbytes * (world_size - 1) / world_size / seconds}


def _collective_seconds(ranks: Ranks, device: torch.device) -> float:
    if ranks.size == 1:
        return 1e-9
    world_size = ranks.size
    ones = [1] * world_size
    counts = torch.ones(world_size, 1, device=device)
    seconds = median_seconds(lambda: ranks.all_to_all(counts, ones, ones), device, inner=20)
    return seconds / (world_size - 1)


def _step_seconds(runtime: Runtime, num_features: int) -> float:
    """Returns the seconds of a step of next to no ids."""
    tables = EmbeddingCollection(
        [TableSpec("row", 1000, 8)],
        [FeatureSpec(f"row{number}", "row") for number in range(num_features)],
        device=runtime.device,
        ranks=runtime.ranks,
    )
    optimizer = optim.RowwiseAdagrad(tables)
    batch = {name: Jagged.from_ids(torch.arange(4, device=runtime.device)) for name in tables.features}

    def step() -> None:
        vectors = list(tables(batch).values())
        torch.autograd.backward(vectors, vectors)  # any gradient will do
        optimizer.step()
        optimizer.zero_grad()

    return median_seconds(step, runtime.device, inner=10)


def _reference_factor(runtime: Runtime, machine: Machine) -> float:
    """Returns the time that rows take in a step over what its parts add up to. Collective: every rank."""
    num_ids, num_rows = _TOUCHED // 4, _ROWS // 4
    tables = EmbeddingCollection([TableSpec("row", num_rows, _DIM)], device=runtime.device, ranks=runtime.ranks)
    optimizer = optim.RowwiseAdagrad(tables)
    drawn = [torch.randint(num_rows, (num_ids,), device=runtime.device) for _ in range(_DRAWS)]
    batches = itertools.cycle([{"row": Jagged.from_ids(ids)} for ids in drawn])

    def step() -> None:
        vectors = tables.distinct_rows(tables.ask(next(batches)))
        vectors.backward(vectors.detach())  # any gradient will do
        optimizer.step()
        optimizer.zero_grad()

    draws = ((float(num_ids * runtime.world_size), Law.zipf(num_rows, 0.0)),)
    load = TableLoad("row", num_rows, _DIM, 4, state_row_bytes=4, state_value_bytes=0, draws=draws)
    parts = seconds_of(Workload((load,), 1), runtime.world_size, machine)
    of_rows = sum(parts[name] for name in ROW_STAGES)
    return max(median_seconds(step, runtime.device) - parts["rest"], 0.1 * of_rows) / of_rows


def _gathered(values: dict[str, float], ranks: Ranks) -> dict[str, list[float]]:
    of_ranks = ranks.all_gather(values)
    return {name: [of_rank[name] for of_rank in of_ranks] for name in values}


def cpu_name() -> str:
    """Returns the processor's name and the number of its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores"
