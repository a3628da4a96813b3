"""The public names for writing a recipe, which describes a model to `embedtrain train`."""

from __future__ import annotations

from embedtrain.config.optimizer import DenseOptimizerConfig, OptimizerConfig
from embedtrain.config.sections import Config, EvaluateConfig, TableConfig, TrainConfig
from embedtrain.metrics.figures import Bars, Chart, Line, PointMap, Section, Table, Text
from embedtrain.recipes.base import (
    Grow,
    Packed,
    PackedNetwork,
    PackedTable,
    Recipe,
    RowScorer,
    Wanted,
    base_file,
    collection_options,
    table_blocks,
    table_spec,
    takes_new_names,
)
from embedtrain.recipes.optimizers import build_dense_optimizer, build_optimizer
from embedtrain.recipes.workload import (
    IdDistribution,
    Sizes,
    TableLoad,
    Workload,
    dense_sizes,
    table_load,
)
from embedtrain.train.task import Batches, Evaluation, Objective, Parts, Pretrained, StreamedBatches, Task

__all__ = [
    "Bars",
    "Batches",
    "Chart",
    "Config",
    "DenseOptimizerConfig",
    "EvaluateConfig",
    "Evaluation",
    "Grow",
    "IdDistribution",
    "Line",
    "Objective",
    "OptimizerConfig",
    "Packed",
    "PackedNetwork",
    "PackedTable",
    "Parts",
    "PointMap",
    "Pretrained",
    "Recipe",
    "RowScorer",
    "Section",
    "Sizes",
    "StreamedBatches",
    "Table",
    "TableConfig",
    "TableLoad",
    "Task",
    "Text",
    "TrainConfig",
    "Wanted",
    "Workload",
    "base_file",
    "build_dense_optimizer",
    "build_optimizer",
    "collection_options",
    "dense_sizes",
    "table_blocks",
    "table_load",
    "table_spec",
    "takes_new_names",
]
