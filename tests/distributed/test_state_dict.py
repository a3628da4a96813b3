"""A user's own call of torch.distributed.checkpoint saves and loads a model with tables, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import embedtrain as et
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.testing.ranks import run_ranks

TABLES = [et.TableSpec("item", 101, 8), et.TableSpec("user", 3, 8), et.TableSpec("word", 20, 4, dtype=torch.bfloat16)]


def make(ranks: Ranks, seed: int) -> tuple[nn.Module, et.EmbeddingCollection]:
    torch.manual_seed(0)
    tables = et.EmbeddingCollection(TABLES, ranks=ranks, seed=seed)
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
    model = nn.ModuleDict({"tables": tables, "dense": nn.Linear(2, 2)})
    if seed:
        sum(
            v.sum() for v in tables({spec.name: et.Jagged.from_ids(torch.arange(3)) for spec in TABLES}).values()
        ).backward()
        optimizer.step()
    return model, tables


def whole(tables: et.EmbeddingCollection) -> dict[str, Tensor]:
    names = [(spec.name, kind) for spec in TABLES for kind in ("weight", "accumulator")]
    return {f"tables.{table}.{kind}": tables.gather_table(table, kind).clone() for table, kind in names}


def _save(ranks: Ranks, path: str) -> dict[str, Tensor]:
    model, tables = make(ranks, seed=1)
    state_dict = model.state_dict()
    assert isinstance(state_dict["tables.item.weight"], DTensor) == (ranks.size > 1)
    assert state_dict["tables.item.weight"].shape == (101, 8)
    dcp.save(state_dict, checkpoint_id=path)
    return whole(tables)


def _load(ranks: Ranks, path: str) -> dict[str, Tensor]:
    model, tables = make(ranks, seed=0)
    state_dict = model.state_dict()
    dcp.load(state_dict, checkpoint_id=path)
    model.load_state_dict(state_dict)
    return whole(tables)


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(1, 2), (2, 3), (4, 1)])
def test_torchs_own_checkpoint_saves_and_loads(saved_on: int, loaded_on: int, tmp_path: Path) -> None:
    expected = run_ranks(saved_on, _save, str(tmp_path))[0]
    loaded = run_ranks(loaded_on, _load, str(tmp_path))[0]
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_load_state_dict_takes_copies_and_tells_what_differs() -> None:
    model, tables = make(ONE_PROCESS, seed=1)
    other, other_tables = make(ONE_PROCESS, seed=0)
    other.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    for name, tensor in whole(tables).items():
        assert torch.equal(whole(other_tables)[name], tensor), name
    state_dict = dict(model.state_dict())
    state_dict["tables.item.weight"] = torch.zeros(5, 8)
    state_dict["tables.new.weight"] = state_dict.pop("tables.user.weight")
    with pytest.raises(RuntimeError) as caught:
        other.load_state_dict(state_dict)
    for text in (
        "tables.user.weight",
        "tables.new.weight",
        "item.weight: shape (5, 8) in the state dict, (101, 8) in the model",
    ):
        assert text in str(caught.value)
