"""From a configuration to the objects of a run: the only place that knows both."""

from __future__ import annotations

import functools
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf

from embedtrain import optim
from embedtrain.checkpoint import LoadOptions, Retention, SaveOptions, latest_checkpoint
from embedtrain.config import Config, differing_keys, to_yaml
from embedtrain.data.corpus import PreparedCorpus
from embedtrain.data.prepare import CorpusOptions, prepare_corpus
from embedtrain.data.skipgram import SamplingOptions, TextBatches
from embedtrain.distributed.collectives import run_on_first
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.metrics.sinks import ConsoleSink, JsonlSink, MetricSink, TensorBoardSink
from embedtrain.models.word2vec import INPUT, Word2Vec
from embedtrain.optim.schedule import schedule_factor
from embedtrain.storage import local_path
from embedtrain.train.checkpoints import Checkpoints, ResumePolicy, SavePolicy
from embedtrain.train.run_folder import TENSORBOARD_NAME, RunFolder
from embedtrain.train.state import TrainState
from embedtrain.train.trainer import Trainer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        trainer: the loop, its state restored from the newest checkpoint where there is one.
        folder: the run folder.
        sinks: where rank 0 logs; none on other ranks.
        is_resumed: whether a checkpoint was found.
    """

    trainer: Trainer
    folder: RunFolder
    sinks: list[MetricSink]
    is_resumed: bool


def check_run_folder(config: Config) -> RunFolder:
    """Returns the run folder, after making sure that what lies in it belongs to this configuration.

    Raises:
        UserError: the folder holds checkpoints of a run with other settings.
    """
    folder = RunFolder(config.run.path)
    earlier = folder.read_config()
    if earlier is not None and latest_checkpoint(folder.checkpoints_path) is not None:
        differing = differing_keys(earlier, to_yaml(config), _allowed_to_change(config))
        if differing:
            raise UserError(
                f"{folder.path} holds a run with other settings: {'; '.join(differing)}. "
                "Give the settings that it began with to resume it, or another run.path to start anew."
            )
    return folder


def build_run(config: Config, runtime: Runtime, folder: RunFolder) -> Run:
    """Prepares the data, builds model, optimizer and loop, and restores the newest checkpoint.

    Collective: every rank.

    Raises:
        UserError: the data cannot be used, or the checkpoint is of other data.
    """
    corpus = _prepare(config, runtime)
    model = Word2Vec(
        len(corpus.vocabulary),
        config.table.dim,
        architecture=config.word2vec.architecture,
        dtype=getattr(torch, config.table.dtype),
        wire_dtype=None if config.table.wire_dtype is None else getattr(torch, config.table.wire_dtype),
        device=runtime.device,
        process_group=runtime.group,
        seed=config.seed,
    )
    optimizer = _build_optimizer(config, model)
    batches = _build_batches(config, runtime, corpus)
    state = TrainState()
    checkpoints = Checkpoints(
        folder.checkpoints_path,
        model.tables,
        optimizer,
        state,
        facts={
            "config": OmegaConf.to_container(OmegaConf.structured(config)),
            "data_fingerprint": corpus.fingerprint,
            "vocabulary_fingerprint": corpus.vocabulary.fingerprint,
            "export_table": INPUT,
        },
        policy=_save_policy(config),
        resume=_resume_policy(config),
        group=runtime.group,
    )
    is_resumed = checkpoints.restore()
    run_on_first(functools.partial(_write_folder, folder, config, corpus), runtime.group)
    trainer = Trainer(
        model,
        optimizer,
        batches,
        state,
        epochs=config.train.epochs,
        rate=functools.partial(_rate, config),
        checkpoints=checkpoints,
        group=runtime.group,
    )
    total_words = config.train.epochs * batches.words_per_epoch
    sinks = _build_sinks(config, folder, state, total_words) if runtime.rank == 0 else []
    return Run(trainer, folder, sinks, is_resumed)


def _prepare(config: Config, runtime: Runtime) -> PreparedCorpus:
    options = CorpusOptions(
        path=config.data.path,
        tokenizer=config.data.tokenizer,
        min_count=config.data.min_count,
        max_vocab_size=config.data.max_vocab_size,
    )
    cache_path = os.path.expanduser(config.data.cache_path)
    corpus = prepare_corpus(options, cache_path, runtime.group, on_progress=_StageLog() if runtime.rank == 0 else None)
    if runtime.rank == 0:
        _logger.info(
            f"text: {corpus.num_tokens:,} words of a vocabulary of {len(corpus.vocabulary):,}, in {corpus.path}"
        )
    return corpus


class _StageLog:
    """Logs each stage of a preparation when it begins."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, stage: str, fraction: float) -> None:
        if stage != self._stage:
            self._stage = stage
            _logger.info(f"preparing the text: {stage}")


def _build_optimizer(config: Config, model: Word2Vec) -> optim.SparseOptimizer:
    settings: dict[str, Any] = dict(vars(config.optimizer))
    del settings["name"]  # there is one optimizer so far, and the configuration's type says so
    try:
        return optim.RowwiseAdagrad(model.tables, **settings)
    except ValueError as error:
        raise UserError(f"optimizer: {error}") from error


def _build_batches(config: Config, runtime: Runtime, corpus: PreparedCorpus) -> TextBatches:
    blocks_per_step = config.train.words_per_step // config.train.block_words
    if blocks_per_step < runtime.world_size:
        raise UserError(
            f"a step of train.words_per_step={config.train.words_per_step} is {blocks_per_step} blocks of "
            f"train.block_words={config.train.block_words}, too few for {runtime.world_size} ranks to share: "
            "raise the first or lower the second"
        )
    return TextBatches(
        corpus,
        SamplingOptions(
            window=config.word2vec.window,
            negatives=config.word2vec.negatives,
            sample=config.word2vec.sample,
            power=config.word2vec.power,
        ),
        block_words=config.train.block_words,
        blocks_per_step=blocks_per_step,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )


def _save_policy(config: Config) -> SavePolicy:
    settings = config.checkpoint
    retention = Retention(
        settings.keep_last, settings.keep_every, settings.keep_best, settings.best_metric, settings.best_mode
    )
    options = SaveOptions(
        settings.mode, settings.max_extra_memory_bytes, settings.max_failures, settings.full_every, retention
    )
    return SavePolicy(settings.every_steps, settings.every_seconds, options, config.run.timeout_seconds)


def _resume_policy(config: Config) -> ResumePolicy:
    settings = config.resume
    return ResumePolicy(
        settings.on_corrupt, LoadOptions(settings.convert_dtype, settings.optimizer_state, settings.tables)
    )


def _allowed_to_change(config: Config) -> tuple[str, ...]:
    """Returns the keys, beside those that always may, that the way to resume allows to differ."""
    allowed = {
        "optimizer.": config.resume.optimizer_state == "reset",
        "table.dtype": config.resume.convert_dtype,
    }
    return tuple(key for key, is_allowed in allowed.items() if is_allowed)


def _rate(config: Config, done: float) -> float:
    return config.optimizer.lr * schedule_factor(config.schedule.name, done, config.schedule.min_factor)


def _write_folder(folder: RunFolder, config: Config, corpus: PreparedCorpus) -> None:
    folder.write_config(to_yaml(config))
    folder.write_vocabulary(corpus.vocabulary)


def _build_sinks(config: Config, folder: RunFolder, state: TrainState, total_words: int) -> list[MetricSink]:
    metrics = JsonlSink(folder.metrics_path)
    metrics.truncate_after(state.step)
    sinks: list[MetricSink] = [ConsoleSink(sys.stderr, total_words), metrics]
    if config.log.tensorboard and local_path(folder.path) is not None:
        sinks.append(TensorBoardSink(folder.join(TENSORBOARD_NAME), purge_step=state.step + 1))
    return sinks
