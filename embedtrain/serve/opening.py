"""Opens a trained run to score rows of files that its data say nothing of."""

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
"""The settings that say how files are read."""

_SETTINGS = (*FILE_SETTINGS, "run.device", "run.timeout_seconds", "table.placement", "table.cache_bytes")


def config_for_files(run_path: str, overrides: Sequence[str]) -> Config:
    """Returns the configuration of a run whose model scores rows, for files that settings describe.

    Args:
        run_path: the run folder.
        overrides: `key=value` each; they say how the files are read, or where the model runs.

    Raises:
        UserError: there is no such run, its model does not score rows, or a setting would change the model.
    """
    for override in overrides:
        if override.partition("=")[0] not in _SETTINGS:
            raise UserError(f"{override!r} cannot be set for a trained run; what can be is {', '.join(_SETTINGS)}")
    folder = RunFolder(run_path)
    text = folder.read_config()
    if text is None:
        raise UserError(f"no run folder at {run_path!r}; expected the run.path that a training wrote to")
    config = config_from_yaml(text, folder.join(CONFIG_NAME), overrides)
    config.run.path = run_path
    if recipe_of(config.model).score is None:
        raise UserError(f"{run_path!r} is a run of {config.model}, which does not score rows of files")
    return config


def open_scorer(config: Config, runtime: Runtime, step: Step = None) -> RowScorer:
    """Opens a checkpoint of a run. Collective: every rank.

    Raises:
        UserError: there is no checkpoint, or the run folder lacks what the rows of a table stand for.
    """
    path = checkpoint_of(config.run.path, step)
    score = recipe_of(config.model).score
    assert score is not None, "the configuration was made for files"
    return score(config, runtime, path)


def score_options(
    config: Config, data: str, overrides: Sequence[str], *, keep: Sequence[str] = (), has_label: bool = False
) -> ScoreOptions:
    """Returns what to score.

    Args:
        config: what `config_for_files` returned.
        data: path of the files, or "-".
        overrides: as there.
        keep: columns of the files that are handed on.
        has_label: whether the label is read too.
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
    """Writes the model of a run as a package; `write_package` says more.

    Raises:
        UserError: there is no such run or checkpoint, its model cannot be packed, there are several processes, or the
            output cannot be written.
    """
    config = require_config(run_path)
    pack = recipe_of(config.model).pack
    if pack is None:
        raise UserError(f"{run_path!r} is a run of {config.model}, which cannot be packed")
    if runtime.world_size != 1:
        raise UserError(f"expected one process, and this is one of {runtime.world_size}: write it without torchrun")
    with pack(config, runtime, checkpoint_of(run_path, step)) as packed:
        write_package(packed, output, dtype=dtype, has_onnx=has_onnx, overwrite=overwrite)
