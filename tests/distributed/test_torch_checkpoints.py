"""torch.distributed.checkpoint.state_dict takes models with tables; FSDP and DDP leave rows alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.testing.ranks import run_ranks

# "features" is an attribute of every collection, and a dot parts names in a state dict.
NAMES = ("x", "features", "user.tag")


class Model(nn.Module):
    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = et.EmbeddingCollection([et.TableSpec(name, 41, 4) for name in NAMES], ranks=ranks)
        self.linear = nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.tables(dict.fromkeys(NAMES, ids))
        return self.linear(sum(vectors.values())).square().mean()


class Job:
    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.model = Model(ranks)
        self.rows = et.optim.Adam(self.model.tables, lr=0.1)
        self.dense = torch.optim.Adam(self.model.linear.parameters())

    def train(self, num_steps: int = 2) -> Job:
        for _ in range(num_steps):
            self.model(torch.tensor([1, 2, 3])).backward()
            for optimizer in (self.rows, self.dense):
                optimizer.step()
                optimizer.zero_grad()
        return self

    def whole(self) -> list[Tensor]:
        tables = self.model.tables
        rows = [tables.gather_table(name, kind) for name in NAMES for kind in ("weight", "exp_avg", "exp_avg_sq")]
        return [tensor.clone() for tensor in (*rows, self.model.linear.weight.detach())]

    def is_like(self, other: Job) -> bool:
        """Whether both are equal, now and after a further step."""
        before = [torch.equal(*pair) for pair in zip(self.whole(), other.whole(), strict=True)]
        after = [torch.equal(*pair) for pair in zip(self.train(1).whole(), other.train(1).whole(), strict=True)]
        return all(before + after)


def use_state_dict_functions(ranks: Ranks, path: str) -> dict[str, bool]:
    is_alone = ranks.size == 1
    results = {}
    job, other = Job(ranks).train(), Job(ranks)
    keys = {f"tables.{name}.{kind}" for name in NAMES for kind in ("weight", "exp_avg", "exp_avg_sq", "step")}
    state_dict = get_model_state_dict(job.model)
    results["keys"] = set(state_dict) == keys | {"linear.weight", "linear.bias"}
    groups = get_optimizer_state_dict(job.model, job.rows)["param_groups"]
    results["no step of its own"] = groups[0]["step"] == job.rows.param_groups[0]["step"] == 2

    saved = {
        "model": get_model_state_dict(job.model),
        "rows": get_optimizer_state_dict(job.model, job.rows),
        "dense": get_optimizer_state_dict(job.model.linear, job.dense),
    }
    dcp.save(saved, checkpoint_id=path, no_dist=is_alone)
    loaded = {
        "model": get_model_state_dict(other.model),
        "rows": get_optimizer_state_dict(other.model, other.rows),
        "dense": get_optimizer_state_dict(other.model.linear, other.dense),
    }
    dcp.load(loaded, checkpoint_id=path, no_dist=is_alone)
    set_model_state_dict(other.model, loaded["model"])
    set_optimizer_state_dict(other.model, other.rows, loaded["rows"])
    set_optimizer_state_dict(other.model.linear, other.dense, loaded["dense"])
    results["sharded"] = other.is_like(job)

    options = StateDictOptions(full_state_dict=True)
    full = {name: entry.clone() for name, entry in get_model_state_dict(job.model, options=options).items()}
    results["whole tensors"] = full["tables.x.weight"].shape == (41, 4) and type(full["tables.x.weight"]) is Tensor
    third = Job(ranks)
    set_model_state_dict(third.model, full, options=options)
    pairs = zip(third.whole(), job.whole(), strict=True)
    results["full"] = all(torch.equal(*pair) for pair in pairs) and third.rows.param_groups[0]["step"] == 3

    both = get_state_dict(job.model, [job.rows, job.dense])[1]
    with pytest.raises(ValueError, match="multiple optimizers are not supported"):
        set_optimizer_state_dict(job.model, [job.rows, job.dense], both)
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_state_dict_functions(world_size: int, tmp_path: Path) -> None:
    for results in run_ranks(world_size, use_state_dict_functions, str(tmp_path)):
        assert results == dict.fromkeys(results, True)


def save_while_training(ranks: Ranks, path: str) -> bool:
    job = Job(ranks).train()
    expected = job.whole()
    future = dcp.async_save({"model": job.model.state_dict()}, checkpoint_id=path)
    job.train(10)
    future.result()
    other = Job(ranks)
    saved = {"model": other.model.state_dict()}
    dcp.load(saved, checkpoint_id=path)
    other.model.load_state_dict(saved["model"])
    return all(torch.equal(*pair) for pair in zip(other.whole()[:-1], expected[:-1], strict=True))


def wrap_whole_model(ranks: Ranks) -> list[bool]:
    """Trains with the model plain, in DDP and in FSDP; returns whether rows and linear layer come out alike."""
    results = []
    plain = Job(ranks).train()
    for wrap in (DistributedDataParallel, fully_shard):
        job = Job(ranks)
        wrapped = wrap(job.model)
        job.dense = torch.optim.Adam(job.model.linear.parameters())
        job.model, inner = wrapped, job.model
        job.train()
        job.model = inner
        for found, expected in zip(job.whole()[:-1], plain.whole()[:-1], strict=True):
            results.append(torch.allclose(found, expected))
    return results


def test_saving_goes_on_while_rows_are_trained(tmp_path: Path) -> None:
    assert run_ranks(2, save_while_training, str(tmp_path)) == [True, True]


def test_a_whole_model_may_be_wrapped() -> None:
    for results in run_ranks(2, wrap_whole_model):
        assert results and all(results)
