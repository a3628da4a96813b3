"""What to try next if something looks wrong in a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from embedtrain.report.curves import BUSIEST_RANK
from embedtrain.report.facts import RunFacts, TableFacts

_UNEVEN = 1.25
_FEW_RECORDS = 8
"""Losses from which on their course says something."""
_WORSE = 0.02
"""Share by which a held-out loss must be above its best to be told of."""
_MUCH_WORSE = 0.05
"""The same of ranks, such as recall, which are not as smooth."""
_FALLS = ("valid_log_loss",)
_RISES = ("similarity", "recall@", "ndcg@", "hit@", "mrr@")
"""Held-out measures that fall and that rise as a model gets better; names, or beginnings of names. The AUC is left
out: with few distinct predictions it jumps."""

_ANEW = (
    "Other settings than train.epochs make another run: give them with another run.path. With a larger train.epochs "
    "the same command goes on from here."
)


def advice(facts: RunFacts) -> list[str]:
    """Returns what to try next where something looks wrong; empty where nothing does."""
    settings = facts.settings
    overfit = list(_overfitting(facts))
    of_settings = [*_skipped(facts), *overfit, *_losses(facts, settings, is_overfit=bool(overfit))]
    of_settings += [line for table in facts.tables if (line := _untouched(table, facts)) is not None]
    return [*of_settings, *([_ANEW] if of_settings else []), *_ranks(facts)]


def _skipped(facts: RunFacts) -> Iterator[str]:
    if facts.num_skipped:
        yield (
            f"{facts.num_skipped:,} steps were left out because a gradient was not finite: lower optimizer.lr, "
            "or clip with optimizer.max_grad_norm."
        )


def _losses(facts: RunFacts, settings: Mapping[str, Any], *, is_overfit: bool) -> Iterator[str]:
    """Says what the training loss does, or that it was logged too seldom to tell."""
    _, losses = facts.curves.get("loss", ([], []))
    if 0 < len(losses) < _FEW_RECORDS:
        longer = "Lower log.every_steps." if is_overfit else "Raise train.epochs, or lower log.every_steps."
        yield (
            f"The run is short: {facts.step:,} steps with {len(losses)} records of the loss do not show whether it "
            f"falls. {longer}"
        )
    if len(losses) < _FEW_RECORDS:
        return
    quarter = len(losses) // 4
    first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
    if last > first:
        yield f"The loss rose, from {first:.4g} to {last:.4g}: lower optimizer.lr."
    elif last > (1 - _WORSE) * first and not is_overfit:
        start = (settings.get("optimizer") or {}).get("initial_accumulator_value")
        less = "" if not start else f", or lower optimizer.initial_accumulator_value, which is {start:g}"
        yield (
            f"The loss is flat, {first:.4g} in the first quarter and {last:.4g} in the last: raise train.epochs, raise "
            f"optimizer.lr{less}."
        )


def _overfitting(facts: RunFacts) -> Iterator[str]:
    """Says of held-out measures that get worse while the training loss falls; of the first that does."""
    _, losses = facts.curves.get("loss", ([], []))
    falls = len(losses) >= 2 and min(losses[-2:]) < losses[0]
    for name, (steps, values) in facts.curves.items():
        sign = 1 if name.startswith(_RISES) else -1 if name in _FALLS else 0
        if not falls or not sign or len(values) < 2:
            continue
        best = max(range(len(values)), key=lambda place: sign * values[place])
        behind = sign * (values[best] - values[-1])
        if behind > (_WORSE if sign < 0 else _MUCH_WORSE) * abs(values[best]):
            yield (
                f"The model learns the training data by heart: the loss falls, and {name} was best at step "
                f"{steps[best]:,}, {values[best]:.4g}, and is {values[-1]:.4g} now. Train for fewer epochs, raise "
                "optimizer.weight_decay or lower table.dim. checkpoint.keep_best=1 and "
                f"checkpoint.best_metric={name} keep the best, and train.early_stop.patience ends the training. Such "
                "settings make another run: give them with another run.path."
            )
            return


def _untouched(table: TableFacts, facts: RunFacts) -> str | None:
    """Says why many rows of a table were never trained."""
    num_rows = table.num_rows - table.has_shared_row
    if table.num_untouched is None or table.num_untouched <= num_rows / 10:
        return None
    share = f"{table.num_untouched / num_rows:.0%} of the rows of table {table.name} were never trained: "
    if facts.epochs < 1:
        done = f" ({facts.epochs:.2%} of an epoch)" if facts.epochs else ""
        return f"{share}the run has not come through its data yet{done}."
    if table.is_hashed:
        return f"{share}its values need fewer rows: lower their number, data.num_rows or that of the feature."
    return (
        f"{share}their names are not in the data, or were left out by chance. If they come of a base vocabulary, that "
        "is as it should be; else train on more data, or for more epochs."
    )


def _ranks(facts: RunFacts) -> Iterator[str]:
    _, busiest = facts.curves.get(BUSIEST_RANK, ([], []))
    if len(busiest) >= 4 and (typical := statistics.median(busiest)) > _UNEVEN:
        yield (
            f"The ranks are uneven: the busiest works {typical:.2f} times as long as they do on average, and the "
            "others wait. Look there for another program, fewer cores than ranks, or longer examples."
        )
