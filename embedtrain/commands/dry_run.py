"""The dry run: builds a run on the head of its data, makes two steps and prints the plan."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from embedtrain.checkpoint import latest_checkpoint
from embedtrain.commands.console import tell
from embedtrain.config.resolved import set_value, value_at
from embedtrain.config.sections import Config
from embedtrain.data.head import write_head
from embedtrain.data.prepared import make_cache_folder
from embedtrain.data.readers import Layout
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.planning.report import Request, print_plan
from embedtrain.planning.room import require_room
from embedtrain.planning.sizes import format_bytes
from embedtrain.recipes.building import build_parts, workload_of
from embedtrain.recipes.registry import recipe_of
from embedtrain.recipes.workload import Sizes
from embedtrain.train.calendar import Calendar
from embedtrain.train.run import start_new_tables
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.step import StepOptions, micro_batches, step_options, train_step
from embedtrain.train.task import Batches, GrowingBatches, StreamedBatches, Task

HEAD_BYTES = 4 << 20
_NUM_STEPS = 2


def dry_run(config: Config, folder: RunFolder, runtime: Runtime) -> None:
    """Builds a run on the head of its data, makes two steps and prints the plan on rank 0.

    Writes nothing to the run folder. The prepared head is stored in a temporary folder in the cache. Data smaller than
    the head are prepared as usual in the cache, where the run will find them.

    Collective: every rank.

    Raises:
        UserError: see the run itself.
    """
    found: list[Sizes] = []

    def check(sizes: Sizes) -> None:
        found.append(sizes)
        require_room(config, runtime, sizes)

    options = step_options(config.train, runtime.device)
    with _head_of(config, runtime) as (tried, is_all):
        parts = build_parts(tried, runtime, check)
        start_new_tables(parts, config, folder, runtime)
        task = parts.task
        if runtime.rank == 0:
            newest = latest_checkpoint(folder.checkpoints_path)
            tell(f"dry run      nothing is written to {folder.path}" + (f"; would resume {newest}" if newest else ""))
            part = f"about the first {format_bytes(HEAD_BYTES)}: the plan is of these, and all data have more rows"
            tell(f"data         {'all' if is_all else part}")
            print_plan(workload_of(tried, found[0]), Request(runtime.world_size))
            if not isinstance(task.batches, StreamedBatches):
                of_these = "" if is_all else " of these"
                of_all = f"{Calendar(task.batches).first_step_of(config.train.epochs):,} in all"
                per_epoch = f"{task.batches.steps_per_epoch:,} steps" if not _grows(task.batches) else "growing steps"
                tell(f"epochs       {config.train.epochs} of {per_epoch}{of_these}, {of_all}")
        for number, batch in enumerate(_some_batches(task.batches, config.train.epochs), start=1):
            loss, seconds = _try_step(task, batch, runtime, options)
            if runtime.rank == 0:
                tell(f"step {number}       loss {loss:.4f}, {seconds:.3f} seconds")


def _grows(batches: Batches) -> bool:
    return isinstance(batches, GrowingBatches) and batches.is_growing


def _some_batches(batches: Batches | StreamedBatches, epochs: int) -> Iterator[Any]:
    """Yields this rank's batches of the first steps, of the last epoch if steps grow. Collective: every rank."""
    if not isinstance(batches, StreamedBatches):
        epoch = epochs - 1 if _grows(batches) else 0
        num_steps = min(_NUM_STEPS, Calendar(batches).steps_of(epoch))
        yield from (batches.batch(epoch, step) for step in range(num_steps))
        return
    position: Mapping[str, Any] = {}
    num_left, is_over = _NUM_STEPS, False
    while num_left and not is_over:
        batch, position, is_over = batches.next_batch(position)
        if batch is not None:
            num_left -= 1
            yield batch


def _try_step(task: Task, batch: Any, runtime: Runtime, options: StepOptions) -> tuple[float, float]:
    """Makes a step; returns the loss over all ranks, and this rank's seconds. Collective: every rank."""
    began = time.perf_counter()
    first, *further = micro_batches(batch, options.accumulate_steps)
    objective = train_step(task.model, task.optimizer, first, task.dense, further=further, options=options)
    counted = torch.tensor([float(objective.total), objective.num_predictions], dtype=torch.float64)
    sums = runtime.ranks.all_reduce(counted)
    return float(sums[0] / sums[1].clamp(min=1)), time.perf_counter() - began


@contextmanager
def _head_of(config: Config, runtime: Runtime) -> Iterator[tuple[Config, bool]]:
    """Yields the configuration with its data replaced by their heads, and whether the heads are all the data.

    Collective: every rank, on entering and on leaving.
    """
    recipe = recipe_of(config.model)
    large = recipe.heads(config)
    if not large:
        yield config, True
        return
    tried = copy.deepcopy(config)
    cache_path = os.path.expanduser(value_at(config, recipe.cache_key))

    def write() -> tuple[str, Mapping[str, list[str]]]:
        work_path = tempfile.mkdtemp(prefix="dry-run-", dir=make_cache_folder(cache_path))
        try:
            return work_path, _write_heads(config, large, work_path)
        except BaseException:
            shutil.rmtree(work_path)
            raise

    work_path, heads = runtime.ranks.run_on_first(write)
    try:
        for key, paths in heads.items():
            set_value(tried, key, paths)
        if heads:
            set_value(tried, recipe.cache_key, work_path)
        yield tried, not heads
    except UserError as error:
        if not heads:
            raise
        raise UserError(f"{error} (a dry run reads about the first {format_bytes(HEAD_BYTES)} of the data)") from error
    finally:
        if runtime.rank == 0:
            shutil.rmtree(work_path, ignore_errors=True)


def _write_heads(config: Config, large: Mapping[str, tuple[str, Layout]], work_path: str) -> dict[str, list[str]]:
    """Writes the heads of the data at the given keys; returns their paths by key, except for small data."""
    heads = {}
    for key, (format, layout) in large.items():
        path = value_at(config, key)
        if path is not None:
            folder = os.path.join(work_path, key)
            os.mkdir(folder)
            head = write_head(path, format, folder, HEAD_BYTES, layout)
            if head is not None:
                heads[key] = head
    return heads
