"""New words, users or items for a trained run: another run that begins with all that the first one knows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import OmegaConf

from embedtrain import storage
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.checkpoint.growth import grown_parts
from embedtrain.checkpoint.writer import Contents, write_checkpoint
from embedtrain.config.optimizer import OptimizerConfig
from embedtrain.config.sections import Config
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.errors import UserError
from embedtrain.optim.sparse import RowState
from embedtrain.recipes.loading import config_from_yaml, differing_keys, to_yaml
from embedtrain.recipes.optimizers import build_optimizer, optimizer_names
from embedtrain.recipes.retrieval.config import RetrievalConfig
from embedtrain.recipes.retrieval.model import ITEM, USER, retrieval_table
from embedtrain.recipes.retrieval.recipe import prepare_data
from embedtrain.recipes.word2vec.config import Word2VecConfig
from embedtrain.recipes.word2vec.model import word2vec_tables
from embedtrain.recipes.word2vec.recipe import prepare_text, text_facts
from embedtrain.spec import DEFAULT_OPTIMIZER, TableSpec
from embedtrain.train.run_folder import CONFIG_NAME, VOCABULARY_NAME, RunFolder
from embedtrain.train.state import TrainState

_IDS = {USER: f"{USER}s.tsv", ITEM: f"{ITEM}s.tsv"}
"""What a run of retrieval calls the files of its raw ids."""

_BASE = "base-"
"""Beginning of the name under which a grown run keeps the old names."""

_OWN_KEYS = (
    "run.path",
    "init_from",
    "data.base_vocabulary",
    *(f"{side}.{key}" for side in ("users", "items") for key in ("init_from", "base_vocabulary")),
)
"""Settings of a grown run that nobody else can give."""

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
    stand in the order of their counts, old and new added up, so a word's row is another one than before. The new run
    begins at step 0 of its own epochs, with a checkpoint of that step; the first run is only read.

    Args:
        run_path: folder of a run of word2vec, or of retrieval without features.
        new_path: folder of the new run.
        overrides: `key=value` each, the new run's settings where they are not the old one's; `data.path` among them.
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
    config = _new_config(old_folder, folder, overrides)
    try:
        with CheckpointReader(path) as reader:
            return _write(config, reader, old_folder, folder, runtime)
    except BaseException:
        _discard(folder)
        raise


def _write(
    config: Config, reader: CheckpointReader, old_folder: RunFolder, folder: RunFolder, runtime: Runtime
) -> list[GrownTable]:
    grown, facts = _grow(config, old_folder, folder, runtime)
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
    folder.write_config(to_yaml(config))
    state = _state(reader, config, facts, old_folder.path)
    write_checkpoint(folder.checkpoints_path, Contents(_STEP, parts, state, reader.replicated()), ONE_PROCESS)
    return [
        GrownTable(spec.name, len(each.old), len(each.new) - len(each.old)) for each in grown for spec in each.tables
    ]


def _discard(folder: RunFolder) -> None:
    """Removes what a failed attempt wrote, as far as that works: its error is the one to tell."""
    names = VOCABULARY_NAME, *_IDS.values()
    for name in (*names, *(f"{_BASE}{name}" for name in names), CONFIG_NAME):
        with suppress(Exception):
            storage.remove(folder.join(name))
    for path in (folder.checkpoints_path, folder.path):
        with suppress(Exception):
            storage.remove_empty_folder(path)


def _new_config(old_folder: RunFolder, folder: RunFolder, overrides: Sequence[str]) -> Config:
    if not any(override.startswith("data.path=") for override in overrides):
        raise UserError("expected data.path=PATH, the data with what is new")
    own = [override for override in overrides if override.partition("=")[0] in _OWN_KEYS]
    if own:
        raise UserError(f"{', '.join(own)}: grow itself says what that is for the new run; leave it out")
    text = old_folder.read_config()
    if text is None:
        raise UserError(f"{old_folder.path} has no {CONFIG_NAME}: it is not the folder of a run")
    source = old_folder.join(CONFIG_NAME)
    old, config = config_from_yaml(text, source), config_from_yaml(text, source, overrides)
    if not isinstance(old, Word2VecConfig | RetrievalConfig):
        raise UserError(f"{old_folder.path} is a run of {old.model}: only runs of word2vec and retrieval grow")
    if isinstance(config, RetrievalConfig) and (config.users.features or config.items.features):
        raise UserError(f"{old_folder.path} has features, whose categories have no names in it: it cannot grow")
    lasting = "model ", "table.", "optimizer.name ", "optimizer.tables"
    differing = [each for each in differing_keys(text, to_yaml(config)) if each.startswith(lasting)]
    if differing:
        raise UserError(f"these stay as they were where a run grows: {'; '.join(differing)}")
    config.run.path = folder.path
    return config


def _grow(
    config: Config, old_folder: RunFolder, folder: RunFolder, runtime: Runtime
) -> tuple[list[_Grown], dict[str, Any]]:
    """Prepares the new data, keeps the old names as the base of theirs, and writes the new names."""
    if isinstance(config, Word2VecConfig):
        config.init_from = None
        words, config.data.base_vocabulary = _keep_names(old_folder, folder, VOCABULARY_NAME)
        corpus = prepare_text(config, runtime)
        folder.write_vocabulary(corpus.vocabulary)
        dtype, optimizers = getattr(torch, config.table.dtype), optimizer_names(config.optimizer)
        tables = word2vec_tables(len(corpus.vocabulary), config.table.dim, dtype, optimizers)
        return [_Grown(words, corpus.vocabulary, tables)], text_facts(corpus)
    assert isinstance(config, RetrievalConfig)
    old_names: dict[str, Vocabulary] = {}
    for name, side in ((USER, config.users), (ITEM, config.items)):
        side.init_from = None
        old_names[name], side.base_vocabulary = _keep_names(old_folder, folder, _IDS[name])
    data = prepare_data(config, runtime)
    grown = []
    for name, names in ((USER, data.users), (ITEM, data.items)):
        folder.write_vocabulary(names, _IDS[name])
        dtype = getattr(torch, config.table.dtype)
        own = optimizer_names(config.optimizer).get(name, DEFAULT_OPTIMIZER)
        spec = retrieval_table(name, len(names), config.table.dim, dtype, config.retrieval.similarity, own)
        grown.append(_Grown(old_names[name], names, [spec]))
    return grown, {"data_fingerprint": data.fingerprint}


def _keep_names(old_folder: RunFolder, folder: RunFolder, name: str) -> tuple[Vocabulary, str]:
    """Copies a file of names to the new run; returns them and where they are now."""
    try:
        names = Vocabulary.load(old_folder.join(name))
    except FileNotFoundError as error:
        raise UserError(f"{old_folder.path} has no {name}, which says whose rows are whose") from error
    kept = f"{_BASE}{name}"
    folder.write_vocabulary(names, kept)
    return names, folder.join(kept)


def _check_rows(grown: _Grown, reader: CheckpointReader, run_path: str) -> None:
    known = reader.state.get("vocabulary_fingerprint", grown.old.fingerprint)
    for spec in grown.tables:
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


def _state(reader: CheckpointReader, config: Config, facts: dict[str, Any], run_path: str) -> dict[str, Any]:
    """Returns what the new checkpoint says beside its tensors."""
    saved = reader.state
    dense = {"dense_optimizer": saved["dense_optimizer"]} if "dense_optimizer" in saved else {}
    return {
        "config": OmegaConf.to_container(OmegaConf.structured(config)),
        **facts,
        **dense,
        "init_from": saved.get("init_from", {}),
        "grown_from": {"path": run_path, "step": reader.step},
        "train": TrainState().as_json(),
        "metrics": {},
        "optimizer": {**saved["optimizer"], "num_skipped": 0},
    }
