"""What helps against Adagrad's ever-shrinking step: measured on a world that changes, and at a start.

An accumulator only grows, so a row's step only shrinks. Where the world stands still that is what makes Adagrad
converge; where it changes, rows that were trained long hardly move any more. Linear regression over sparse features,
one pass over a stream whose true weights are drawn anew half-way; the error is of each example before it is trained on.

    python docs/examples/shrinking_steps.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import embedtrain as et

FEATURES, ACTIVE, BATCH, DIM = 2000, 10, 32, 1


class Stream:
    """Batches of sparse examples: ids [BATCH, ACTIVE], low ones more often, and targets with a little noise."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._generator = torch.Generator().manual_seed(0)
        self._rules = torch.randn(2, FEATURES, generator=self._generator)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rule = self._rules[0 if step < self._steps // 2 else 1]
        ids = (torch.rand(BATCH, ACTIVE, generator=self._generator) ** 2 * FEATURES).long()
        return ids, rule[ids].sum(dim=1) + 0.1 * torch.randn(BATCH, generator=self._generator)


class Regression:
    """A weight a feature, and the squared error of their sum."""

    def __init__(self, **options) -> None:
        self.tables = et.EmbeddingCollection(
            [et.TableSpec("weights", FEATURES, DIM, init="zeros")], [et.FeatureSpec("weights", pooling="sum")]
        )
        self.optimizer = et.optim.RowwiseAdagrad(self.tables, **{"lr": 0.5, **options})

    def train(self, ids: Tensor, targets: Tensor, *, moves: bool = True) -> float:
        """Returns the error before the step; without `moves` only accumulators learn, at rate 0."""
        bags = et.Jagged(ids.flatten(), torch.full((len(ids),), ACTIVE))
        loss = (self.tables({"weights": bags})["weights"].squeeze(1) - targets).square().mean()
        loss.backward()
        for settings in self.optimizer.param_groups:
            rate, settings["lr"] = settings["lr"], settings["lr"] if moves else 0.0
            self.optimizer.step()
            settings["lr"] = rate
        self.optimizer.zero_grad()
        return loss.item()


def plain(steps: int) -> list[float]:
    return run(Regression(), steps)


def decay(steps: int) -> list[float]:
    """The accumulator forgets; its average is smaller than a sum, and so is the rate that goes with it."""
    return run(Regression(accumulator_decay=0.99, lr=0.05), steps)


def restart(steps: int) -> list[float]:
    """The accumulators begin anew where the world does: `optimizer.reset_state_from_step` in a configuration."""
    model = Regression()
    return run(model, steps, before={steps // 2: model.optimizer.reset_state})


def warm_start(steps: int) -> list[float]:
    """Every accumulator begins at a value as of many steps, so that the first steps are not the largest."""
    return run(Regression(initial_accumulator_value=0.1), steps)


def warmed_by_data(steps: int) -> list[float]:
    """A twentieth of the steps at rate 0: accumulators learn the size of each row's gradient before a row moves."""
    model, stream = Regression(), Stream(steps)
    for step in range(steps // 20):
        model.train(*stream.batch(step), moves=False)
    return run(model, steps)


def run(model: Regression, steps: int, before: dict[int, Callable[[], None]] | None = None) -> list[float]:
    stream = Stream(steps)
    errors = []
    for step in range(steps):
        (before or {}).get(step, lambda: None)()
        errors.append(model.train(*stream.batch(step)))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print("mean squared error, before training, of the examples of these steps\n")
    tenth, half = steps // 10, steps // 2
    spans = {"first tenth": (0, tenth), "last tenth of the old world": (half - tenth, half)}
    spans |= {"first tenth of the new": (half, half + tenth), "last tenth": (steps - tenth, steps)}
    print(f"| accumulator | {' | '.join(spans)} |\n| --- | {' | '.join('---' for _ in spans)} |")
    for kind in (plain, decay, restart, warm_start, warmed_by_data):
        errors = kind(steps)
        means = [sum(errors[start:stop]) / (stop - start) for start, stop in spans.values()]
        print(f"| {kind.__name__.replace('_', ' ')} | {' | '.join(f'{mean:.3f}' for mean in means)} |", flush=True)


if __name__ == "__main__":
    main()
