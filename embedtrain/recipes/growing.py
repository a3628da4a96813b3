"""Starts runs from the tables, optimizer state and dense part of another run, with rows for new names in the data."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedtrain import storage
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.checkpoint.growth import grown_parts
from embedtrain.checkpoint.manifest import MANIFEST_NAME
from embedtrain.checkpoint.parts import TensorPart
from embedtrain.checkpoint.writer import Contents, write_checkpoint
from embedtrain.config.optimizer import OptimizerConfig
from embedtrain.config.resolved import differing_keys, to_yaml
from embedtrain.config.sections import Config
from embedtrain.config.values import flatten, settings_of
from embedtrain.data.partition import share_of_rank
from embedtrain.data.row_names import FEATURES_NAME, RowNames, read_row_names, rows_among
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.errors import UserError, counted
from embedtrain.optim.stores import RowState
from embedtrain.recipes.base import BASE, Grow, base_file
from embedtrain.recipes.loading import config_from_yaml
from embedtrain.recipes.optimizers import build_optimizer
from embedtrain.recipes.registry import recipe_of
from embedtrain.recipes.trained import checkpoint_of
from embedtrain.recipes.workload import Sizes
from embedtrain.spec import TableSpec
from embedtrain.train.kept_data import KEPT_DATA_NAME
from embedtrain.train.lock import OWNER
from embedtrain.train.run_folder import CHECKPOINTS_NAME, CONFIG_NAME, TENSORBOARD_NAME, RunFolder
from embedtrain.train.state import TrainState, read_run_state

_logger = logging.getLogger(__name__)

_STEP = 0
"""Step of the first checkpoint of a run that starts from another."""

_LASTING = ("model ", "table.dim ", "table.dtype ", "optimizer.name ", "optimizer.tables", "dense_optimizer.name ")
"""Prefixes of the settings that determine the tensors of a checkpoint."""

_OWN = ("init_from", "base_vocabulary")
"""Last parts of the keys that give rows names or values, which a run that starts from another cannot have."""


@dataclass(frozen=True)
class GrownTable:
    """Holds the row counts of a table in the new run.

    Attributes:
        name: name of the table.
        num_kept: number of rows from the other run.
        num_new: number of new rows.
    """

    name: str
    num_kept: int
    num_new: int


@dataclass(frozen=True)
class Begun:
    """Holds the result of `begin_from`.

    Attributes:
        tables: row counts of each table.
        prepared: result of `Recipe.prepare` for the run.
    """

    tables: list[GrownTable]
    prepared: tuple[Any, Sizes]


def grow_run(run_path: str, new_path: str, overrides: Sequence[str], runtime: Runtime) -> list[GrownTable]:
    """Creates a run that starts from another, with rows for new names in other data; see `begin_from`.

    Args:
        run_path: folder of a run whose model can grow and whose rows all have names.
        new_path: folder of the new run.
        overrides: settings `key=value` that replace those of the old run; they must include `Grow.data_key`.
        runtime: runtime of this process, which must be the only one.

    Raises:
        UserError: the run cannot grow, a setting cannot change, or `new_path` is not empty.
        CheckpointError: the checkpoint is damaged, or does not fit its configuration.
    """
    if runtime.world_size != 1:
        raise UserError(f"grow runs in one process, got {runtime.world_size} processes: run it without torchrun")
    old_folder, folder = RunFolder(run_path), RunFolder(new_path)
    if latest_checkpoint(old_folder.checkpoints_path) is None:
        raise UserError(f"no complete checkpoint yet in {run_path!r}; train until the first one is saved")
    if storage.list_files(folder.path) or storage.list_folders(folder.path):
        raise UserError(f"{new_path} is not empty: choose a new folder for the grown run")
    text = old_folder.read_config()
    if text is None:
        raise UserError(f"{old_folder.path} has no {CONFIG_NAME}: it is not the folder of a run")
    source = old_folder.join(CONFIG_NAME)
    old_config = config_from_yaml(text, source)
    _refuse_own_keys(_grow_of(old_config, old_folder.path), overrides)
    own = [f"{key}=null" for key in _own_keys(old_config)]
    start = [f"start_from={old_folder.path}", "start_from_grow=true", f"run.path={folder.path}"]
    config = config_from_yaml(text, source, [*own, *start, *overrides])
    try:
        grown = begin_from(config, runtime).tables
        folder.write_config(to_yaml(config))
    except BaseException:
        _discard(folder, {})
        raise
    return grown


class Beginning:
    """Writes the first checkpoint of a run that starts from another, and can remove it again if the run cannot start.

    Args:
        config: configuration of the run; without `start_from`, `begin` is a no-op.
        runtime: runtime of this process.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self._config = config
        self._runtime = runtime
        self._folder = RunFolder(config.run.path)
        self._earlier: Mapping[str, Collection[str]] | None = None

    def begin(self) -> tuple[Any, Sizes] | None:
        """Writes the checkpoint and returns the result of `Recipe.prepare`; no-op if the run already has a checkpoint.

        Collective: every rank.

        Returns:
            The prepared data and sizes; None if nothing was written.

        Raises:
            UserError: see `begin_from`.
            CheckpointError: see `begin_from`.
        """
        if self._config.start_from is None:
            return None
        checkpoints_path = self._folder.checkpoints_path
        if self._runtime.ranks.run_on_first(lambda: latest_checkpoint(checkpoints_path)) is not None:
            return None
        if self._runtime.rank == 0:
            self._earlier = _files_of(self._folder)
        begun = begin_from(self._config, self._runtime)
        for table in begun.tables:
            _logger.info(f"table {table.name}: {table.num_kept:,} rows kept, {table.num_new:,} new")
        return begun.prepared

    def undo(self) -> None:
        """Removes on rank 0 all files written since `begin`, so that a corrected command finds the folder unchanged."""
        if self._earlier is not None:
            _discard(self._folder, self._earlier)


def begin_from(config: Config, runtime: Runtime) -> Begun:
    """Writes the first checkpoint of a run that starts from another.

    Rows, dense parameters and their optimizer state are copied bit for bit from the other run's best or newest
    checkpoint; rows are matched by name. With `start_from_grow`, new names in the data get rows with the initial values
    of a new run. The new run begins at step 0 of its own epochs. The other run is only read, and is not needed later.

    Collective: every rank.

    Args:
        config: configuration of the new run; its folder must not have a checkpoint.
        runtime: runtime of this process.

    Raises:
        UserError: the configuration does not fit the other run, or the data cannot be used.
        CheckpointError: the checkpoint is damaged, or does not fit its configuration.
    """
    assert config.start_from is not None
    old_folder, folder, ranks = RunFolder(config.start_from), RunFolder(config.run.path), runtime.ranks
    grow = _grow_of(config, old_folder.path)

    def choose() -> str:
        path = checkpoint_of(old_folder.path, None)
        _refuse_changes(config, grow, old_folder)
        with CheckpointReader(path) as reader:
            _copy_base(config, grow, reader, old_folder)
        return path

    path = ranks.run_on_first(choose)
    data, sizes = recipe_of(config.model).prepare(config, runtime)
    facts = grow.facts(config, data)
    tables = grow.tables(config, data)
    ranks.run_on_first(lambda: grow.write_files(config, data, folder))
    with CheckpointReader(path) as reader:
        read = functools.partial(_old_ids, reader, facts, (old_folder.path, folder.path))
        old_ids = ranks.run_on_each(lambda: {spec.name: read(spec) for spec in tables})
        ranks.run_on_each(lambda: _check_facts(grow, reader, facts, old_folder.path))
        parts = _parts(config, reader, tables, old_ids, (ranks.rank, ranks.size))
        state = _state(reader, config, facts, old_folder.path)
        contents = Contents(_STEP, parts, state, reader.replicated(), table_steps=reader.manifest.table_steps)
        write_checkpoint(folder.checkpoints_path, contents, ranks)
    grown = [GrownTable(name, int((ids >= 0).sum()), int((ids < 0).sum())) for name, ids in old_ids.items()]
    return Begun(grown, (data, sizes))


def _parts(
    config: Config,
    reader: CheckpointReader,
    tables: Sequence[TableSpec],
    old_ids: Mapping[str, Tensor],
    place: tuple[int, int],
) -> list[TensorPart]:
    """Returns the parts of the checkpoint that one rank writes: its range of slots of each table."""
    states = _states_of(config.optimizer, tables)
    return [
        part
        for spec in tables
        for part in grown_parts(
            reader, spec, states[spec.name], old_ids[spec.name], config.seed, share_of_rank(spec.num_rows, *place)
        )
    ]


def _files_of(folder: RunFolder) -> dict[str, Collection[str]]:
    """Returns the names of the files by folder, for the folders that a run writes before its first step.

    The key "" stands for the run folder itself.
    """
    names: tuple[str, ...] = ("", f"{BASE}{FEATURES_NAME}", FEATURES_NAME, KEPT_DATA_NAME, TENSORBOARD_NAME)
    steps = [storage.join(CHECKPOINTS_NAME, step) for step in storage.list_folders(folder.checkpoints_path)]
    names = (*names, CHECKPOINTS_NAME, *steps)
    return {name: storage.list_files(_path_of(folder, name)) for name in names}


def _path_of(folder: RunFolder, name: str) -> str:
    return folder.join(name) if name else folder.path


def _discard(folder: RunFolder, earlier: Mapping[str, Collection[str]]) -> None:
    """Removes the files of a failed attempt. Errors are ignored, because the attempt's own error is raised.

    Args:
        folder: run folder of the attempt.
        earlier: result of `_files_of` before the attempt; these files are kept.
    """
    with suppress(Exception):
        for name, files in reversed(_files_of(folder).items()):
            # The manifest goes first: a checkpoint without it is not valid, even if removal fails later.
            for file in sorted(files, key=lambda file: file != MANIFEST_NAME):
                # The folder is still locked by this job.
                if file not in earlier.get(name, ()) and not file.startswith(OWNER):
                    with suppress(Exception):
                        storage.remove(storage.join(_path_of(folder, name), file))
            storage.remove_empty_folder(_path_of(folder, name))


def _grow_of(config: Config, run_path: str) -> Grow[Any, Any]:
    """Returns the `Grow` of a run's model.

    Raises:
        UserError: the model cannot start from another run.
    """
    grow = recipe_of(config.model).grow
    if grow is None:
        raise UserError(f"{run_path} is a run of {config.model}, whose tables cannot grow")
    return grow


def _own_keys(config: Config) -> list[str]:
    """Returns the keys of given settings that a run cannot have if it starts from another run."""
    settings = flatten(settings_of(config))
    return [key for key, value in settings if key.rpartition(".")[2] in _OWN and value is not None]


def _refuse_own_keys(grow: Grow[Any, Any], overrides: Sequence[str]) -> None:
    if not any(override.startswith(f"{grow.data_key}=") for override in overrides):
        raise UserError(f"expected {grow.data_key}=PATH, the data with new names")
    own_keys = ("run.path", "start_from", "start_from_grow")
    keys = {override: override.partition("=")[0] for override in overrides}
    own = [override for override, key in keys.items() if key in own_keys or key.rpartition(".")[2] in _OWN]
    if own:
        raise UserError(f"{', '.join(own)}: grow itself sets this for the new run; leave it out")


def _refuse_changes(config: Config, grow: Grow[Any, Any], old_folder: RunFolder) -> None:
    """Refuses settings that do not fit the tensors of the other run."""
    text = old_folder.read_config()
    if text is None:
        raise UserError(f"{old_folder.path} has no {CONFIG_NAME}: it is not the folder of a run")
    lasting = (*_LASTING, *grow.lasting)
    differing = [each for each in differing_keys(text, config) if each.startswith(lasting)]
    if of_model := [each for each in differing if each.startswith("model ")]:
        differing = of_model  # The other settings cannot be compared between different models.
    else:
        earlier = grow.inputs(config_from_yaml(text, old_folder.join(CONFIG_NAME)))
        differing += _differing_inputs(earlier, grow.inputs(config))
    if differing:
        raise UserError(f"start_from={old_folder.path}: these settings cannot change: {'; '.join(differing)}")
    if given := _own_keys(config):
        raise UserError(f"{given[0]}: start_from={old_folder.path} gives the tables their names and rows: leave it out")


def _differing_inputs(earlier: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} (was {earlier[key]}, is {inputs[key]})"
        for key in sorted(earlier.keys() & inputs.keys())
        if earlier[key] != inputs[key]
    ]


def _copy_base(config: Config, grow: Grow[Any, Any], reader: CheckpointReader, old_folder: RunFolder) -> None:
    """Copies the files of names that preparing the data needs from the old run to the new run."""
    for name in grow.base_files(config):
        url = base_file(config, name)
        assert url is not None
        try:
            content = storage.read(old_folder.join(name))
        except FileNotFoundError as error:
            raise UserError(f"{old_folder.path} has no {name}, the file that names the rows") from error
        storage.make_folder(url.rpartition("/")[0])
        storage.replace(url, content, f"{url}.tmp")
    for table in config.table_names():
        if f"{table}/weight" in reader.tensors:
            # Raises an error if the file is not the one that the checkpoint was trained with.
            read_row_names(old_folder.path, reader.state, table, reader.table(table).shape[0])
    if grow.write_base is not None:
        grow.write_base(config, reader.state)


def _old_ids(reader: CheckpointReader, facts: Mapping[str, Any], paths: tuple[str, str], spec: TableSpec) -> Tensor:
    """Returns the row in the checkpoint of each row of a new table, [num_rows] int64; -1 for a new row.

    Args:
        reader: the checkpoint.
        facts: facts of the new data.
        paths: folders of the old run and of the new run.
        spec: the new table.
    """
    if f"{spec.name}/weight" not in reader.tensors:
        raise UserError(f"{paths[0]} has no table {spec.name}, so this run cannot start from it")
    num_old = reader.table(spec.name).shape[0]
    old = read_row_names(paths[0], reader.state, spec.name, num_old)
    new = read_row_names(paths[1], facts, spec.name, spec.num_rows)
    if old.is_numbered or new.is_numbered:
        if (old.noun, old.words) != (new.noun, new.words):
            raise UserError(
                f"table {spec.name} of {paths[0]} has {_described(old, num_old)}, but would have "
                f"{_described(new, spec.num_rows)} in this run: only rows with names can be matched"
            )
        return torch.arange(num_old)
    return _rows_by_name(old, new, spec.num_rows)


def _described(names: RowNames, num_rows: int) -> str:
    rows = counted(num_rows, "row")
    if not names.is_numbered:
        return f"{rows} with a name each"
    meanings = {"id": f"{rows} for ids", "value": f"{rows} for hashes of values"}
    return meanings.get(names.noun, f"{rows} without names")


def _rows_by_name(old: RowNames, new: RowNames, num_rows: int) -> Tensor:
    # With `has_others`, row 0 stands for all other values and is matched regardless of its name.
    first, old_first = int(new.has_others), int(old.has_others)
    found = np.full(num_rows, -1, np.int64)
    found[:first] = 0 if old.has_others else -1
    rows = rows_among(new.words[first:], old.words[old_first:])
    found[first : len(new.words)] = np.where(rows >= 0, rows + old_first, -1)
    return torch.from_numpy(found)


def _check_facts(grow: Grow[Any, Any], reader: CheckpointReader, facts: Mapping[str, Any], run_path: str) -> None:
    read_run_state(reader.manifest, reader.path)
    for key in grow.same_facts:
        if facts.get(key) != reader.state.get(key):
            raise UserError(
                f"start_from={run_path}: its {key} differs from the {key} of this run, but the network was trained "
                f"with {reader.state.get(key)}"
            )


def _states_of(section: OptimizerConfig, tables: Sequence[TableSpec]) -> dict[str, list[RowState]]:
    """Returns the optimizer state per row of each table, found by making the optimizer for tables of one row."""
    probe = EmbeddingCollection([replace(spec, num_rows=1) for spec in tables], ranks=ONE_PROCESS)
    build_optimizer(section, probe)
    return {
        name: [RowState(state, tensor.dim() > 1, float(tensor.flatten()[0])) for state, tensor in shard.state.items()]
        for name, shard in probe.shards.items()
    }


def _state(reader: CheckpointReader, config: Config, facts: Mapping[str, Any], run_path: str) -> dict[str, Any]:
    """Returns the state of the new checkpoint, which is everything except tensors."""
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
