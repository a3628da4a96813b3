"""The registry of recipes by model name: the models of embedtrain and of other installed packages.

A package adds a model by an entry point of the group `embedtrain.recipes`: its name is the value of the setting
`model`, and its object is a `Recipe`. A recipe is imported when its model is used. All recipes are imported only to
complete the keys of settings.
"""

from __future__ import annotations

from typing import Any

from embedtrain.errors import UserError
from embedtrain.optim.registry import Registry
from embedtrain.recipes.base import Recipe

DEFAULT_MODEL = "word2vec"
"""Model of a configuration that does not name one."""

BUILT_IN = {
    "word2vec": "embedtrain.recipes.word2vec.recipe:RECIPE",
    "sasrec": "embedtrain.recipes.sasrec.recipe:RECIPE",
    "retrieval": "embedtrain.recipes.retrieval.recipe:RECIPE",
    "ranking": "embedtrain.recipes.ranking.recipe:RECIPE",
}
"""Places of embedtrain's own recipes by model name. `embedtrain init` tries the last ones first."""


def _check(found: Any) -> Recipe[Any, Any]:
    if not isinstance(found, Recipe):
        raise TypeError("an embedtrain.recipes.api.Recipe")
    return found


RECIPES = Registry("model", "embedtrain.recipes", BUILT_IN, _check)
"""The recipe of each model by its name."""


def recipe_of(model: str) -> Recipe[Any, Any]:
    """Returns the recipe of a model.

    Raises:
        UserError: there is no such model, several packages have it, or its package cannot be imported.
    """
    if model not in RECIPES:
        raise UserError(
            f"there is no model {model!r}; there are {', '.join(RECIPES)}. If another package has it, install "
            "the package in this environment"
        )
    return RECIPES[model]
