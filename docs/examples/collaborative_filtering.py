"""Collaborative filtering: users and items as vectors, fitted to ratings, with weight decay against learning by heart.

The ratings are made up: a few tastes decide them, each user has rated a few items only, and there is noise. With as
many columns as ratings a user the vectors fit the training ratings almost perfectly and predict the others badly;
weight decay, on the rows that a step touches, is what makes them general. It may be of either kind, and both are
measured: in the gradient (L2, before Adagrad divides it) or apart from it (decoupled).

    python docs/examples/collaborative_filtering.py
    torchrun --standalone --nproc-per-node 2 docs/examples/collaborative_filtering.py
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

import embedtrain as et

USERS, ITEMS, TASTES, DIM, RATINGS, BATCH = 2000, 500, 4, 16, 30_000, 500


def make_ratings() -> tuple[Tensor, Tensor, Tensor]:
    """Returns user, item and rating of RATINGS pairs; ratings have variance 1, of which noise is a quarter."""
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(0, USERS, (RATINGS,), generator=generator)
    items = (torch.rand(RATINGS, generator=generator) ** 2 * ITEMS).long()  # some are popular
    of_users = torch.randn(USERS, TASTES, generator=generator)
    of_items = torch.randn(ITEMS, TASTES, generator=generator)
    taste = (of_users[users] * of_items[items]).sum(dim=1) / math.sqrt(TASTES)
    noise = torch.randn(RATINGS, generator=generator)
    return users, items, math.sqrt(0.75) * taste + 0.5 * noise


def fit(runtime: et.Runtime, epochs: int, **options) -> tuple[float, float]:
    """Returns the root mean square errors of the ratings trained on and of the fifth that was left out."""
    users, items, ratings = make_ratings()
    tables = et.EmbeddingCollection(
        [et.TableSpec("user", USERS, DIM, init_scale=0.3), et.TableSpec("item", ITEMS, DIM, init_scale=0.3)],
        device=runtime.device,
    )
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.3, **options)
    num_trained = RATINGS * 4 // 5

    def predict(chosen: Tensor) -> Tensor:
        vectors = tables({"user": et.Jagged.from_ids(users[chosen]), "item": et.Jagged.from_ids(items[chosen])})
        return (vectors["user"] * vectors["item"]).sum(dim=1)

    def error(chosen: Tensor) -> float:
        with torch.no_grad():
            return float((predict(chosen) - ratings[chosen]).square().mean().sqrt())

    order = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for batch in torch.randperm(num_trained, generator=order).split(BATCH):
            mine = batch[runtime.rank :: runtime.world_size]
            # A rating's own loss, not the batch's mean: a row then moves by what its few ratings say.
            loss = (predict(mine) - ratings[mine]).square().mean() * BATCH
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return error(torch.arange(num_trained)), error(torch.arange(num_trained, RATINGS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    runtime = et.init_distributed(device="cpu")
    torch.set_num_threads(1)
    kinds = {
        "none": {},
        "in the gradient": {"weight_decay": 1.0},
        "decoupled": {"weight_decay": 0.02, "decoupled_weight_decay": True},
    }
    if runtime.rank == 0:
        print("| weight decay | error on ratings trained on | on ratings left out |\n| --- | --- | --- |")
    for name, settings in kinds.items():
        trained, left_out = fit(runtime, options.epochs, **settings)
        if runtime.rank == 0:
            print(f"| {name} | {trained:.3f} | {left_out:.3f} |", flush=True)
    et.shut_down()


if __name__ == "__main__":
    main()
