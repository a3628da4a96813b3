"""The models that a run can train, by name: those of this package and those of installed packages.

A package brings its own model by an entry point of the group `embedtrain.recipes`: the name is the value of the key
`model`, the value a `Recipe`. A recipe is imported when its model is asked for, and no sooner.
"""

from __future__ import annotations

import functools
import logging
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from embedtrain.errors import UserError
from embedtrain.recipes.base import Recipe

GROUP = "embedtrain.recipes"

DEFAULT_MODEL = "word2vec"
"""The model if no `model` is given."""

BUILT_IN = {
    "word2vec": "embedtrain.recipes.word2vec.recipe:RECIPE",
    "retrieval": "embedtrain.recipes.retrieval.recipe:RECIPE",
    "ranking": "embedtrain.recipes.ranking.recipe:RECIPE",
}
"""The recipes of this package by the names of their models."""

_logger = logging.getLogger(__name__)


def model_names() -> list[str]:
    """Returns the names of all models, those of this package first; nothing is imported for it."""
    return list(_entries())


@functools.cache
def recipe_of(model: str) -> Recipe[Any, Any]:
    """Returns the recipe of a model.

    Raises:
        UserError: there is no such model, two packages bring one of this name, or its package is broken.
    """
    entries = _entries()
    if model not in entries:
        raise UserError(f"there is no model {model!r}; there are {', '.join(entries)}")
    first, *others = entries[model]
    if others:
        packages = ", ".join(_package_of(entry) for entry in entries[model])
        raise UserError(f"model {model!r} is brought by several packages: {packages}; uninstall all but one of them")
    try:
        found = first.load()
    except Exception as error:
        if first.dist is None:
            raise
        raise UserError(
            f"package {_package_of(first)} brings model {model!r}, and importing {first.value} failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, Recipe):
        raise UserError(
            f"package {_package_of(first)} brings model {model!r}: expected {first.value} to be an "
            f"embedtrain.recipes.api.Recipe, got {type(found).__name__}"
        )
    return found


def usable_models() -> list[str]:
    """Returns the names of the models whose recipes can be imported; warns of each that cannot."""
    found = []
    for model in model_names():
        try:
            recipe_of(model)
        except UserError as error:
            _warn_once(str(error))
        else:
            found.append(model)
    return found


@functools.cache
def _entries() -> dict[str, list[EntryPoint]]:
    """Returns the entry points by name; a model of this package keeps its name to itself."""
    found = {name: [EntryPoint(name, value, GROUP)] for name, value in BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        if entry.name in BUILT_IN:
            _warn_once(f"package {_package_of(entry)} brings a model {entry.name!r}, which is embedtrain's: not used")
        else:
            found.setdefault(entry.name, []).append(entry)
    return found


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def _package_of(entry: EntryPoint) -> str:
    return entry.value if entry.dist is None else entry.dist.name
