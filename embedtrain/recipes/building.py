"""From a configuration of any model: what its run trains, and what its run asks of its machines."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from embedtrain.checkpoint import latest_checkpoint
from embedtrain.config.sections import Config
from embedtrain.distributed.runtime import Runtime
from embedtrain.recipes.base import save_bytes_of
from embedtrain.recipes.registry import recipe_of
from embedtrain.recipes.workload import Sizes, Workload
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.task import Parts

Check = Callable[[Sizes], None]
"""Called on every rank before any table is made; raises UserError if there is no room for the tables."""


def build_parts(config: Config, runtime: Runtime, check: Check | None = None) -> Parts:
    """Prepares the data and builds model, optimizers and batches. Collective: every rank.

    Raises:
        UserError: on every rank alike; the data cannot be used, or `check` raised it on any.
    """
    recipe = recipe_of(config.model)

    def check_files() -> None:
        recipe.check(config, latest_checkpoint(RunFolder(config.run.path).checkpoints_path) is None)

    runtime.ranks.run_on_first(check_files)
    data, sizes = recipe.prepare(config, runtime)
    if check is not None:
        runtime.ranks.run_on_each(functools.partial(check, sizes))
    return recipe.build(config, runtime, data)


def workload_of(config: Config, sizes: Sizes) -> Workload:
    """Returns what a run asks of its machines.

    Raises:
        UserError: something is unknown, or rows are given for a table that does not exist.
    """
    sizes.require_known(config.table_names())
    asked: Workload = recipe_of(config.model).workload(config, sizes)
    section = config.checkpoint
    return replace(
        asked,
        save_bytes=save_bytes_of(section),
        num_checkpoints=1 + (section.keep_last or 1) + (config.num_best or 0),
        accumulate_steps=config.train.accumulate_steps,
    )
