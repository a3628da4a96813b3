"""The dense part: alike on every rank, the gradient that of the global batch, saved and restored to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.errors import CheckpointError
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.testing.threads import run_threads


def module(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1))


def data(step: int) -> Tensor:
    return torch.randn(12, 3, generator=torch.Generator().manual_seed(step))


def train(net: nn.Module, dense: DenseOptimizer, steps: range, part: slice = slice(None)) -> None:
    for step in steps:
        net(data(step)[part]).pow(2).mean().backward()
        assert dense.average_gradients().fault() is None
        dense.step(1.0 / (step + 1))
        dense.zero_grad()


@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad", "sgd"])
def test_a_restored_optimizer_goes_on_to_the_last_bit(name: str) -> None:
    net = module()
    dense = DenseOptimizer(net, name=name, ranks=ONE_PROCESS, lr=0.1, weight_decay=0.01)
    train(net, dense, range(3))
    saved = {key: value.clone() for key, value in dense.tensors().items()}
    train(net, dense, range(3, 6))

    other_net = module(seed=1)
    other = DenseOptimizer(other_net, name=name, ranks=ONE_PROCESS, lr=0.1, weight_decay=0.01)
    other.load_tensors(saved)
    train(other_net, other, range(3, 6))
    for key, value in dense.tensors().items():
        assert torch.equal(value, other.tensors()[key]), key


def test_another_architecture_and_an_unknown_optimizer_are_refused() -> None:
    dense = DenseOptimizer(module(), ranks=ONE_PROCESS)
    saved = dense.tensors()
    with pytest.raises(CheckpointError, match=r"0.weight \(\[4, 3\] float32 in the checkpoint, absent in the model\)"):
        DenseOptimizer(nn.Linear(3, 4), ranks=ONE_PROCESS).load_tensors(saved)
    with pytest.raises(ValueError, match="no dense optimizer 'lamb'; there are adam"):
        DenseOptimizer(nn.Linear(3, 4), name="lamb", ranks=ONE_PROCESS)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    net = nn.Linear(3, 1)
    dense = DenseOptimizer(net, ranks=ONE_PROCESS)
    net(torch.full((2, 3), torch.nan)).sum().backward()
    fault = dense.average_gradients().fault()
    assert fault is not None and "weight is not finite" in fault


def _train_share(ranks: Ranks, seeds: list[int]) -> dict[str, Tensor]:
    rank, size = ranks.rank, ranks.size
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    dense = DenseOptimizer(net, ranks=ranks, lr=0.1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.1)
    share = 12 // size
    train(net, dense, range(4), slice(rank * share, (rank + 1) * share))
    return dense.tensors()


def test_ranks_train_as_one_process_on_the_global_batch() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    dense = DenseOptimizer(net, ranks=ONE_PROCESS, lr=0.1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.1)
    train(net, dense, range(4))
    results = run_threads(3, _train_share, [1, 2, 3])
    for key, value in dense.tensors().items():
        for result in results:
            torch.testing.assert_close(result[key], value)
            assert torch.equal(result[key], results[0][key])


def _first_values(ranks: Ranks) -> Tensor:
    net = nn.Linear(3, 4)
    with torch.no_grad():
        net.weight.fill_(float(ranks.rank))
    DenseOptimizer(net, ranks=ranks)
    return net.weight.detach()


def test_all_ranks_begin_with_the_values_of_rank_0() -> None:
    for weight in run_threads(2, _first_values):
        assert torch.equal(weight, torch.zeros(4, 3))
