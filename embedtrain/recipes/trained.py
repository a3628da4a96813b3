"""Opens and measures a trained run of any model from its folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from embedtrain.checkpoint.choice import Step, choose_checkpoint
from embedtrain.config.resolved import set_value, value_at
from embedtrain.config.sections import Config
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.export.vectors import Vectors, open_vectors
from embedtrain.recipes.building import build_parts
from embedtrain.recipes.loading import config_from_yaml
from embedtrain.recipes.registry import recipe_of
from embedtrain.train.checkpoints import load_weights
from embedtrain.train.run_folder import CONFIG_NAME, RunFolder


def read_config(run_path: str) -> Config | None:
    """Returns the configuration of the run in a folder, with `run.path` set to the folder; None if there is no run."""
    folder = RunFolder(run_path)
    text = folder.read_config()
    if text is None:
        return None
    config = config_from_yaml(text, folder.join(CONFIG_NAME))
    config.run.path = run_path
    return config


def require_config(run_path: str) -> Config:
    """Returns the configuration of the run in a folder, with `run.path` set to the folder.

    Raises:
        UserError: there is no run in the folder.
    """
    config = read_config(run_path)
    if config is None:
        raise UserError(f"no run folder at {run_path!r}; expected the run.path that a training wrote to")
    return config


def checkpoint_of(run_path: str, step: Step) -> str:
    """Returns the path of a checkpoint of a run, and logs its step; see `Step`.

    Raises:
        UserError: there is no such checkpoint.
    """
    folder = RunFolder(run_path)
    return choose_checkpoint(folder.checkpoints_path, step, folder.path)


def open_run_vectors(run_path: str, table: str | None, runtime: Runtime, step: Step = None) -> Vectors:
    """Opens the vectors of a run's checkpoint: rows of a table, or vectors that `Recipe.open` computes from rows.

    Args:
        run_path: the run folder, any fsspec URL.
        table: name of the table; None for the model's default table.
        runtime: runtime of this process.
        step: selects the checkpoint.

    Raises:
        UserError: there is no such checkpoint or table.
    """
    config = read_config(run_path)
    recipe = None if config is None else recipe_of(config.model)
    if recipe is None or recipe.open is None:
        return open_vectors(run_path, table, step)
    return recipe.open(config, runtime, checkpoint_of(run_path, step), table)


def require_held_out(config: Config) -> None:
    """Refuses to evaluate a run whose configuration names no held-out data.

    Raises:
        UserError: the configuration names no held-out data.
    """
    key = recipe_of(config.model).held_out
    if key is not None and value_at(config, key) is None and not config.holds_out:
        raise UserError(
            f"{config.run.path} was trained without {key}: there are no held-out data to measure on; "
            "if its rows are words, give --analogies FILE or --similarity FILE"
        )


def measure_run(
    config: Config, runtime: Runtime, step: Step = None, held_out: str | None = None
) -> Mapping[str, float]:
    """Returns the measures of a run's checkpoint, the same measures as during training.

    Collective: every rank.

    Args:
        config: configuration of the run.
        runtime: runtime of this process.
        step: selects the checkpoint.
        held_out: path of held-out data; None for the held-out data of the configuration.

    Raises:
        UserError: the run has no evaluation or no checkpoint, or its data have changed since training.
    """
    recipe = recipe_of(config.model)
    if held_out is not None and recipe.held_out is None:
        raise UserError(
            f"{config.run.path} is a run of {config.model}, which is not measured on data: leave --data out"
        )
    if held_out is None:
        require_held_out(config)
    path = checkpoint_of(config.run.path, step)
    if recipe.measure is not None:
        measures: Mapping[str, float] = recipe.measure(config, runtime, path, held_out)
        return measures
    if held_out is not None:
        config = copy.deepcopy(config)
        set_value(config, str(recipe.held_out), held_out)
    parts = build_parts(config, runtime)
    evaluation = parts.task.evaluation
    if evaluation is None:
        raise UserError(f"{config.run.path} is a run of {config.model}, which has no evaluation")
    load_weights(path, parts.task.tables, parts.task.dense, parts.facts["data_fingerprint"])
    return evaluation.measure(lambda: None)


def measure_new_users(config: Config, runtime: Runtime, step: Step, path: str, fraction: float) -> Mapping[str, float]:
    """Returns the measures of a run's checkpoint on users who are not in the training data. Collective: every rank.

    Args:
        config: configuration of the run.
        runtime: runtime of this process.
        step: selects the checkpoint.
        path: files of users and their items.
        fraction: share of a user's items that the model gets; the others are to be found.

    Raises:
        UserError: the model does not support this, the files cannot be used, or they have no such user.
    """
    measure = recipe_of(config.model).measure_new_users
    if measure is None:
        raise UserError(f"{config.run.path} is a run of {config.model}, which has no users to fold in")
    measures: Mapping[str, float] = measure(config, runtime, checkpoint_of(config.run.path, step), path, fraction)
    return measures
