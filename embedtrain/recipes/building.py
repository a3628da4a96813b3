"""What is trained, from a configuration, whichever its model."""

from __future__ import annotations

import functools
from collections.abc import Callable

from embedtrain.config.sections import Config
from embedtrain.distributed.collectives import run_on_each
from embedtrain.distributed.runtime import Runtime
from embedtrain.recipes.base import Sizes
from embedtrain.recipes.registry import recipe_of
from embedtrain.train.task import Parts

Check = Callable[[Sizes], None]
"""Called on every rank before any table is made; raises UserError if there is no room for the tables."""


def no_check(sizes: Sizes) -> None:
    """Finds nothing wrong."""


def build_parts(config: Config, runtime: Runtime, check: Check = no_check) -> Parts:
    """Prepares the data and builds model, optimizers and batches. Collective: every rank.

    Raises:
        UserError: on every rank alike; the data cannot be used, or `check` raised it on any.
    """
    recipe = recipe_of(config.model)
    data, sizes = recipe.prepare(config, runtime)
    run_on_each(functools.partial(check, sizes), runtime.group)
    return recipe.build(config, runtime, data)
