"""Opens a trained run to score rows of any files, or to package its model."""

from __future__ import annotations

from collections.abc import Sequence

from embedtrain.checkpoint.choice import Step
from embedtrain.config.resolved import value_at
from embedtrain.config.sections import Config
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.recipes.base import RowScorer
from embedtrain.recipes.loading import config_from_yaml
from embedtrain.recipes.registry import recipe_of
from embedtrain.recipes.trained import checkpoint_of, require_config
from embedtrain.serve.package import TableDtype, write_package
from embedtrain.serve.scoring import ScoreOptions
from embedtrain.train.run_folder import CONFIG_NAME, RunFolder

FILE_SETTINGS = (
    "data.format",
    "data.columns",
    "data.delimiter",
    "data.quote",
    "data.label",
    "data.positive",
    "data.max_bad_lines",
)
"""Settings that say how files are read."""

_SETTINGS = (*FILE_SETTINGS, "run.device", "run.timeout_seconds", "table.placement", "table.cache_bytes")


def config_for_files(run_path: str, overrides: Sequence[str]) -> Config:
    """Returns the configuration of a run that scores rows, with overrides for other files.

    Args:
        run_path: the run folder.
        overrides: `key=value` settings of how files are read or where the model runs.

    Raises:
        UserError: there is no such run, its model does not score rows, or a setting may not be overridden.
    """
    for override in overrides:
        if override.partition("=")[0] not in _SETTINGS:
            raise UserError(
                f"cannot set {override!r} for a trained run; the settings that can be set are {', '.join(_SETTINGS)}"
            )
    folder = RunFolder(run_path)
    text = folder.read_config()
    if text is None:
        raise UserError(f"{run_path!r} is not a run folder: give the run.path of a training")
    config = config_from_yaml(text, folder.join(CONFIG_NAME), overrides)
    config.run.path = run_path
    if recipe_of(config.model).score is None:
        raise UserError(f"{run_path!r} is a run of {config.model}, which cannot score rows of files")
    return config


def open_scorer(config: Config, runtime: Runtime, step: Step = None) -> RowScorer:
    """Opens a checkpoint of a run for scoring.

    Collective: every rank.


    Raises:
        UserError: there is no checkpoint, or the run folder lacks the vocabulary of a table.
    """
    path = checkpoint_of(config.run.path, step)
    score = recipe_of(config.model).score
    assert score is not None, "the configuration was made for files"
    return score(config, runtime, path)


def score_options(
    config: Config, data: str, overrides: Sequence[str], *, keep: Sequence[str] = (), has_label: bool = False
) -> ScoreOptions:
    """Returns the options for `score_rows`.

    Args:
        config: result of `config_for_files`.
        data: path of the files, or "-" for standard input.
        overrides: the overrides given to `config_for_files`.
        keep: columns of the files to copy to the output.
        has_label: whether to read the label.
    """
    is_given = any(override.startswith("data.format=") for override in overrides)
    return ScoreOptions(data, keep, has_label, value_at(config, "data.max_bad_lines"), is_given)


def pack_run(
    run_path: str,
    step: Step,
    output: str,
    runtime: Runtime,
    *,
    dtype: TableDtype,
    has_onnx: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes the model of a run as a package; see `write_package`.

    Raises:
        UserError: there is no such run or checkpoint, its model cannot be packaged, there are several processes, or
            the output cannot be written.
    """
    config = require_config(run_path)
    pack = recipe_of(config.model).pack
    if pack is None:
        raise UserError(f"{run_path!r} is a run of {config.model}, which cannot be packaged")
    if runtime.world_size != 1:
        raise UserError(
            f"a package is written by one process, but torchrun started {runtime.world_size}: run without torchrun"
        )
    with pack(config, runtime, checkpoint_of(run_path, step)) as packed:
        write_package(packed, output, dtype=dtype, has_onnx=has_onnx, overwrite=overwrite)
