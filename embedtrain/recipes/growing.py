"""New words, users or items for a trained run: another run that begins with all that the first one knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from embedtrain import storage
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.checkpoint.growth import grown_parts
from embedtrain.checkpoint.writer import Contents, write_checkpoint
from embedtrain.config.optimizer import OptimizerConfig
from embedtrain.config.resolved import differing_keys, set_value, to_yaml
from embedtrain.config.sections import Config
from embedtrain.config.values import settings_of
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.errors import UserError
from embedtrain.optim.stores import RowState
from embedtrain.recipes.base import Grow, Names
from embedtrain.recipes.loading import config_from_yaml
from embedtrain.recipes.optimizers import build_optimizer
from embedtrain.recipes.registry import recipe_of
from embedtrain.spec import TableSpec
from embedtrain.train.run_folder import CONFIG_NAME, RunFolder
from embedtrain.train.state import TrainState, read_run_state

_BASE = "base-"
"""Beginning of the name under which a grown run keeps the old names."""

_STEP = 0
"""A grown run has made no step of its own yet."""


@dataclass(frozen=True)
class GrownTable:
    """What became of a table.

    Attributes:
        name: of the table.
        num_kept: rows taken over.
        num_new: rows that came in.
    """

    name: str
    num_kept: int
    num_new: int


@dataclass(frozen=True)
class _Grown:
    """A vocabulary before and after.

    Attributes:
        old: names by row, in the checkpoint.
        new: names by row, in the grown run.
        tables: whose rows it names, in their new size.
    """

    old: Vocabulary
    new: Vocabulary
    tables: Sequence[TableSpec]


def grow_run(run_path: str, new_path: str, overrides: Sequence[str], runtime: Runtime) -> list[GrownTable]:
    """Makes a run that has the rows of another's newest checkpoint, and rows for what is new in other data.

    Rows and optimizer state are kept bit for bit under their words or raw ids; what is new begins as in a new run. All
    names stand in the order of their counts, old and new added up, so a word's row is another one than before. The new
    run begins at step 0 of its own epochs, with a checkpoint of that step; the first run is only read.

    Args:
        run_path: folder of a run whose model can grow and whose tables all have names.
        new_path: folder of the new run.
        overrides: `key=value` each, settings that replace those of the old run; `Grow.data_key` among them.
        runtime: of this process, which must be alone.

    Raises:
        UserError: the run cannot grow, a setting cannot change, or there is something at `new_path`.
        CheckpointError: the checkpoint is damaged, or does not hold what the configuration says.
    """
    if runtime.world_size != 1:
        raise UserError(f"expected one process, and this is one of {runtime.world_size}: run grow without torchrun")
    old_folder, folder = RunFolder(run_path), RunFolder(new_path)
    path = latest_checkpoint(old_folder.checkpoints_path)
    if path is None:
        raise UserError(f"no complete checkpoint yet in {run_path!r}; train until the first one is saved")
    if storage.list_files(folder.path) or storage.list_folders(folder.path):
        raise UserError(f"{new_path} is not empty: choose a new folder for the grown run")
    text = old_folder.read_config()
    if text is None:
        raise UserError(f"{old_folder.path} has no {CONFIG_NAME}: it is not the folder of a run")
    source = old_folder.join(CONFIG_NAME)
    grow = _grow_of(config_from_yaml(text, source), old_folder.path)
    _refuse_own_keys(grow, overrides)
    config = config_from_yaml(text, source, overrides)
    _refuse_changes(text, config)
    _grow_of(config, old_folder.path)
    config.run.path = folder.path
    try:
        with CheckpointReader(path) as reader:
            grown, facts = _prepare(grow, config, old_folder, folder, runtime)
            return _write(config, grown, facts, reader, old_folder)
    except BaseException:
        _discard(folder, grow.names)
        raise


def _write(
    config: Config,
    grown: Sequence[_Grown],
    facts: Mapping[str, Any],
    reader: CheckpointReader,
    old_folder: RunFolder,
) -> list[GrownTable]:
    """Writes the new run's configuration and its first checkpoint."""
    for each in grown:
        _check_rows(each, reader, old_folder.path)
    states = _states_of(config.optimizer, [spec for each in grown for spec in each.tables])
    old_ids = [torch.from_numpy(each.old.rows_of(each.new.words)) for each in grown]
    parts = [
        part
        for each, ids in zip(grown, old_ids, strict=True)
        for spec in each.tables
        for part in grown_parts(reader, spec, states[spec.name], ids, config.seed)
    ]
    folder = RunFolder(config.run.path)
    folder.write_config(to_yaml(config))
    state = _state(reader, config, facts, old_folder.path)
    contents = Contents(_STEP, parts, state, reader.replicated(), table_steps=reader.manifest.table_steps)
    write_checkpoint(folder.checkpoints_path, contents, ONE_PROCESS)
    return [
        GrownTable(spec.name, len(each.old), len(each.new) - len(each.old)) for each in grown for spec in each.tables
    ]


def _discard(folder: RunFolder, names: Sequence[Names]) -> None:
    """Removes what a failed attempt wrote, as far as that works: the user is told of the attempt's own error."""
    files = [each.file_name for each in names]
    for name in (*files, *(f"{_BASE}{name}" for name in files), CONFIG_NAME):
        with suppress(Exception):
            storage.remove(folder.join(name))
    with suppress(Exception):
        folder.keep_data({})
    for path in (folder.checkpoints_path, folder.path):
        with suppress(Exception):
            storage.remove_empty_folder(path)


def _grow_of(config: Config, run_path: str) -> Grow[Any, Any]:
    """Returns how a run grows.

    Raises:
        UserError: it cannot.
    """
    grow = recipe_of(config.model).grow
    if grow is None:
        raise UserError(f"{run_path} is a run of {config.model}, whose tables cannot grow")
    nameless = set(config.table_names()) - {table for names in grow.names for table in names.tables}
    if nameless:
        raise UserError(
            f"{run_path} cannot grow: new rows are for words, users and items alone, not for its tables "
            f"{', '.join(sorted(nameless))}"
        )
    return grow


def _refuse_own_keys(grow: Grow[Any, Any], overrides: Sequence[str]) -> None:
    if not any(override.startswith(f"{grow.data_key}=") for override in overrides):
        raise UserError(f"expected {grow.data_key}=PATH, the data with what is new")
    own_keys = ["run.path", *(key for each in grow.names for key in (each.base_key, each.init_key))]
    own = [override for override in overrides if override.partition("=")[0] in own_keys]
    if own:
        raise UserError(f"{', '.join(own)}: grow itself sets this for the new run; leave it out")


def _refuse_changes(old_yaml: str, config: Config) -> None:
    lasting = "model ", "table.", "optimizer.name ", "optimizer.tables"
    differing = [each for each in differing_keys(old_yaml, config) if each.startswith(lasting)]
    if differing:
        raise UserError(f"these settings cannot change when a run grows: {'; '.join(differing)}")


def _prepare(
    grow: Grow[Any, Any], config: Config, old_folder: RunFolder, folder: RunFolder, runtime: Runtime
) -> tuple[list[_Grown], Mapping[str, Any]]:
    """Prepares the new data, with the old names as the base of theirs, and writes the new names."""
    old = []
    for each in grow.names:
        words, kept = _keep_names(old_folder, folder, each.file_name)
        old.append(words)
        set_value(config, each.init_key, None)
        set_value(config, each.base_key, kept)
    data, _ = recipe_of(config.model).prepare(config, runtime)
    tables = grow.tables(config, data)
    grown = []
    for each, words, vocabulary in zip(grow.names, old, grow.vocabularies(data), strict=True):
        folder.write_vocabulary(vocabulary, each.file_name)
        grown.append(_Grown(words, vocabulary, [spec for spec in tables if spec.name in each.tables]))
    grow.write_files(data, folder)
    return grown, grow.facts(data)


def _keep_names(old_folder: RunFolder, folder: RunFolder, name: str) -> tuple[Vocabulary, str]:
    """Copies a file of names to the new run; returns the names and the path of the copy."""
    try:
        names = Vocabulary.load(old_folder.join(name))
    except FileNotFoundError as error:
        raise UserError(f"{old_folder.path} has no {name}, which says whose rows are whose") from error
    kept = f"{_BASE}{name}"
    folder.write_vocabulary(names, kept)
    return names, folder.join(kept)


def _check_rows(grown: _Grown, reader: CheckpointReader, run_path: str) -> None:
    state = read_run_state(reader.manifest, reader.path)
    for spec in grown.tables:
        known = state.row_names.get(spec.name, {}).get("fingerprint", grown.old.fingerprint)
        info = reader.tensors.get(f"{spec.name}/weight")
        if info is None or info.shape[0] != len(grown.old) or known != grown.old.fingerprint:
            raise UserError(
                f"{run_path}: its file of names is not the one that {reader.path} was trained with: bring back that of "
                f"table {spec.name!r}, or give the training command again, which writes it anew"
            )


def _states_of(section: OptimizerConfig, tables: Sequence[TableSpec]) -> dict[str, list[RowState]]:
    """Returns what the optimizer keeps for a row of each table: it says so itself, of tables of one row."""
    probe = EmbeddingCollection([replace(spec, num_rows=1) for spec in tables])
    build_optimizer(section, probe)
    return {
        name: [RowState(state, tensor.dim() > 1, float(tensor.flatten()[0])) for state, tensor in shard.state.items()]
        for name, shard in probe.shards.items()
    }


def _state(reader: CheckpointReader, config: Config, facts: Mapping[str, Any], run_path: str) -> dict[str, Any]:
    """Returns what the new checkpoint says beside its tensors."""
    saved = reader.state
    dense = {"dense_optimizer": saved["dense_optimizer"]} if "dense_optimizer" in saved else {}
    return {
        "config": settings_of(config),
        **facts,
        **dense,
        "init_from": saved.get("init_from", {}),
        "grown_from": {"path": run_path, "step": reader.step},
        "train": TrainState().as_json(),
        "metrics": {},
        "optimizer": {**saved["optimizer"], "num_skipped": 0},
    }
