"""A run's configuration: defaults, then a YAML file, then `key=value` on the command line."""

from __future__ import annotations

from embedtrain.config.loading import config_from_yaml, differing_keys, load_config, setting_keys, to_yaml
from embedtrain.config.ranking import RankingConfig
from embedtrain.config.retrieval import RetrievalConfig
from embedtrain.config.sections import Config
from embedtrain.config.showing import show_config
from embedtrain.config.word2vec import Word2VecConfig

__all__ = [
    "Config",
    "RankingConfig",
    "RetrievalConfig",
    "Word2VecConfig",
    "config_from_yaml",
    "differing_keys",
    "load_config",
    "setting_keys",
    "show_config",
    "to_yaml",
]
