"""What configurations ask of their machines, against what they make."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from embedtrain.config.optimizer import DenseOptimizerConfig
from embedtrain.data.click_batches import ClickBatch
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.jagged import Jagged
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.recipes.building import workload_of
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.workload import Sizes, dense_sizes


def test_a_tables_own_optimizer_decides_what_its_rows_take() -> None:
    overrides = ["data.path=x", "table.dim=50", "optimizer.tables.output.name=adam"]
    tables = workload_of(load_config(None, overrides), Sizes(default_num_rows=1000)).tables
    state_bytes = {table.name: (table.state_row_bytes, table.state_value_bytes) for table in tables}
    assert state_bytes == {"input": (4, 0), "output": (0, 8)}


@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad", "sgd"])
def test_the_dense_part_is_its_parameters_and_their_state(name: str) -> None:
    module = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
    optimizer = DenseOptimizer(module, name=name, ranks=ONE_PROCESS)
    module(torch.ones(3, 5)).sum().backward()
    optimizer.step(1.0)
    # Counts of steps are no part of the sizes.
    kept = sum(tensor.nbytes for tensor in optimizer.tensors().values() if tensor.dim() > 0)
    gradients = sum(parameter.nbytes for parameter in module.parameters())
    assert dense_sizes([module], DenseOptimizerConfig(name=name)) == (kept, gradients)
    assert dense_sizes([], DenseOptimizerConfig(name=name)) == (0, 0)


def test_a_ranking_step_has_labels_numbers_and_bags() -> None:
    overrides = ["model=ranking", "data.path=x", "data.dense=[x0,x1]", "data.categorical=[c0,tags]", "data.num_rows=9"]
    overrides += ["data.features={tags: {bag: true}}", "train.global_batch_size=64"]
    workload = workload_of(load_config(None, overrides), Sizes(default_bag_length=3.0))
    batch = ClickBatch(
        torch.zeros(64),
        torch.zeros(64, 2),
        {
            "c0": Jagged.from_ids(torch.zeros(64, dtype=torch.int64)),
            "tags": Jagged(torch.zeros(192, dtype=torch.int64), torch.full((64,), 3)),
        },
        num_global=64,
    )
    numbers = batch.labels.nbytes + batch.dense.nbytes
    # Features of one id per example have no lengths of their own to keep.
    ids = batch.features["c0"].values.nbytes + batch.features["tags"].values.nbytes
    assert workload.batch_bytes == numbers + ids + batch.features["tags"].lengths.nbytes
    assert np.isclose(sum(table.num_ids for table in workload.tables), 256)
