"""What the report says of a ranking model: curves of its scores, and what each column is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from embedtrain.data.click_batches import ClickBatch, ClickBatches
from embedtrain.data.click_log import ClickLog
from embedtrain.jagged import Jagged, places_of_runs
from embedtrain.metrics.figures import Bars, Chart, Line, Section, Table
from embedtrain.metrics.score_curves import calibration_bins, lift_by_tenth, roc_curve
from embedtrain.ops._backend.transfer import to_host
from embedtrain.recipes.ranking.model import Ranking

MAX_SCORED = 100_000
"""Held-out examples that are scored, evenly spread over the log."""
MAX_SHUFFLED = 10_000
"""Examples on which the columns are shuffled, for some seconds of work."""
MAX_PREDICTIONS = 300_000
"""Over all columns: logs with many columns are shuffled on fewer examples."""
MAX_COLUMNS = 200

_SEED = 1
_AT_ONCE = 4096


def score_sections(model: Ranking, held_out: ClickLog, batches: ClickBatches) -> Iterator[Section]:
    """Yields curves of the scores of held-out examples, and what each column is worth. Collective: every rank.

    Args:
        model: with its tables.
        held_out: the examples.
        batches: of these examples.
    """
    per_step = held_out.num_examples / batches.steps_per_epoch
    steps = _spread(batches.steps_per_epoch, int(MAX_SCORED / per_step))
    scored = _score(model, _joined([batches.batch(0, step) for step in steps]))
    if len(set(scored[1].tolist())) == 2:
        yield _curves(*scored, held_out.num_examples)
    num_columns = len(held_out.dense_names) + len(held_out.feature_names)
    at_most = min(MAX_SHUFFLED, max(1000, MAX_PREDICTIONS // (num_columns + 1)))
    steps = _spread(batches.steps_per_epoch, int(at_most / per_step))
    yield _columns(model, held_out, _joined([batches.batch(0, step) for step in steps]))


def _spread(num_steps: int, at_most: int) -> list[int]:
    """Returns at most so many steps, at least one, evenly spread."""
    steps: list[int] = np.linspace(0, num_steps - 1, min(num_steps, max(1, at_most))).round().astype(int).tolist()
    return steps


@torch.no_grad()
def _logits(model: Ranking, batch: ClickBatch) -> torch.Tensor:
    return to_host(model.predict(model.prepare(batch, is_ahead=False)).float())


def _score(model: Ranking, batch: ClickBatch) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Returns the logits and labels of all ranks. Collective: every rank."""
    own = [(_logits(model, part).numpy(), part.labels.numpy() > 0) for part in _parts(batch)]
    parts: list[tuple[Any, Any]] = [pair for of_rank in model.tables.ranks.all_gather(own) for pair in of_rank]
    logits, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    return logits, labels


def _curves(logits: NDArray[np.float32], labels: NDArray[np.bool_], num_examples: int) -> Section:
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    false_rate, true_rate = roc_curve(logits, labels)
    predicted, observed = calibration_bins(probabilities, labels)
    lift = lift_by_tenth(logits, labels)
    ends = [0.0, float(max(predicted[-1], observed.max()))]
    roc = Chart(
        "ROC curve",
        [Line("model", false_rate.tolist(), true_rate.tolist()), Line("chance", [0.0, 1.0], [0.0, 1.0], True)],
        "false positive rate",
        "true positive rate",
        "The nearer to the upper left corner, the better the order of the scores.",
    )
    calibration = Chart(
        "Calibration",
        [Line("model", predicted.tolist(), observed.tolist()), Line("as it should be", ends, ends, True)],
        "mean predicted probability",
        "share of positives",
        "Each point is a tenth of the examples in order of their scores. Above the dashed line the model predicts too "
        "little, below it too much.",
    )
    bars = Bars(
        "Lift",
        [f"{tenth}-{tenth + 10}%" for tenth in range(0, 100, 10)],
        lift.tolist(),
        "The share of positives among the examples with the best scores, over the share in all.",
        "best scored",
        "lift",
        ".2f",
    )
    which = "All" if len(labels) == num_examples else f"{len(labels):,} of the"
    note = f"{which} {num_examples:,} held-out examples, {labels.mean():.1%} of them positive."
    return Section("Scores of held-out examples", [roc, calibration, bars], note)


def _parts(batch: ClickBatch) -> list[ClickBatch]:
    """Returns the examples in parts that are quick to predict, as many on every rank."""
    return batch.split(-(-batch.num_global // _AT_ONCE) or 1)


def _joined(batches: Sequence[ClickBatch]) -> ClickBatch:
    features = {
        name: Jagged(
            torch.cat([batch.features[name].values for batch in batches]),
            torch.cat([batch.features[name].lengths for batch in batches]),
        )
        for name in batches[0].features
    }
    labels, dense = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("labels", "dense"))
    return ClickBatch(labels, dense, features, sum(batch.num_global for batch in batches))


def _columns(model: Ranking, held_out: ClickLog, batch: ClickBatch) -> Section:
    """Returns what shuffling each column costs, and which rows the examples use. Collective: every rank."""
    # A column may be read as a number and as a category: it is shuffled as both.
    columns = list(dict.fromkeys([*held_out.dense_names, *held_out.feature_names]))
    shown = columns[:MAX_COLUMNS]
    before = _log_loss(model, batch)
    cost = {name: _log_loss(model, _shuffled(batch, held_out, name)) - before for name in shown}
    in_order = sorted(shown, key=lambda name: -cost[name])
    importance = Bars(
        "Importance of the columns",
        in_order,
        [cost[name] for name in in_order],
        f"By how much the log loss, {before:.4f}, rises if the values of the column are shuffled among the examples. "
        "Columns that say the same share their importance.",
        "column",
        "rise of the log loss",
    )
    rows = _occupancy(model, held_out, batch)
    occupancy = Table(
        "Rows that the examples use",
        ("column", "rows", "used", "share used", "without a row of their own", "hottest row"),
        rows,
        "The share of values without a row of their own, unknown or rare, is told for columns with a vocabulary. "
        "The last column is the share of the most frequent row.",
    )
    left_out = f" The first {MAX_COLUMNS} of {len(columns):,} columns are shown." if len(columns) > MAX_COLUMNS else ""
    note = f"Measured on {batch.num_global:,} held-out examples.{left_out}"
    return Section("Columns", [importance, *([occupancy] if rows else [])], note)


def _log_loss(model: Ranking, batch: ClickBatch) -> float:
    """Returns the mean log loss over all ranks. Collective: every rank."""
    total = torch.zeros((), dtype=torch.float64)
    for part in _parts(batch):
        logits, labels = _logits(model, part).double(), part.labels.double()
        total += F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    return float(model.tables.ranks.all_reduce(total)) / max(batch.num_global, 1)


def _shuffled(batch: ClickBatch, held_out: ClickLog, name: str) -> ClickBatch:
    """Returns a batch in which one column's values are those of other examples of this rank."""
    order = torch.from_numpy(np.random.default_rng(_SEED).permutation(batch.num_examples))
    if name in held_out.dense_names:
        column = list(held_out.dense_names).index(name)
        dense = batch.dense.clone()
        dense[:, column] = dense[order, column]
        batch = replace(batch, dense=dense)
    if name in batch.features:
        bags = batch.features[name]
        firsts = bags.lengths.cumsum(0) - bags.lengths
        values = bags.values[places_of_runs(firsts[order], bags.lengths[order])]
        batch = replace(batch, features={**batch.features, name: Jagged(values, bags.lengths[order])})
    return batch


def _occupancy(model: Ranking, held_out: ClickLog, batch: ClickBatch) -> list[tuple[str | float | int | None, ...]]:
    found: list[tuple[str | float | int | None, ...]] = []
    for name in held_out.feature_names[:MAX_COLUMNS]:
        rows = np.concatenate(model.tables.ranks.all_gather(batch.features[name].values.numpy()))
        distinct, counts = np.unique(rows, return_counts=True)
        has_shared_row = held_out.vocabulary(name) is not None
        unknown = f"{(rows == 0).mean():.1%}" if has_shared_row and len(rows) else None
        used = f"{len(distinct) / held_out.num_rows[name]:.1%}"
        hottest = f"{counts.max() / len(rows):.1%}" if len(rows) else None
        found.append((name, held_out.num_rows[name], len(distinct), used, unknown, hottest))
    return found
