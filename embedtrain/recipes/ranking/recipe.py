"""A run of a ranking model from its configuration."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import pyarrow as pa
import torch

from embedtrain.data.click_batches import ClickBatches
from embedtrain.data.click_files import SUFFIXES
from embedtrain.data.click_log import ClickLayout, ClickLog
from embedtrain.data.click_schema import CRITEO_CATEGORICAL, CategoricalColumn, ClickSchema, require_columns
from embedtrain.data.click_stream import ClickStream, StreamOptions
from embedtrain.data.prepare_clicks import ClickOptions, prepare_clicks
from embedtrain.data.sources import refuse_changes
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.metrics.classification import training_measures
from embedtrain.recipes.base import Check, Parts, Pretrained, Sizes, collection_options, no_check
from embedtrain.recipes.optimizers import build_dense_optimizer, build_optimizer, optimizer_names
from embedtrain.recipes.ranking.config import ClicksConfig, FeatureConfig, RankingConfig
from embedtrain.recipes.ranking.model import NetworkOptions, Ranking, measure_ranking
from embedtrain.spec import DEFAULT_OPTIMIZER, FeatureSpec, TableSpec
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.task import Batches, Evaluation, StreamedBatches, Task

_logger = logging.getLogger(__name__)


def build_ranking(config: RankingConfig, runtime: Runtime, check: Check = no_check) -> Parts:
    """Prepares the click log and builds the model. Collective: every rank.

    Args:
        config: of the run.
        runtime: of this process.
        check: called once the data are known.

    Raises:
        UserError: the log cannot be used, or the configuration contradicts it.
    """
    layout, batches, fingerprint = (
        _open_stream(config, runtime) if config.data.is_stream else _open_log(config, runtime)
    )
    # Of a stream nobody knows how many values its bags hold.
    bag_length = layout.mean_bag_length if isinstance(layout, ClickLog) else 1.0
    check(Sizes(layout.num_rows, dict.fromkeys(layout.bag_names, bag_length)))
    model = _build_model(config, runtime, layout)
    task = Task(
        model,
        model.tables,
        build_optimizer(config.optimizer, model.tables),
        batches,
        dense=build_dense_optimizer(config.dense_optimizer, model.network, model.tables),
        evaluation=_build_evaluation(config, runtime, model, layout),
        summarize=training_measures,
    )
    facts = {
        "data_fingerprint": fingerprint,
        "features": {name: layout.num_rows[name] for name in layout.feature_names},
        "dense": {
            "columns": layout.dense_names,
            "transform": config.data.dense_transform,
            "mean": layout.dense_mean.tolist(),
            "std": layout.dense_std.tolist(),
        },
    }
    return Parts(task, facts, functools.partial(_write_vocabularies, layout), _pretrained(config.data, layout))


def _open_log(config: RankingConfig, runtime: Runtime) -> tuple[ClickLayout, Batches, str]:
    """Returns what the examples mean, their batches, and a hash of them. Collective: every rank."""
    options = _click_options(config.data, config.data.path)
    log = _prepare(options, config, runtime)
    suffixes = SUFFIXES[options.schema.file_format]
    check_files = functools.partial(refuse_changes, options.path, suffixes, log.source_identities)
    batches = ClickBatches(
        log,
        config.train.global_batch_size,
        block_examples=config.data.block_examples,
        seed=config.seed,
        ranks=runtime.ranks,
        on_epoch=lambda: runtime.ranks.run_on_first(check_files),
    )
    return log, batches, log.fingerprint


def _open_stream(config: RankingConfig, runtime: Runtime) -> tuple[ClickLayout, StreamedBatches, str]:
    """Returns as `_open_log`; of a stream only its columns are known, and its lines when they come."""
    data = config.data
    options = StreamOptions(data.path, config.train.global_batch_size, data.poll_seconds, data.max_bad_lines)
    stream = ClickStream(options, click_schema(data), runtime.ranks)
    return stream, stream, stream.fingerprint


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


def _prepare(
    options: ClickOptions, config: RankingConfig, runtime: Runtime, like: ClickLayout | None = None
) -> ClickLog:
    cache_path = os.path.expanduser(config.data.cache_path)
    log = prepare_clicks(options, cache_path, runtime.ranks, like=like)
    if runtime.rank == 0:
        rows = sum(log.num_rows.values())
        _logger.info(
            f"click log: {log.num_examples:,} examples, {log.num_positives / log.num_examples:.1%} positive, "
            f"{len(log.num_rows)} tables of {rows:,} rows, in {log.path}"
        )
    return log


def _build_model(config: RankingConfig, runtime: Runtime, layout: ClickLayout) -> Ranking:
    features = {name: config.data.features.get(name, FeatureConfig()) for name in layout.feature_names}
    optimizers = optimizer_names(config.optimizer)
    dtype = getattr(torch, config.table.dtype)
    network = config.ranking
    return Ranking(
        [
            # As DLRM begins: rows of a large table, most of which are seldom seen, begin near zero and add no noise.
            TableSpec(
                name,
                layout.num_rows[name],
                feature.dim or config.table.dim,
                dtype=dtype,
                init_scale=layout.num_rows[name] ** -0.5,
                optimizer=optimizers.get(name, DEFAULT_OPTIMIZER),
            )
            for name, feature in features.items()
        ],
        [FeatureSpec(name, pooling=feature.pooling if feature.bag else "none") for name, feature in features.items()],
        len(layout.dense_names),
        NetworkOptions(
            architecture=network.architecture,
            bottom=tuple(network.bottom),
            top=tuple(network.top),
            num_cross_layers=network.num_cross_layers,
            low_rank=network.low_rank,
        ),
        **collection_options(config.table, runtime, config.seed),
    )


def _build_evaluation(
    config: RankingConfig, runtime: Runtime, model: Ranking, layout: ClickLayout
) -> Evaluation | None:
    if config.data.valid_path is None:
        return None
    held_out = _prepare(_click_options(config.data, config.data.valid_path), config, runtime, like=layout)
    batches = ClickBatches(
        held_out, config.train.global_batch_size, block_examples=config.data.block_examples, ranks=runtime.ranks
    )
    return Evaluation(
        functools.partial(measure_ranking, model, batches),
        every_steps=config.evaluate.every_steps,
        every_epochs=config.evaluate.every_epochs,
    )


def _pretrained(data: ClicksConfig, layout: ClickLayout) -> dict[str, Pretrained]:
    found = {}
    for name, feature in data.features.items():
        if feature.init_from is None:
            continue
        if layout.vocabulary(name) is None:
            raise UserError(
                f"data.features.{name}.init_from needs rows that have names: give {name} encoding: vocabulary, and no "
                "num_rows"
            )
        found[name] = Pretrained(feature.init_from, functools.partial(_rows_of_values, layout, name))
    return found


def _rows_of_values(layout: ClickLayout, name: str) -> dict[str, int]:
    vocabulary = layout.vocabulary(name)
    assert vocabulary is not None
    values = vocabulary["word"].cast(pa.large_string()).to_pylist()
    return {value: row for row, value in enumerate(values, start=1)}


def _write_vocabularies(layout: ClickLayout, folder: RunFolder) -> None:
    for name in layout.feature_names:
        if (vocabulary := layout.vocabulary(name)) is not None:
            rows = pa.array(range(1, len(vocabulary) + 1), pa.int64())
            value = vocabulary["word"].cast(pa.large_string())
            folder.write_feature(name, pa.table({"row": rows, "value": value, "count": vocabulary["count"]}))
