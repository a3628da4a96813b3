"""The models that a run can train, by name: those of this package and those of installed packages.

A package brings its own model by an entry point of the group `embedtrain.recipes`: the name is the value of the key
`model`, the value a `Recipe`. A recipe is imported when its model is asked for. All recipes are imported only to
complete the keys of settings.
"""

from __future__ import annotations

from typing import Any

from embedtrain.errors import UserError
from embedtrain.optim.registry import Registry
from embedtrain.recipes.base import Recipe

DEFAULT_MODEL = "word2vec"
"""The model if no `model` is given."""

BUILT_IN = {
    "word2vec": "embedtrain.recipes.word2vec.recipe:RECIPE",
    "retrieval": "embedtrain.recipes.retrieval.recipe:RECIPE",
    "ranking": "embedtrain.recipes.ranking.recipe:RECIPE",
    "sasrec": "embedtrain.recipes.sasrec.recipe:RECIPE",
}
"""The recipes of this package by the names of their models."""


def _check(found: Any) -> Recipe[Any, Any]:
    if not isinstance(found, Recipe):
        raise TypeError("an embedtrain.recipes.api.Recipe")
    return found


RECIPES = Registry("model", "embedtrain.recipes", BUILT_IN, _check)
"""The recipe of each model by its name."""


def recipe_of(model: str) -> Recipe[Any, Any]:
    """Returns the recipe of a model.

    Raises:
        UserError: there is no such model, several packages offer it, or its package is broken.
    """
    if model not in RECIPES:
        raise UserError(
            f"there is no model {model!r}; there are {', '.join(RECIPES)}. If a package brings it, install the package "
            "in this environment"
        )
    return RECIPES[model]
