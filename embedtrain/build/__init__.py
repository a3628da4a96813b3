"""From a configuration to the objects of a run: the only place that knows both."""

from __future__ import annotations

from embedtrain.build.growing import GrownTable, grow_run
from embedtrain.build.parts import Check, Sizes
from embedtrain.build.retrieval import TrainedRetrieval, open_retrieval
from embedtrain.build.run import Run, build_parts, build_run, check_run_folder
from embedtrain.build.trained import open_run_vectors, read_config

__all__ = [
    "Check",
    "GrownTable",
    "Run",
    "Sizes",
    "TrainedRetrieval",
    "build_parts",
    "build_run",
    "check_run_folder",
    "grow_run",
    "open_retrieval",
    "open_run_vectors",
    "read_config",
]
