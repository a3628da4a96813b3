"""A run of a ranking model from its configuration."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import pyarrow as pa
import torch

from embedtrain.build.optimizers import build_dense_optimizer, build_optimizer
from embedtrain.build.parts import Parts
from embedtrain.config.ranking import ClicksConfig, FeatureConfig, RankingConfig
from embedtrain.data.click_batches import ClickBatches
from embedtrain.data.click_files import SUFFIXES
from embedtrain.data.click_log import ClickLog
from embedtrain.data.click_schema import CRITEO_CATEGORICAL, CategoricalColumn, ClickSchema, require_columns
from embedtrain.data.prepare_clicks import ClickOptions, prepare_clicks
from embedtrain.data.sources import refuse_changes
from embedtrain.distributed.collectives import run_on_first
from embedtrain.distributed.runtime import Runtime
from embedtrain.metrics.classification import training_measures
from embedtrain.models.ranking import NetworkOptions, Ranking, measure_ranking
from embedtrain.spec import FeatureSpec, TableSpec
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.task import Evaluation, Task

_logger = logging.getLogger(__name__)


def build_ranking(config: RankingConfig, runtime: Runtime) -> Parts:
    """Prepares the click log and builds the model. Collective: every rank.

    Raises:
        UserError: the log cannot be used, or the configuration contradicts it.
    """
    options = _click_options(config.data, config.data.path)
    log = _prepare(options, config, runtime)
    suffixes = SUFFIXES[options.schema.file_format]
    check_files = functools.partial(refuse_changes, options.path, suffixes, log.source_identities)
    model = _build_model(config, runtime, log)
    task = Task(
        model,
        model.tables,
        build_optimizer(config.optimizer, model.tables),
        ClickBatches(
            log,
            config.train.global_batch_size,
            block_examples=config.data.block_examples,
            seed=config.seed,
            group=runtime.group,
            on_epoch=lambda: run_on_first(check_files, runtime.group),
        ),
        dense=build_dense_optimizer(config.dense_optimizer, model.network, model.tables),
        evaluation=_build_evaluation(config, runtime, model, log),
        summarize=training_measures,
    )
    facts = {
        "data_fingerprint": log.fingerprint,
        "features": {name: log.num_rows[name] for name in log.feature_names},
        "dense": {
            "columns": log.dense_names,
            "transform": config.data.dense_transform,
            "mean": log.dense_mean.tolist(),
            "std": log.dense_std.tolist(),
        },
    }
    return Parts(task, facts, write_files=functools.partial(_write_vocabularies, log))


def click_schema(data: ClicksConfig) -> ClickSchema:
    """Returns the schema that a section describes.

    Raises:
        UserError: it contradicts itself.
    """
    if data.format == "criteo":
        names = tuple(data.categorical) or CRITEO_CATEGORICAL
        require_columns(names, CRITEO_CATEGORICAL, "data.categorical")
    else:
        names = tuple(data.categorical)
    require_columns(list(data.features), names, "data.features")
    columns = [_column(name, data.features.get(name, FeatureConfig()), data) for name in names]
    if data.format == "criteo":
        return ClickSchema.criteo(columns, data.dense_transform)
    return ClickSchema(
        file_format=data.format,
        label=data.label,
        dense=tuple(data.dense),
        categorical=tuple(columns),
        positive=data.positive,
        columns=None if data.columns is None else tuple(data.columns),
        delimiter=data.delimiter,
        dense_transform=data.dense_transform,
    )


def _column(name: str, feature: FeatureConfig, data: ClicksConfig) -> CategoricalColumn:
    num_rows = data.num_rows if feature.num_rows is None else feature.num_rows
    encoding = feature.encoding or data.encoding or ("vocabulary" if num_rows is None else "hash")
    return CategoricalColumn(
        name=name,
        num_rows=num_rows,
        encoding=encoding,
        min_count=data.min_count if feature.min_count is None else feature.min_count,
        is_bag=feature.bag,
        separator=feature.separator,
    )


def _click_options(data: ClicksConfig, path: Any) -> ClickOptions:
    return ClickOptions(path=path, schema=click_schema(data), max_bad_lines=data.max_bad_lines)


def _prepare(options: ClickOptions, config: RankingConfig, runtime: Runtime, like: ClickLog | None = None) -> ClickLog:
    cache_path = os.path.expanduser(config.data.cache_path)
    log = prepare_clicks(options, cache_path, runtime.group, like=like)
    if runtime.rank == 0:
        rows = sum(log.num_rows.values())
        _logger.info(
            f"click log: {log.num_examples:,} examples, {log.num_positives / log.num_examples:.1%} positive, "
            f"{len(log.num_rows)} tables of {rows:,} rows, in {log.path}"
        )
    return log


def _build_model(config: RankingConfig, runtime: Runtime, log: ClickLog) -> Ranking:
    features = {name: config.data.features.get(name, FeatureConfig()) for name in log.feature_names}
    dtype = getattr(torch, config.table.dtype)
    network = config.ranking
    return Ranking(
        [
            # As DLRM begins: rows of a large table, most of which are seldom seen, begin near zero and add no noise.
            TableSpec(
                name,
                log.num_rows[name],
                feature.dim or config.table.dim,
                dtype=dtype,
                init_scale=log.num_rows[name] ** -0.5,
            )
            for name, feature in features.items()
        ],
        [FeatureSpec(name, pooling=feature.pooling if feature.bag else "none") for name, feature in features.items()],
        len(log.dense_names),
        NetworkOptions(
            architecture=network.architecture,
            bottom=tuple(network.bottom),
            top=tuple(network.top),
            num_cross_layers=network.num_cross_layers,
            low_rank=network.low_rank,
        ),
        device=runtime.device,
        process_group=runtime.group,
        wire_dtype=None if config.table.wire_dtype is None else getattr(torch, config.table.wire_dtype),
        seed=config.seed,
    )


def _build_evaluation(config: RankingConfig, runtime: Runtime, model: Ranking, log: ClickLog) -> Evaluation | None:
    if config.data.valid_path is None:
        return None
    held_out = _prepare(_click_options(config.data, config.data.valid_path), config, runtime, like=log)
    batches = ClickBatches(
        held_out, config.train.global_batch_size, block_examples=config.data.block_examples, group=runtime.group
    )
    return Evaluation(
        functools.partial(measure_ranking, model, batches),
        every_steps=config.evaluate.every_steps,
        every_epochs=config.evaluate.every_epochs,
    )


def _write_vocabularies(log: ClickLog, folder: RunFolder) -> None:
    for name in log.feature_names:
        if (vocabulary := log.vocabulary(name)) is not None:
            rows = pa.array(range(1, len(vocabulary) + 1), pa.int64())
            value = vocabulary["word"].cast(pa.large_string())
            folder.write_feature(name, pa.table({"row": rows, "value": value, "count": vocabulary["count"]}))
