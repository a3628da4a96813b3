"""`embedtrain compare`: trains with several optimizers and learning rates; writes a table and a plot."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from embedtrain import storage
from embedtrain.commands.console import ConfigFile, command, is_debugged, require_config, settings_argument, tell
from embedtrain.errors import UserError

if TYPE_CHECKING:
    from embedtrain.config.sections import Config

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Without --rates, the optimizer's learning rate (configured or default) is multiplied by each of these."""

TABLE_NAME, CSV_NAME, PLOT_NAME = "comparison.md", "comparison.csv", "comparison.png"

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colour-blind safe. Source: Okabe and Ito 2008, "Color universal design"."""
_UNITS = {"loss": "loss (mean of a prediction)", "similarity": "similarity (Spearman correlation)"}
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))


@command(
    "embedtrain compare ranking data.path=train.csv --optimizers adam,rowwise_adagrad",
)
@click.argument("config", type=ConfigFile(), help="YAML file that all runs share.")
@settings_argument
@click.option("--optimizers", required=True, metavar="A,B,...", help="Names of optimizers, as optimizer.name has them.")
@click.option(
    "--rates",
    multiple=True,
    metavar="NAME=RATE,RATE",
    help="Learning rates to try; by default the optimizer's rate times 0.1, 0.3, 1, 3 and 10. The best is chosen by "
    "checkpoint.best_metric at the end.",
)
@click.option(
    "--output",
    default="runs/compare",
    show_default=True,
    metavar="PATH",
    type=click.Path(file_okay=False),
    help="Folder.",
)
def compare(config: str, settings: Sequence[str], optimizers: str, rates: Sequence[str], output: str) -> int:
    """Trains with several optimizers and draws how they learn."""
    names = [name for name in optimizers.split(",") if name]
    comparison = Comparison(*require_config(config, settings), names, parse_rates(rates), output)
    from embedtrain.commands.job import train_each

    return train_each(
        comparison.configs,
        is_debugged=is_debugged(),
        may_diverge=True,
        finish=lambda: tell(*comparison.finish().split("\n")),
    )


@dataclass(frozen=True)
class Curve:
    """Holds the metrics that one run logged.

    Attributes:
        optimizer: name of the optimizer.
        lr: learning rate.
        records: the records of metrics.jsonl, in order.
    """

    optimizer: str
    lr: float
    records: Sequence[Mapping[str, Any]]

    def points(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """Returns the values of two metrics in the records that have both."""
        found = [(r[x], r[y]) for r in self.records if r.get(x) is not None and r.get(y) is not None]
        return [a for a, _ in found], [b for _, b in found]

    def last(self, name: str) -> float | None:
        """Returns the last value of a metric; None if it was never logged."""
        values = self.points("step", name)[1]
        return values[-1] if values else None


class Comparison:
    """Prepares the runs to compare, and summarises their results.

    Args:
        config_path: the configuration that all runs share.
        overrides: `key=value` settings of all runs.
        names: names of the optimizers.
        rates: learning rates to try, by optimizer; other optimizers use `FACTORS`.
        folder: folder of runs and results, any fsspec URL; the same command resumes the runs in it.

    Attributes:
        configs: configurations of the runs, in training order.

    Raises:
        UserError: a name or a setting is invalid, or matplotlib is not installed.
    """

    def __init__(
        self,
        config_path: str | None,
        overrides: Sequence[str],
        names: Sequence[str],
        rates: Mapping[str, Sequence[float]],
        folder: str,
    ) -> None:
        _check(overrides, names, rates)
        self._folder = folder.rstrip("/")
        from embedtrain.checkpoint.retention import mode_of_best
        from embedtrain.recipes.loading import load_config

        self.configs: list[Config] = []
        for name in names:
            chosen = [*overrides, f"optimizer.name={name}"]
            base = load_config(config_path, chosen).optimizer.lr
            for lr in sorted(rates.get(name, [float(f"{base * factor:.6g}") for factor in FACTORS])):
                path = f"{self._folder}/{name}-lr-{lr:g}"
                self.configs.append(load_config(config_path, [*chosen, f"optimizer.lr={lr}", f"run.path={path}"]))
        if self.configs[0].publish.to is not None:
            raise UserError(
                "compare trains many runs, so publish.to cannot be set: leave it out, and publish the best run"
            )
        if self.configs[0].reads_standard_input:
            raise UserError(
                "compare reads the data once per run, but data.path=- can be read only once: write it to a file"
            )
        first = self.configs[0].checkpoint
        self._measure = first.best_metric
        self._is_largest_best = mode_of_best(first.best_metric, first.best_mode) == "max"

    def finish(self) -> str:
        """Writes table, CSV and plot from the finished runs; returns the table."""
        curves = [_read(config) for config in self.configs]
        best = self._best(curves)
        table = self._table(curves, best)
        storage.make_folder(self._folder)
        drawing = {TABLE_NAME: table.encode(), CSV_NAME: self._csv(curves, best), PLOT_NAME: self._plot(best)}
        for name, content in drawing.items():
            path = f"{self._folder}/{name}"
            storage.replace(path, content, f"{path}.tmp")
        return f"{table}\n{', '.join(drawing)} are in {self._folder}"

    def _best(self, curves: Sequence[Curve]) -> list[Curve]:
        """Returns the curve of each optimizer's best rate, by the last value of the measure."""
        best: dict[str, tuple[float, Curve]] = {}
        end = max((curve.points("step", self._measure)[0] or [0])[-1] for curve in curves)
        for curve in curves:
            value = curve.last(self._measure)
            if value is None or curve.points("step", self._measure)[0][-1] < end:
                continue  # The run diverged: the rate is too large.
            score = value if self._is_largest_best else -value
            if curve.optimizer not in best or score > best[curve.optimizer][0]:
                best[curve.optimizer] = (score, curve)
        if not best:
            raise UserError(
                f"no run has logged checkpoint.best_metric={self._measure}, by which the best rate is chosen"
            )
        return [curve for _, curve in best.values()]

    def _table(self, curves: Sequence[Curve], best: Sequence[Curve]) -> str:
        measures = list(dict.fromkeys(["loss", self._measure]))
        lines = [f"| optimizer | rates tried | best | {' | '.join(measures)} | training seconds |"]
        lines.append("| --- " * (4 + len(measures)) + "|")
        for curve in best:
            tried = [other.lr for other in curves if other.optimizer == curve.optimizer]
            is_at_edge = len(tried) > 1 and curve.lr in (tried[0], tried[-1])
            chosen = f"{curve.lr:g}{' (at the edge of its grid)' if is_at_edge else ''}"
            values = [curve.last(name) for name in [*measures, "seconds"]]
            cells = ["" if value is None else f"{value:.4g}" for value in values]
            lines.append(
                f"| {curve.optimizer} | {', '.join(f'{lr:g}' for lr in tried)} | {chosen} | {' | '.join(cells)} |"
            )
        return "\n".join(lines) + "\n"

    def _csv(self, curves: Sequence[Curve], best: Sequence[Curve]) -> bytes:
        text = io.StringIO()
        columns = list(dict.fromkeys(["step", "epoch", "seconds", "loss", self._measure]))
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["optimizer", "lr", "is_best", *columns])
        for curve in curves:
            for record in curve.records:
                values = [record.get(name) for name in columns]
                writer.writerow([curve.optimizer, curve.lr, int(curve in best), *values])
        return text.getvalue().encode()

    def _plot(self, best: Sequence[Curve]) -> bytes:
        from matplotlib.backends.backend_agg import (
            FigureCanvasAgg,
        )  # Unlike pyplot, this needs no display and has no global state.
        from matplotlib.figure import Figure
        from PIL import Image  # A dependency of matplotlib.

        measures = list(dict.fromkeys(["loss", self._measure]))
        figure = Figure(figsize=(10, 0.8 + 3.4 * len(measures)), layout="constrained")
        axes = figure.subplots(len(measures), 2, sharey="row", squeeze=False)
        figure.suptitle(f"{self.configs[0].model}: each optimizer at its best rate by {self._measure}")
        titles = {"step": "steps", "seconds": "training time (seconds)"}
        for row, measure in zip(axes, measures, strict=True):
            for axis, (x, title) in zip(row, titles.items(), strict=True):
                for number, curve in enumerate(best):
                    look = {"color": _COLORS[number % len(_COLORS)], "linestyle": _STYLES[number % len(_STYLES)]}
                    # Curves of few points, such as one per epoch, get markers.
                    marker = "o" if len(curve.points(x, measure)[0]) <= 20 else None
                    axis.plot(
                        *curve.points(x, measure), label=f"{curve.optimizer}, rate {curve.lr:g}", marker=marker, **look
                    )
                axis.set_title(f"{measure} by {'step' if x == 'step' else 'training time'}")
                axis.set_xlabel(title)
                axis.set_ylabel(_UNITS.get(measure, measure))
                axis.set_ylim(*_span([curve.points("step", measure) for curve in best]))
                axis.grid(visible=True, alpha=0.3)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(best)))
        image = io.BytesIO()
        canvas: Any = FigureCanvasAgg(figure)  # not annotated
        canvas.draw()
        # A palette of 64 colours suffices and quarters the size.
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64).save(image, "png", optimize=True)
        return image.getvalue()


def _span(curves: Sequence[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """Returns the limits of an axis, ignoring the first tenth of the steps, whose values may be far off."""
    last = max((step for steps, _ in curves for step in steps), default=0.0)
    shown = [value for steps, values in curves for step, value in zip(steps, values, strict=True) if step > last / 10]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def parse_rates(declared: Sequence[str]) -> dict[str, list[float]]:
    """Returns learning rates by optimizer from "adam=0.001,0.01" each.

    Raises:
        UserError: a text is not of this form, or an optimizer or a rate is named twice.
    """
    rates: dict[str, list[float]] = {}
    for text in declared:
        name, _, values = text.partition("=")
        if name in rates:
            raise UserError(f"--rates {name}=... is given twice: give all its rates in one list")
        try:
            rates[name] = [float(value) for value in values.split(",")]
        except ValueError as error:
            raise UserError(f"expected --rates NAME=RATE,RATE such as adam=0.001,0.01, got {text!r}") from error
        if len(set(rates[name])) < len(rates[name]):
            raise UserError(f"--rates {text} contains a rate twice")
    return rates


def _check(overrides: Sequence[str], names: Sequence[str], rates: Mapping[str, Sequence[float]]) -> None:
    from embedtrain.config.optimizer import OPTIMIZERS

    if not names:
        raise UserError("--optimizers must name at least one optimizer")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"--optimizers names {', '.join(twice)} twice")
    unknown = [name for name in [*names, *rates] if name not in OPTIMIZERS]
    if unknown:
        raise UserError(f"there is no optimizer {', '.join(unknown)}; there are {', '.join(OPTIMIZERS)}")
    if unused := [name for name in rates if name not in names]:
        raise UserError(f"--rates gives rates of {', '.join(unused)}, which --optimizers does not name")
    for key in ("run.path", "optimizer.name", "optimizer.lr"):
        if any(override.startswith(f"{key}=") for override in overrides):
            raise UserError(f"compare sets {key} of each run itself: use --output, --optimizers and --rates instead")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("compare draws a plot and needs matplotlib: pip install 'embedtrain[plots]'") from error


def _read(config: Config) -> Curve:
    from embedtrain.train.run_folder import RunFolder

    # There are no records if the run diverged before the first one.
    return Curve(config.optimizer.name, config.optimizer.lr, list(RunFolder(config.run.path).read_metrics()))
