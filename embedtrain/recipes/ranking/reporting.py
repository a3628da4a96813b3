"""Report sections of a ranking model: curves of its scores, and the importance of each column."""

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
"""Maximum number of held-out examples that are scored, evenly spread over the log."""
MAX_SHUFFLED = 10_000
"""Maximum number of examples on which columns are shuffled, so that it takes some seconds."""
MAX_PREDICTIONS = 300_000
"""Maximum number of predictions over all shuffled columns: logs with many columns use fewer examples."""
MAX_COLUMNS = 200
"""Maximum number of columns in the report."""

_SEED = 1
_AT_ONCE = 4096


def score_sections(model: Ranking, held_out: ClickLog, batches: ClickBatches) -> Iterator[Section]:
    """Yields curves of the scores of held-out examples, and the importance of each column. Collective: every rank.

    Args:
        model: the model.
        held_out: the held-out examples.
        batches: batches of these examples.
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
    """Returns between 1 and `at_most` steps, evenly spread."""
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
        "The nearer the curve is to the upper left corner, the better the scores rank the examples.",
    )
    calibration = Chart(
        "Calibration",
        [Line("model", predicted.tolist(), observed.tolist()), Line("ideal", ends, ends, True)],
        "mean predicted probability",
        "share of positives",
        "Each point is a tenth of the examples, in the order of scores. The model predicts too low above the dashed "
        "line, and too high below it.",
    )
    bars = Bars(
        "Lift",
        [f"{tenth}-{tenth + 10}%" for tenth in range(0, 100, 10)],
        lift.tolist(),
        "The share of positives in each tenth of the examples, by score, divided by the share in all examples.",
        "highest scores",
        "lift",
        ".2f",
    )
    which = "All" if len(labels) == num_examples else f"{len(labels):,} of the"
    note = f"{which} {num_examples:,} held-out examples, {labels.mean():.1%} of them positive."
    return Section("Scores of held-out examples", [roc, calibration, bars], note)


def _parts(batch: ClickBatch) -> list[ClickBatch]:
    """Returns the examples in parts of limited size; the number of parts is equal on every rank."""
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
    """Returns the importance of each column, and the rows that the examples use. Collective: every rank."""
    # A column that is both dense and categorical is shuffled as both.
    columns = list(dict.fromkeys([*held_out.dense_names, *held_out.feature_names]))
    shown = columns[:MAX_COLUMNS]
    before = _log_loss(model, batch)
    cost = {name: _log_loss(model, _shuffled(batch, held_out, name)) - before for name in shown}
    in_order = sorted(shown, key=lambda name: -cost[name])
    importance = Bars(
        "Importance of the columns",
        in_order,
        [cost[name] for name in in_order],
        f"The increase of the log loss, {before:.4f}, if the column's values are shuffled among the examples. "
        "Columns with the same information share their importance.",
        "column",
        "increase of the log loss",
    )
    rows = _occupancy(model, held_out, batch)
    occupancy = Table(
        "Rows that the examples use",
        ("column", "rows", "used", "share used", "without a row of their own", "hottest row"),
        rows,
        "The share of values without a row of their own (unknown or rare values) is known for columns with a "
        "vocabulary. The last column is the share of the most frequent row.",
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
    """Returns the batch with one column's values shuffled among the examples of this rank."""
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
