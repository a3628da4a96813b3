"""What a run folder holds, opened for reading: whichever model was trained in it."""

from __future__ import annotations

from embedtrain.config.sections import Config
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.export.vectors import FloatRows, Vectors, open_vectors
from embedtrain.recipes.loading import config_from_yaml
from embedtrain.recipes.retrieval.config import RetrievalConfig
from embedtrain.recipes.retrieval.model import ITEM
from embedtrain.recipes.retrieval.recipe import open_retrieval
from embedtrain.recipes.retrieval.recommendation import all_vectors
from embedtrain.train.run_folder import CONFIG_NAME, RunFolder


def read_config(run_path: str) -> Config | None:
    """Returns the configuration of the run in a folder, its path that of the folder; None where there is none."""
    folder = RunFolder(run_path)
    text = folder.read_config()
    if text is None:
        return None
    config = config_from_yaml(text, folder.join(CONFIG_NAME))
    config.run.path = run_path
    return config


def open_run_vectors(run_path: str, table: str | None, runtime: Runtime) -> Vectors:
    """Opens the vectors of a run's newest checkpoint, as they are compared with each other.

    Of retrieval these are what the towers make of ids and features, under the raw ids.

    Args:
        run_path: the run folder, any fsspec URL.
        table: as `embedtrain.export.open_vectors` takes it; for retrieval "item", which None stands for, or "user".
        runtime: of this process.

    Raises:
        UserError: there is nothing to open, or no such table.
    """
    config = read_config(run_path)
    if not isinstance(config, RetrievalConfig):
        return open_vectors(run_path, table)
    side = table or ITEM
    trained = open_retrieval(config, runtime)
    if side not in trained.model.sides:
        raise UserError(f"no table {side!r} in {run_path!r}; it has: {', '.join(trained.model.sides)}")
    names = trained.interactions.items if side == ITEM else trained.interactions.users
    rows: FloatRows = all_vectors(trained.model, side).numpy()
    return Vectors(
        side,
        trained.step,
        len(names),
        rows.shape[1],
        names.words,
        names.counts,
        read=lambda start, stop: rows[start:stop],
        noun=side,
    )
