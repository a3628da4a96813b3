"""Where every row is touched at every step, the optimizers are those of `torch.optim`."""

from __future__ import annotations

import pytest
import torch

import embedtrain as et
from embedtrain.ops._backend import dispatch, library

PEERS: dict[str, tuple[type[torch.optim.Optimizer], dict]] = {
    "adagrad": (
        torch.optim.Adagrad,
        {"lr_decay": 0.3, "weight_decay": 0.2, "initial_accumulator_value": 0.7, "eps": 0.1, "maximize": True},
    ),
    "rowwise_adagrad": (
        torch.optim.Adagrad,
        {"lr_decay": 0.3, "weight_decay": 0.2, "initial_accumulator_value": 0.7, "eps": 0.1, "maximize": True},
    ),
    "sgd": (torch.optim.SGD, {"weight_decay": 0.2, "maximize": True}),
    "adam": (
        torch.optim.Adam,
        {"betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.2, "decoupled_weight_decay": True, "maximize": True},
    ),
    "rowwise_adam": (torch.optim.Adam, {"betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.2, "maximize": True}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.6, "eps": 0.1, "weight_decay": 0.2, "maximize": True}),
}
# A decoupled decay of nothing changes nothing: it goes with a decay.
ALONE = {"decoupled_weight_decay": {"weight_decay": 0.2}}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", PEERS)
def test_equals_torch_all_options_one_by_one_and_together(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "native" and library.find() is None:
        pytest.skip(library.how_to_build())
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    dispatch.cpu_backend.cache_clear()
    peer, options = PEERS[name]
    one_by_one = [{option: value, **ALONE.get(option, {})} for option, value in options.items()]
    for chosen in [{}, *one_by_one, options]:
        found, expected = train_both(name, peer, chosen)
        if backend == "reference" and not name.startswith("rowwise"):
            assert torch.equal(found, expected), chosen
        else:
            # One number a row divides the rate, not the gradient; and the compiled kernel fuses a multiplication with
            # an addition: the last bit may differ in each of eight steps.
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6, msg=lambda m, c=chosen: f"{c}: {m}")
    dispatch.cpu_backend.cache_clear()


def train_both(name: str, peer: type[torch.optim.Optimizer], options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    dim = 1 if name.startswith("rowwise") else 5
    tables = et.EmbeddingCollection([et.TableSpec("t", 6, dim, init="normal", init_scale=1.0)])
    optimizer = et.optim.OPTIMIZERS[name](tables, lr=0.1, **options)
    weight = tables.gather_table("t").clone().requires_grad_()
    dense = peer([weight], lr=0.1, **options)
    ids = et.Jagged.from_ids(torch.arange(6))
    for step in range(8):
        target = torch.linspace(-1, 2, 6).unsqueeze(1) + 0.1 * step
        ((tables({"t": ids})["t"] - target).sin()).sum().backward()
        ((weight - target).sin()).sum().backward()
        for each in (optimizer, dense):
            each.step()
            each.zero_grad()
    return tables.gather_table("t"), weight.detach()


def test_untouched_rows_follow_torchs_sparse_adam() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("t", 6, 4, init="normal", init_scale=1.0)])
    optimizer = et.optim.Adam(tables, lr=0.1)
    peer = torch.nn.Embedding(6, 4, sparse=True)
    peer.weight.data.copy_(tables.gather_table("t"))
    sparse = torch.optim.SparseAdam(peer.parameters(), lr=0.1)
    for step in range(6):
        ids = torch.tensor([step % 3, 4, step % 2])
        (tables({"t": et.Jagged.from_ids(ids)})["t"] ** 2).sum().backward()
        (peer(ids) ** 2).sum().backward()
        for each in (optimizer, sparse):
            each.step()
            each.zero_grad()
    # SparseAdam puts eps before it divides by the correction of the root.
    torch.testing.assert_close(tables.gather_table("t"), peer.weight.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=10),
    ],
    ids=["lambda", "exponential", "cosine", "linear", "one_cycle"],
)
def test_torchs_schedulers_drive_them(make_scheduler) -> None:
    tables = et.EmbeddingCollection([et.TableSpec("t", 6, 5, init="normal", init_scale=1.0)])
    optimizer = et.optim.Adam(tables, lr=0.1)
    weight = tables.gather_table("t").clone().requires_grad_()
    dense = torch.optim.Adam([weight], lr=0.1)
    schedulers = [make_scheduler(each) for each in (optimizer, dense)]
    ids = et.Jagged.from_ids(torch.arange(6))
    for _ in range(5):
        (tables({"t": ids})["t"] ** 3).sum().backward()
        (weight**3).sum().backward()
        for each, scheduler in zip((optimizer, dense), schedulers, strict=True):
            each.step()
            each.zero_grad()
            scheduler.step()
    torch.testing.assert_close(tables.gather_table("t"), weight.detach(), rtol=2e-6, atol=1e-6)
