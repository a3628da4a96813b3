"""Builds the parts of a run and its workload from a configuration of any model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from embedtrain.checkpoint import latest_checkpoint
from embedtrain.config.sections import Config
from embedtrain.distributed.runtime import Runtime
from embedtrain.recipes.base import save_bytes_of
from embedtrain.recipes.registry import recipe_of
from embedtrain.recipes.workload import Sizes, Workload
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.task import Parts

Check = Callable[[Sizes], None]
"""Called on every rank before a table is created; raises UserError if the tables do not fit into memory."""


def build_parts(
    config: Config, runtime: Runtime, check: Check | None = None, prepared: tuple[Any, Sizes] | None = None
) -> Parts:
    """Prepares the data and builds model, optimizers and batches. Collective: every rank.

    Args:
        config: configuration of the run.
        runtime: runtime of this process.
        check: called with the sizes of the tables.
        prepared: result of `Recipe.prepare` for this run; None to call it.

    Raises:
        UserError: raised on every rank; the data cannot be used, or `check` raised an error on any rank.
    """
    recipe = recipe_of(config.model)

    def check_files() -> None:
        recipe.check(config, latest_checkpoint(RunFolder(config.run.path).checkpoints_path) is None)

    runtime.ranks.run_on_first(check_files)
    data, sizes = recipe.prepare(config, runtime) if prepared is None else prepared
    if check is not None:
        runtime.ranks.run_on_each(functools.partial(check, sizes))
    return recipe.build(config, runtime, data)


def workload_of(config: Config, sizes: Sizes) -> Workload:
    """Returns the workload of a run.

    Raises:
        UserError: a size is unknown, or a size is given for a table that does not exist.
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
