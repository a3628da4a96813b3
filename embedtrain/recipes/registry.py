"""The models that a run can train."""

from __future__ import annotations

from embedtrain.config.sections import Config
from embedtrain.recipes.ranking.config import RankingConfig
from embedtrain.recipes.retrieval.config import RetrievalConfig
from embedtrain.recipes.word2vec.config import Word2VecConfig

MODELS: dict[str, type[Config]] = {
    "word2vec": Word2VecConfig,
    "retrieval": RetrievalConfig,
    "ranking": RankingConfig,
}
"""The configuration of each model by its name, the value of the key `model`."""

DEFAULT_MODEL = "word2vec"
"""The model where no `model` is given."""
