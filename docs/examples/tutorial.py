"""Adagrad beside SGD with momentum, Adam and RMSprop on sparse features: 20 seeds where tutorials show one.

1,000 samples of 100 features, 95 % of them zero; a network of 50 hidden units; learning rate 0.01, 100 epochs. The
first layer is a sharded table: a row of weights for each feature, of which a sample looks up its non-zero ones.

    python docs/examples/tutorial.py
    torchrun --standalone --nproc-per-node 2 docs/examples/tutorial.py --seeds 2
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor, nn

import embedtrain as et

SAMPLES, TRAINED, FEATURES, HIDDEN, BATCH = 1000, 800, 100, 50, 40
PUBLISHED = {"Adagrad": 0.935, "SGD with momentum": 0.895, "Adam": 0.930, "RMSprop": 0.860}


class Momentum(et.optim.SparseOptimizer):
    """SGD with momentum, of the rows that a step touches."""

    def __init__(self, tables, *, lr=0.01, momentum=0.9, **options):
        states = [et.optim.RowState("momentum", per_element=True)]
        super().__init__(tables, {"lr": lr, "momentum": momentum}, states, **options)

    def direction(self, grad, states, settings):
        return states["momentum"].mul_(settings["momentum"]).add_(grad)


# For each name the optimizer of the table's rows and that of the other layer.
OPTIMIZERS = {
    "Adagrad": (et.optim.Adagrad, torch.optim.Adagrad),
    "SGD with momentum": (Momentum, lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9)),
    "Adam": (et.optim.Adam, torch.optim.Adam),
    "RMSprop": (et.optim.RMSprop, torch.optim.RMSprop),
}


class Network(nn.Module):
    """100 features -> 50 hidden units -> the log-odds of the label."""

    def __init__(self, seed: int, runtime: et.Runtime) -> None:
        super().__init__()
        # As torch's own linear layer of 100 inputs begins: uniform within 1 / sqrt(100).
        rows = et.TableSpec("features", FEATURES, HIDDEN, init_scale=FEATURES**-0.5)
        self.tables = et.EmbeddingCollection(
            [rows], [et.FeatureSpec("features", pooling="sum")], device=runtime.device, seed=seed
        )
        torch.manual_seed(seed)
        self.bias = nn.Parameter(torch.zeros(HIDDEN, device=runtime.device))
        self.output = nn.Linear(HIDDEN, 1, device=runtime.device)

    def forward(self, samples: Tensor) -> Tensor:
        present = samples != 0
        bags = et.Jagged(present.nonzero()[:, 1], present.sum(dim=1), samples[present])
        hidden = self.tables({"features": bags})["features"] + self.bias
        return self.output(hidden.relu()).squeeze(1)


def make_data(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns samples [1000, 100], of which 5 % are not zero, and labels by the sign of a hidden linear rule."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(SAMPLES, FEATURES, generator=generator)
    samples *= torch.rand(SAMPLES, FEATURES, generator=generator) < 0.05
    labels = samples @ torch.randn(FEATURES, generator=generator) > 0
    return samples.to(device), labels.float().to(device)


def accuracy(name: str, seed: int, epochs: int, runtime: et.Runtime) -> float:
    """Trains a network and returns its share of right answers on the samples left out."""
    samples, labels = make_data(seed, runtime.device)
    network = Network(seed, runtime)
    of_rows, of_others = OPTIMIZERS[name]
    optimizers = [of_rows(network.tables, lr=0.01), of_others(list(network.parameters()), lr=0.01)]
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(TRAINED, generator=order).split(BATCH):
            mine = batch[runtime.rank :: runtime.world_size]
            loss = nn.functional.binary_cross_entropy_with_logits(network(samples[mine]), labels[mine])
            loss.backward()
            for parameter in network.parameters():  # rows are summed where they live; the rest is averaged here
                runtime.ranks.all_reduce(parameter.grad)
                parameter.grad /= runtime.world_size
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    with torch.no_grad():
        return float(((network(samples[TRAINED:]) > 0) == (labels[TRAINED:] > 0)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=100)
    options = parser.parse_args()
    runtime = et.init_distributed(device="cpu")
    torch.set_num_threads(1)
    if runtime.rank == 0:
        print(
            "| optimizer | mean | spread | least | most | published, one seed |\n| --- | --- | --- | --- | --- | --- |"
        )
    for name, published in PUBLISHED.items():
        found = [accuracy(name, seed, options.epochs, runtime) for seed in range(options.seeds)]
        if runtime.rank == 0:
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            print(
                f"| {name} | {statistics.mean(found):.3f} | {spread:.3f} | {min(found):.3f} | {max(found):.3f} "
                f"| {published:.3f} |",
                flush=True,
            )
    et.shut_down()


if __name__ == "__main__":
    main()
