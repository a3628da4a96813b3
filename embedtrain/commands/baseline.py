"""`embedtrain baseline`: what popularity, item-kNN and EASE reach on the data of a configuration."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
import numpy as np

from embedtrain.commands.console import (
    EXIT_DONE,
    ConfigFile,
    command,
    require_config,
    settings_argument,
    split_names,
    tell,
)
from embedtrain.errors import UserError

if TYPE_CHECKING:
    from embedtrain.config.sections import Config
    from embedtrain.data.bags import Bags
    from embedtrain.data.interactions import Interactions
    from embedtrain.distributed.runtime import Runtime
    from embedtrain.recipes.baselines import Scores

_METHODS = ("popularity", "item-knn", "ease")
_logger = logging.getLogger(__name__)


@command(
    "embedtrain baseline retrieval data.path=train.txt evaluate.path=test.txt --run runs/x",
    "embedtrain baseline my.yaml --methods ease --regularization 100,300,1000",
    "embedtrain baseline runs/x",
)
@click.argument(
    "config",
    type=ConfigFile(),
    help="YAML file of a model of interactions, such as retrieval; or a run folder, whose run is added to the table.",
)
@settings_argument
@click.option(
    "--methods", metavar="A,B,...", help="Some of popularity, item-knn and ease; by default all that fit into memory."
)
@click.option("--neighbors", metavar="N,...", help="item-kNN: number of nearest items per item.  [default: 100]")
@click.option(
    "--shrink", metavar="X,...", help="item-kNN: lowers cosines of items with few common users.  [default: 10]"
)
@click.option(
    "--alpha", metavar="X,...", help="item-kNN: 0.5 is the cosine; larger values favour popular items.  [default: 0.5]"
)
@click.option("--regularization", metavar="X,...", help="EASE: L2 penalty of the weights.  [default: 250]")
@click.option(
    "--run", "runs", multiple=True, metavar="RUN", type=click.Path(), help="A trained run to add to the table."
)
def baseline(
    config: str,
    settings: Sequence[str],
    methods: str | None,
    neighbors: str | None,
    shrink: str | None,
    alpha: str | None,
    regularization: str | None,
    runs: Sequence[str],
) -> int:
    """Measures popularity, item-kNN and EASE on the same data."""
    from embedtrain.distributed.runtime import init_distributed, shut_down
    from embedtrain.recipes.loading import load_config

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("baselines are fitted by one process: give the command without torchrun")
    wanted = list(_METHODS) if methods is None else split_names(methods, "--methods", "method")
    if unknown := [name for name in wanted if name not in _METHODS]:
        raise UserError(f"--methods {', '.join(unknown)}: there are {', '.join(_METHODS)}")
    given = {
        "item-knn": {"neighbors": neighbors, "shrink": shrink, "alpha": alpha},
        "ease": {"regularization": regularization},
    }
    for method, options in given.items():
        for option, value in options.items():
            if value is not None and method not in wanted:
                raise UserError(f"--{option} is for --methods {method}, which is not asked for: leave it out")
    grids = {
        "popularity": Grid(),
        "item-knn": Grid(
            {
                "neighbors": _whole(neighbors or "100"),
                "shrink": _numbers("--shrink", shrink or "10", 0.0),
                "alpha": _numbers("--alpha", alpha or "0.5", 0.0, 1.0),
            }
        ),
        "ease": Grid({"regularization": _numbers("--regularization", regularization or "250", 1e-3)}),
    }
    path, overrides, runs = _with_runs(*require_config(config, settings), runs)
    loaded = load_config(path, overrides)
    others = [_config_of(path, loaded) for path in runs]
    runtime = init_distributed(device="cpu")
    data = Measured(loaded, runtime)
    for run in runs:
        data.refuse_other_data(run)
    if methods is None and (reason := data.refusal_of_ease()) is not None:
        _logger.warning(f"EASE is left out: {reason}")
        wanted.remove("ease")
    chosen = {name: data.choose(name, grids[name]) for name in wanted}
    columns = [(name, data.measure(name, point)) for name, point in chosen.items()]
    columns += [(run, _measures_of(each, runtime)) for run, each in zip(runs, others, strict=True)]
    tell(data.title, *(f"{name}: {_shown(point)}" for name, point in chosen.items() if point), *_table(columns))
    shut_down()
    return EXIT_DONE


@dataclass(frozen=True)
class Grid:
    """The options of a method, each with the values to choose among.

    Attributes:
        values: by option.
    """

    values: Mapping[str, Sequence[float]] | None = None

    def points(self) -> list[dict[str, float]]:
        """Returns every combination of values."""
        values = self.values or {}
        return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


class Measured:
    """The interactions of a configuration, on which baselines are fitted, and measured as its model would be.

    They are fitted on the training part, like a run of the configuration.

    Args:
        config: of a model of interactions.
        runtime: of this process.

    Attributes:
        title: what is measured.

    Raises:
        UserError: the model has no interactions, or nothing is held out of them.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        from embedtrain.config.interactions import InteractionsConfig
        from embedtrain.data.interactions import prepare_interactions
        from embedtrain.recipes.interactions import interaction_options, log_interactions

        data, evaluate = getattr(config, "data", None), getattr(config, "evaluate", None)
        if not isinstance(data, InteractionsConfig) or evaluate is None:
            raise UserError(f"model={config.model} does not learn from interactions, and has no such baselines")
        self._config, self._ks = config, list[int](evaluate.k)
        options = interaction_options(data, evaluate.path)
        self._interactions: Interactions = prepare_interactions(
            options, os.path.expanduser(data.cache_path), runtime.ranks
        )
        log_interactions(self._interactions, evaluate.path)
        self._has_test = config.holds_out or evaluate.path is not None
        if not self._has_test and not self._interactions.has_validation:
            raise UserError("nothing is held out to measure on: give evaluate.path, data.split or data.validation")
        part = "test" if self._has_test else "validation"
        self.title = f"{part} part of {self._num_users():,} users, measured as model={config.model}"

    def refuse_other_data(self, run_path: str) -> None:
        """Refuses a run that was trained on other data, or that could not be measured on a test part.

        Raises:
            UserError: there is no test part, or the files changed after the run was trained.
        """
        from embedtrain.recipes.interactions import kept_interactions
        from embedtrain.train.run_folder import CONFIG_NAME

        if not self._has_test:
            raise UserError(
                f"runs are measured on a test part, and {run_path} has none: give its configuration, "
                f"{run_path}/{CONFIG_NAME}, to measure the baselines on the validation part"
            )
        own = self._interactions
        with kept_interactions(run_path, lambda: own) as kept:
            if (kept.fingerprint, kept.held_out.fingerprint) != (own.fingerprint, own.held_out.fingerprint):
                raise UserError(
                    f"{run_path} was trained on other data: the files of data.path or evaluate.path changed"
                )

    def refusal_of_ease(self) -> str | None:
        """Returns why EASE does not fit; None if it does."""
        from embedtrain.planning.room import available_memory_bytes
        from embedtrain.planning.sizes import format_bytes
        from embedtrain.recipes.baselines import MAX_EASE_ITEMS, ease_bytes

        num_items = len(self._interactions.items)
        if num_items > MAX_EASE_ITEMS:
            return f"it takes a matrix of all pairs of {num_items:,} items, and at most {MAX_EASE_ITEMS:,} items fit"
        needed, available = ease_bytes(num_items), available_memory_bytes()
        if available is not None and needed > available:
            return (
                f"a matrix of all pairs of {num_items:,} items takes {format_bytes(needed)}, and "
                f"{format_bytes(available)} are available"
            )
        return None

    def choose(self, name: str, grid: Grid) -> dict[str, float]:
        """Returns the options of a method that do best on the validation part.

        Raises:
            UserError: there are several points and no validation part to choose by, or EASE does not fit.
        """
        if name == "ease" and (reason := self.refusal_of_ease()) is not None:
            raise UserError(f"--methods ease: {reason}")
        points = grid.points()
        if len(points) > 1 and not self._interactions.has_validation:
            raise UserError(
                f"{name} is given several values to choose among: give data.validation=auto, by which they are chosen, "
                "or one value each"
            )
        return points[0] if len(points) == 1 else max(points, key=lambda point: self._score_of(name, point))

    def measure(self, name: str, point: Mapping[str, float]) -> Mapping[str, float]:
        """Fits a method with these options and returns its measures."""
        return self._measured(self._fit(name, point), on_test=self._has_test)

    def _score_of(self, name: str, point: Mapping[str, float]) -> float:
        """Returns how a method does on the validation part."""
        value = self._measured(self._fit(name, point), on_test=False)[f"ndcg@{self._ks[0]}"]
        _logger.info(f"{name}, {_shown(point)}: ndcg@{self._ks[0]} {value:.4f} on the validation part")
        return value

    def _measured(self, scores: Scores, *, on_test: bool) -> Mapping[str, float]:
        """Returns the measures of lists as the recipe of the model measures its own."""
        from embedtrain.recipes.baselines import measure_scores
        from embedtrain.recipes.lists import measure_next

        num_items = len(self._interactions.items)
        before, held_out = self._known_before(on_test=on_test), self._held_out(on_test=on_test)
        if self._config.answers_from_histories:

            def measure(known: Bags | None, held_out: Bags) -> Mapping[str, float]:
                return measure_scores(scores, num_items, before, known, held_out, self._ks)

            return measure_next(measure, before, held_out)
        # A row of a user holds what the training part says of the user.
        return measure_scores(scores, num_items, self._interactions.known, before, held_out, self._ks)

    def _num_users(self) -> int:
        """Returns the number of measured users."""
        users = np.unique(self._held_out(on_test=self._has_test).rows())
        if self._config.answers_from_histories:
            users = users[self._known_before(on_test=self._has_test).lengths(users) > 0]
        return len(users)

    def _known_before(self, *, on_test: bool) -> Bags:
        return self._interactions.known_before_test if on_test else self._interactions.known

    def _held_out(self, *, on_test: bool) -> Bags:
        """Returns the items to find.

        For a model of users whose test part comes from a split, leaves out items that the user had before.
        """
        from embedtrain.recipes.interactions import test_of, validation_of

        if self._config.answers_from_histories:
            return self._interactions.held_out if on_test else self._interactions.validation
        if not on_test:
            return validation_of(self._interactions)
        return test_of(self._interactions, is_split=self._config.holds_out)

    def _fit(self, name: str, point: Mapping[str, float]) -> Scores:
        from embedtrain.recipes import baselines

        known, num_items = self._interactions.known, len(self._interactions.items)
        if name == "popularity":
            return baselines.popularity(known, num_items)
        if name == "item-knn":
            neighbors, shrink, alpha = int(point["neighbors"]), point["shrink"], point["alpha"]
            return baselines.item_knn(known, num_items, neighbors=neighbors, shrink=shrink, alpha=alpha)
        return baselines.ease(known, num_items, regularization=point["regularization"])


def _with_runs(path: str, overrides: list[str], runs: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Returns the configuration file, the settings, and the runs without repetitions.

    A run folder in place of the file stands for its configuration, and is the first run.
    """
    from embedtrain.recipes.loading import shipped_names
    from embedtrain.recipes.trained import require_config as config_of_run
    from embedtrain.train.run_folder import CONFIG_NAME, RunFolder

    if os.path.isdir(path) and path not in shipped_names():
        config_of_run(path)  # refuses a folder that is not a run
        runs, path = [path, *runs], RunFolder(path).join(CONFIG_NAME)
    places: dict[str, str] = {}
    for run in runs:
        places.setdefault(run if "://" in run else os.path.realpath(run), run.rstrip("/"))
    return path, overrides, list(places.values())


def _config_of(path: str, config: Config) -> Config:
    """Returns the configuration of a run, after making sure that it has the data of another."""
    from embedtrain.config.values import flatten, settings_of
    from embedtrain.recipes.trained import require_config as config_of_run

    found = config_of_run(path)
    if found.answers_from_histories != config.answers_from_histories:
        raise UserError(
            f"{path} is a run of model={found.model}, whose lists are measured otherwise than those of "
            f"model={config.model}: give its configuration, {path}/config.yaml"
        )
    first, second = (dict(flatten(settings_of(each))) for each in (found, config))

    def is_of_data(key: str) -> bool:
        return (key.startswith("data.") and key != "data.cache_path") or key in ("evaluate.path", "evaluate.k")

    differing = [
        f"{key} (is {first.get(key)} there, {second.get(key)} here)"
        for key in sorted(first.keys() | second.keys())
        if is_of_data(key) and first.get(key) != second.get(key)
    ]
    if differing:
        raise UserError(f"{path} is a run on other data: {'; '.join(differing)}")
    return found


def _measures_of(config: Config, runtime: Runtime) -> Mapping[str, float]:
    from embedtrain.recipes.trained import measure_run

    return measure_run(config, runtime)


def _shown(point: Mapping[str, float]) -> str:
    return ", ".join(f"{option} {value:g}" for option, value in point.items())


def _table(columns: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """Returns lines with a measure per row and a model per column."""
    names = list(dict.fromkeys(name for _, measures in columns for name in measures))
    table = [["", *(label for label, _ in columns)]]
    for name in names:
        table.append([name, *(f"{own[name]:.4f}" if name in own else "" for _, own in columns)])
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    return [
        "  ".join([f"{first:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in table
    ]


def _whole(text: str) -> list[float]:
    found = _numbers("--neighbors", text, 1.0)
    if wrong := [value for value in found if value != int(value)]:
        raise UserError(f"--neighbors: expected whole numbers, got {wrong[0]:g}")
    return found


def _numbers(option: str, text: str, least: float, most: float = 1e12) -> list[float]:
    read: Callable[[str], float] = float
    try:
        found = [read(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: expected a number or several with commas, got {text!r}") from None
    if wrong := [value for value in found if not least <= value <= most]:
        raise UserError(f"{option}: expected numbers from {least:g} to {most:g}, got {wrong[0]:g}")
    return found
