"""Runs that begin with all that another run knows, and with rows for what is new in their data."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedtrain import storage
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.checkpoint.growth import grown_parts
from embedtrain.checkpoint.parts import TensorPart
from embedtrain.checkpoint.writer import Contents, write_checkpoint
from embedtrain.config.optimizer import OptimizerConfig
from embedtrain.config.resolved import differing_keys, to_yaml
from embedtrain.config.sections import Config
from embedtrain.config.values import flatten, settings_of
from embedtrain.data.partition import share_of_rank
from embedtrain.data.row_names import FEATURES_NAME, RowNames, read_row_names
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.errors import UserError
from embedtrain.optim.stores import RowState
from embedtrain.recipes.base import BASE, Grow, base_file
from embedtrain.recipes.loading import config_from_yaml
from embedtrain.recipes.optimizers import build_optimizer
from embedtrain.recipes.registry import recipe_of
from embedtrain.recipes.trained import checkpoint_of
from embedtrain.spec import TableSpec
from embedtrain.train.run_folder import CHECKPOINTS_NAME, CONFIG_NAME, RunFolder
from embedtrain.train.state import TrainState, read_run_state

_logger = logging.getLogger(__name__)

_STEP = 0
"""A run that was started from another has made no step of its own yet."""

_LASTING = ("model ", "table.dim ", "table.dtype ", "optimizer.name ", "optimizer.tables", "dense_optimizer.name ")
"""Begin the settings that decide what the tensors of a checkpoint are."""

_OWN = ("init_from", "base_vocabulary")
"""The last names of settings that give the rows of a new run their names or values."""


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


def grow_run(run_path: str, new_path: str, overrides: Sequence[str], runtime: Runtime) -> list[GrownTable]:
    """Makes a run that is started from another, with rows for what is new in other data; see `begin_from`.

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
    if latest_checkpoint(old_folder.checkpoints_path) is None:
        raise UserError(f"no complete checkpoint yet in {run_path!r}; train until the first one is saved")
    if storage.list_files(folder.path) or storage.list_folders(folder.path):
        raise UserError(f"{new_path} is not empty: choose a new folder for the grown run")
    text = old_folder.read_config()
    if text is None:
        raise UserError(f"{old_folder.path} has no {CONFIG_NAME}: it is not the folder of a run")
    source = old_folder.join(CONFIG_NAME)
    grow = _grow_of(config_from_yaml(text, source), old_folder.path)
    _refuse_own_keys(grow, overrides)
    own = [f"{key}=null" for key in _own_keys(config_from_yaml(text, source))]
    start = [f"start_from={old_folder.path}", "start_from_grow=true", f"run.path={folder.path}"]
    config = config_from_yaml(text, source, [*own, *start, *overrides])
    try:
        grown = begin_from(config, runtime)
        folder.write_config(to_yaml(config))
    except BaseException:
        _discard(folder)
        raise
    return grown


def begin_unless_begun(config: Config, runtime: Runtime) -> None:
    """Writes the first checkpoint of a run that is started from another, unless it has one.

    Collective: every rank.

    Raises:
        UserError: as `begin_from`.
    """
    folder = RunFolder(config.run.path)
    if runtime.ranks.run_on_first(lambda: latest_checkpoint(folder.checkpoints_path)) is not None:
        return
    for table in begin_from(config, runtime):
        _logger.info(f"table {table.name}: {table.num_kept:,} rows kept, {table.num_new:,} new")


def begin_from(config: Config, runtime: Runtime) -> list[GrownTable]:
    """Writes the first checkpoint of a run that is started from another.

    Rows, optimizer state, dense parameters and theirs are those of the checkpoint that answers for the other run, bit
    for bit, under the names of the rows. With `start_from_grow`, what is new in the data gets rows, which begin as in a
    new run. The new run begins at step 0 of its own epochs; the other is only read, and is not needed again.

    Collective: every rank.

    Args:
        config: of the new run; its folder holds no checkpoint.
        runtime: of this process.

    Raises:
        UserError: the other run cannot be gone on with by this configuration, or the data cannot be used.
        CheckpointError: the checkpoint is damaged, or does not hold what its configuration says.
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
    data, _ = recipe_of(config.model).prepare(config, runtime)
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
    return [GrownTable(name, int((ids >= 0).sum()), int((ids < 0).sum())) for name, ids in old_ids.items()]


def _parts(
    config: Config,
    reader: CheckpointReader,
    tables: Sequence[TableSpec],
    old_ids: Mapping[str, Tensor],
    place: tuple[int, int],
) -> list[TensorPart]:
    """Returns what one rank of so many writes: its range of the slots of each table."""
    states = _states_of(config.optimizer, tables)
    return [
        part
        for spec in tables
        for part in grown_parts(
            reader, spec, states[spec.name], old_ids[spec.name], config.seed, share_of_rank(spec.num_rows, *place)
        )
    ]


def _discard(folder: RunFolder) -> None:
    """Removes what a failed attempt wrote, as far as that works: the user is told of the attempt's own error."""
    with suppress(Exception):
        folder.keep_data({})
    for name in (f"{BASE}{FEATURES_NAME}", FEATURES_NAME, CHECKPOINTS_NAME, ""):
        path = folder.join(name) if name else folder.path
        with suppress(Exception):
            for file in storage.list_files(path):
                storage.remove(storage.join(path, file))
        with suppress(Exception):
            storage.remove_empty_folder(path)


def _grow_of(config: Config, run_path: str) -> Grow[Any, Any]:
    """Returns how a run of a model goes on with another's tables.

    Raises:
        UserError: it cannot.
    """
    grow = recipe_of(config.model).grow
    if grow is None:
        raise UserError(f"{run_path} is a run of {config.model}, whose tables cannot grow")
    return grow


def _own_keys(config: Config) -> list[str]:
    """Returns the given settings that a run which is started from another cannot have."""
    settings = flatten(settings_of(config))
    return [key for key, value in settings if key.rpartition(".")[2] in _OWN and value is not None]


def _refuse_own_keys(grow: Grow[Any, Any], overrides: Sequence[str]) -> None:
    if not any(override.startswith(f"{grow.data_key}=") for override in overrides):
        raise UserError(f"expected {grow.data_key}=PATH, the data with what is new")
    own_keys = ("run.path", "start_from", "start_from_grow")
    keys = {override: override.partition("=")[0] for override in overrides}
    own = [override for override, key in keys.items() if key in own_keys or key.rpartition(".")[2] in _OWN]
    if own:
        raise UserError(f"{', '.join(own)}: grow itself sets this for the new run; leave it out")


def _refuse_changes(config: Config, grow: Grow[Any, Any], old_folder: RunFolder) -> None:
    """Refuses what would not fit the tensors of the other run."""
    text = old_folder.read_config()
    if text is None:
        raise UserError(f"{old_folder.path} has no {CONFIG_NAME}: it is not the folder of a run")
    lasting = (*_LASTING, *grow.lasting)
    differing = [each for each in differing_keys(text, config) if each.startswith(lasting)]
    if of_model := [each for each in differing if each.startswith("model ")]:
        differing = of_model  # The settings of one model say nothing of another's.
    if differing:
        raise UserError(f"start_from={old_folder.path}: these settings cannot change: {'; '.join(differing)}")
    if given := _own_keys(config):
        raise UserError(f"{given[0]}: start_from={old_folder.path} gives the tables their names and rows: leave it out")


def _copy_base(config: Config, grow: Grow[Any, Any], reader: CheckpointReader, old_folder: RunFolder) -> None:
    """Copies to the new run the files of names that its data are prepared with."""
    for name in grow.base_files(config):
        url = base_file(config, name)
        assert url is not None
        try:
            content = storage.read(old_folder.join(name))
        except FileNotFoundError as error:
            raise UserError(f"{old_folder.path} has no {name}, which says whose rows are whose") from error
        storage.make_folder(url.rpartition("/")[0])
        storage.replace(url, content, f"{url}.tmp")
    for table in config.table_names():
        if f"{table}/weight" in reader.tensors:
            # The file is the one that the checkpoint was trained with.
            read_row_names(old_folder.path, reader.state, table, reader.table(table).shape[0])
    if grow.write_base is not None:
        grow.write_base(config, reader.state)


def _old_ids(reader: CheckpointReader, facts: Mapping[str, Any], paths: tuple[str, str], spec: TableSpec) -> Tensor:
    """Returns the row in the checkpoint of each row of a table, [num_rows] int64; -1 for a new one.

    Args:
        reader: the checkpoint.
        facts: of the new data.
        paths: the folders of the old run and of the new one.
        spec: the new table.
    """
    if f"{spec.name}/weight" not in reader.tensors:
        raise UserError(f"{paths[0]} has no table {spec.name}: it cannot start one")
    num_old = reader.table(spec.name).shape[0]
    old = read_row_names(paths[0], reader.state, spec.name, num_old)
    new = read_row_names(paths[1], facts, spec.name, spec.num_rows)
    if old.is_numbered or new.is_numbered:
        if old.is_numbered != new.is_numbered or num_old != spec.num_rows:
            raise UserError(
                f"table {spec.name} of {paths[0]} has {num_old:,} rows without names of their own, and would have "
                f"{spec.num_rows:,}: only tables whose rows have names can grow"
            )
        return torch.arange(num_old)
    return _rows_by_name(old, new, spec.num_rows)


def _rows_by_name(old: RowNames, new: RowNames, num_rows: int) -> Tensor:
    rows = dict(old.rows)
    first = int(new.has_others)
    if old.has_others:
        # Whatever it is called, row 0 is that of all other values.
        rows.pop(old.words[0])
    found = np.full(num_rows, -1, np.int64)
    found[:first] = 0 if old.has_others else -1
    found[first : len(new.words)] = [rows.get(word, -1) for word in new.words[first:]]
    return torch.from_numpy(found)


def _check_facts(grow: Grow[Any, Any], reader: CheckpointReader, facts: Mapping[str, Any], run_path: str) -> None:
    read_run_state(reader.manifest, reader.path)
    for key in grow.same_facts:
        if facts.get(key) != reader.state.get(key):
            raise UserError(
                f"start_from={run_path}: its {key} are others than those of this run, and the network was trained on "
                f"these: {reader.state.get(key)}"
            )


def _states_of(section: OptimizerConfig, tables: Sequence[TableSpec]) -> dict[str, list[RowState]]:
    """Returns what the optimizer keeps for a row of each table: it says so itself, of tables of one row."""
    probe = EmbeddingCollection([replace(spec, num_rows=1) for spec in tables], ranks=ONE_PROCESS)
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
