"""The recipe of ranking models."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from embedtrain.data.click_batches import ClickBatches
from embedtrain.data.click_log import ClickLayout, ClickLog
from embedtrain.data.click_schema import Encoding
from embedtrain.data.click_stream import ClickStream, StreamOptions
from embedtrain.data.prepare_clicks import ClickOptions, prepare_clicks
from embedtrain.data.readers import Layout, suffixes_of
from embedtrain.data.row_names import (
    HASHES,
    IDS,
    STATE_KEY,
    Source,
    of_ids,
    of_values,
    values_source,
    write_values,
)
from embedtrain.data.sources import expand_sources, refuse_changes
from embedtrain.data.vector_files import check_vectors
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.metrics.classification import RECORDED, TRAINED, training_measures
from embedtrain.metrics.figures import Section
from embedtrain.recipes.base import Grow, Recipe, Tuning, around, collection_options
from embedtrain.recipes.optimizers import build_dense_optimizer, build_optimizer
from embedtrain.recipes.ranking.base import base_files, read_base, write_base
from embedtrain.recipes.ranking.config import ClicksConfig, RankingConfig
from embedtrain.recipes.ranking.draft import draft
from embedtrain.recipes.ranking.model import HELD_OUT, Ranking, measure_ranking
from embedtrain.recipes.ranking.options import (
    click_schema,
    feature_options,
    network_inputs,
    network_options,
    ranking_tables,
)
from embedtrain.recipes.ranking.packing import pack
from embedtrain.recipes.ranking.reporting import score_sections
from embedtrain.recipes.ranking.scoring import ClickScorer
from embedtrain.recipes.ranking.workload import workload
from embedtrain.recipes.workload import Sizes
from embedtrain.spec import FeatureSpec
from embedtrain.train.checkpoints import load_weights
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.task import Batches, Evaluation, Parts, Pretrained, StreamedBatches, Task

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _KeptFacts:
    """Facts kept with the held-out examples: a hash of the training examples."""

    data_fingerprint: str


@dataclass(frozen=True)
class ClicksOfRun:
    """Holds the prepared clicks of a run.

    Attributes:
        layout: meaning of the examples' fields.
        batches: batches of the examples.
        fingerprint: hash of the examples, or of the options of a stream.
        held_out: the held-out examples; None if there are none.
    """

    layout: ClickLayout
    batches: Batches | StreamedBatches
    fingerprint: str
    held_out: ClickLog | None


def check(config: RankingConfig, is_new: bool) -> None:
    """Checks the files that a run reads besides its training data, and the path of the held-out data.

    Args:
        config: configuration of the run.
        is_new: whether the run has no checkpoint; only then are the files of `init_from` read.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    if config.data.valid_path is not None:
        # Checked here because preparing the training data, which comes first, may take hours.
        expand_sources(config.data.valid_path, suffixes_of(click_schema(config.data).reader))
    for name, feature in config.data.features.items():
        if feature.init_from is not None and is_new:
            check_vectors(feature.init_from, feature.dim or config.table.dim, f"data.features.{name}.init_from")


def prepare(config: RankingConfig, runtime: Runtime) -> tuple[ClicksOfRun, Sizes]:
    """Prepares the training and held-out data, or opens them in the cache. Collective: every rank.

    Raises:
        UserError: a log cannot be used.
    """
    layout, batches, fingerprint = (
        _open_stream(config, runtime) if config.data.is_stream else _open_log(config, runtime)
    )
    # The bag lengths of a stream are not known in advance.
    bag_length = layout.mean_bag_length if isinstance(layout, ClickLog) else 1.0
    held_out = None
    if config.data.valid_path is not None:
        held_out = _prepare_log(_click_options(config.data, config.data.valid_path), config, runtime, like=layout)
    data = ClicksOfRun(layout, batches, fingerprint, held_out)
    return data, Sizes(layout.num_rows, dict.fromkeys(layout.bag_names, bag_length))


def build(config: RankingConfig, runtime: Runtime, data: ClicksOfRun) -> Parts:
    """Builds the model over prepared clicks. Collective: every rank.

    Raises:
        UserError: the configuration does not fit the clicks.
    """
    layout = data.layout
    model = _build_model(config, runtime, layout)
    task = Task(
        model,
        model.tables,
        build_optimizer(config.optimizer, model.tables),
        data.batches,
        dense=build_dense_optimizer(config.dense_optimizer, model.network, model.tables),
        evaluation=_build_evaluation(config, runtime, model, data.held_out),
        summarize=training_measures,
        measures=[*TRAINED, *(HELD_OUT + name for name in RECORDED if data.held_out is not None)],
    )
    write_files, pretrained = functools.partial(_write_files, data), _pretrained(config, layout)
    logs = [log for log in (layout, data.held_out) if isinstance(log, ClickLog)]
    return Parts(
        task, _facts(config, data), write_files, pretrained, tuple(entry for log in logs for entry in log.unverified)
    )


def measure(
    config: RankingConfig, runtime: Runtime, checkpoint: str, held_out_path: str | None = None
) -> dict[str, float]:
    """Measures a checkpoint on the held-out examples kept in the run folder, or else in the configured files.

    Collective: every rank.

    Raises:
        UserError: the examples cannot be used, or were encoded with other vocabularies than the checkpoint's.
    """
    assert held_out_path is None, "rows of other files are measured by their scores"
    with _restored(config, runtime, checkpoint) as (model, held_out):
        return measure_ranking(model, _held_out_batches(config, runtime, held_out), lambda: None)


@contextmanager
def _restored(config: RankingConfig, runtime: Runtime, checkpoint: str) -> Iterator[tuple[Ranking, ClickLog]]:
    """Yields the model of a checkpoint and the held-out examples. Collective: every rank."""
    with RunFolder(config.run.path).open_data(_KeptFacts) as kept:
        if kept is None:
            data, _ = prepare(config, runtime)
            held_out, fingerprint = data.held_out, data.fingerprint
        else:
            held_out, fingerprint = ClickLog(kept.path), kept.facts.data_fingerprint
        assert held_out is not None, "the configuration names held-out data"
        model = _build_model(config, runtime, held_out)
        dense = build_dense_optimizer(config.dense_optimizer, model.network, model.tables)
        load_weights(checkpoint, model.tables, dense, fingerprint)
        yield model, held_out


def report(config: RankingConfig, runtime: Runtime, checkpoint: str) -> Iterator[Section]:
    """Yields curves of the scores of held-out examples, and the importance of each column.

    Yields nothing without held-out examples. Collective: every rank.

    Raises:
        UserError: the examples cannot be used, or were encoded with other vocabularies than the checkpoint's.
    """
    if config.data.valid_path is None:
        return
    with _restored(config, runtime, checkpoint) as (model, held_out):
        yield from score_sections(model, held_out, _held_out_batches(config, runtime, held_out))


def _open_log(config: RankingConfig, runtime: Runtime) -> tuple[ClickLayout, Batches, str]:
    """Returns layout, batches and fingerprint of the examples. Collective: every rank."""
    options = _click_options(config.data, config.data.path)
    log = _prepare_log(options, config, runtime)
    suffixes = suffixes_of(options.schema.reader)
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
    """Returns layout, steps and fingerprint of a stream."""
    data = config.data
    assert isinstance(data.path, str), "the configuration was checked"
    options = StreamOptions(data.path, config.train.global_batch_size, data.poll_seconds, data.max_bad_lines)
    base = runtime.ranks.run_on_each(lambda: read_base(config))
    moments = None if base is None else (base.dense_mean, base.dense_std)
    stream = ClickStream(options, click_schema(data), runtime.ranks, moments)
    return stream, stream, stream.fingerprint


def _click_options(data: ClicksConfig, path: Any) -> ClickOptions:
    return ClickOptions(path=path, schema=click_schema(data), max_bad_lines=data.max_bad_lines)


def _prepare_log(
    options: ClickOptions, config: RankingConfig, runtime: Runtime, like: ClickLayout | None = None
) -> ClickLog:
    cache_path = os.path.expanduser(config.data.cache_path)
    base = None if like is not None else runtime.ranks.run_on_each(lambda: read_base(config))
    log = prepare_clicks(options, cache_path, runtime.ranks, like=like, base=base)
    if runtime.rank == 0:
        rows = sum(log.num_rows.values())
        _logger.info(
            f"click log: {log.num_examples:,} examples, {log.num_positives / log.num_examples:.1%} positive, "
            f"{len(log.num_rows)} tables of {rows:,} rows, in {log.path}"
        )
        if log.num_positives in (0, log.num_examples):
            which = "no example" if log.num_positives == 0 else "every example"
            label, positive = config.data.label, config.data.positive
            meaning = "1" if positive is None else repr(positive)
            _logger.warning(f"{which} is positive: check that {meaning} is the value of {label!r} for positives")
    return log


def _facts(config: RankingConfig, data: ClicksOfRun) -> dict[str, Any]:
    layout = data.layout
    return {
        "data_fingerprint": data.fingerprint,
        STATE_KEY: _names_facts(config, layout),
        "features": {name: layout.num_rows[name] for name in layout.feature_names},
        "dense": {
            "columns": list(layout.dense_names),
            "transform": config.data.dense_transform,
            "mean": layout.dense_mean.tolist(),
            "std": layout.dense_std.tolist(),
        },
    }


def _build_model(config: RankingConfig, runtime: Runtime, layout: ClickLayout) -> Ranking:
    features = {name: feature_options(config, name) for name in layout.feature_names}
    return Ranking(
        ranking_tables(config, layout),
        [FeatureSpec(name, pooling=feature.pooling if feature.bag else "none") for name, feature in features.items()],
        len(layout.dense_names),
        network_options(config.ranking),
        **collection_options(config, runtime),
    )


def _build_evaluation(
    config: RankingConfig, runtime: Runtime, model: Ranking, held_out: ClickLog | None
) -> Evaluation | None:
    if held_out is None:
        return None
    return Evaluation(
        functools.partial(measure_ranking, model, _held_out_batches(config, runtime, held_out)),
        every_steps=config.evaluate.every_steps,
        every_epochs=config.evaluate.every_epochs,
    )


def _held_out_batches(config: RankingConfig, runtime: Runtime, held_out: ClickLog) -> ClickBatches:
    return ClickBatches(
        held_out, config.train.global_batch_size, block_examples=config.data.block_examples, ranks=runtime.ranks
    )


def _pretrained(config: RankingConfig, layout: ClickLayout) -> dict[str, Pretrained]:
    found = {}
    for name, feature in config.data.features.items():
        if feature.init_from is None:
            continue
        if _encodings(config)[name] == "hash":
            raise UserError(
                f"data.features.{name}.init_from needs rows with names, but rows of {name} are hash buckets of several "
                f"values: set data.features.{name}.encoding=vocabulary and leave out num_rows"
            )
        found[name] = Pretrained(feature.init_from, functools.partial(_rows_of_names, layout, name))
    return found


def _encodings(config: RankingConfig) -> dict[str, Encoding]:
    return {column.name: column.encoding for column in click_schema(config.data).categorical}


def _rows_of_names(layout: ClickLayout, name: str) -> Mapping[str, int]:
    """Returns the row names of a column that is not hashed."""
    vocabulary = layout.vocabulary(name)
    names = of_ids(layout.num_rows[name]) if vocabulary is None else of_values(vocabulary, has_others=True)
    return names.rows


def _names_facts(config: RankingConfig, layout: ClickLayout) -> dict[str, Source]:
    """Returns the checkpoint's entries for the row names of each table."""
    found = {}
    for name, encoding in _encodings(config).items():
        if encoding == "vocabulary":
            vocabulary = layout.vocabulary(name)
            assert vocabulary is not None
            found[name] = values_source(name, vocabulary)
        else:
            found[name] = HASHES if encoding == "hash" else IDS
    return found


def _write_files(data: ClicksOfRun, folder: RunFolder) -> None:
    """Writes the vocabularies and, if they are small enough, the held-out examples to the run folder."""
    _write_vocabularies(data.layout, folder)
    if data.held_out is None:
        folder.keep_data({})
    else:
        folder.keep_data(asdict(_KeptFacts(data.fingerprint)), data.held_out.path)


def _write_vocabularies(layout: ClickLayout, folder: RunFolder) -> None:
    for name in layout.feature_names:
        if (vocabulary := layout.vocabulary(name)) is not None:
            write_values(folder.path, name, vocabulary, has_others=True)


def _heads(config: RankingConfig) -> dict[str, tuple[str, Layout]]:
    # Reading the head of a stream would lose its lines.
    keys = ("data.valid_path",) if config.data.is_stream else ("data.path", "data.valid_path")
    schema = click_schema(config.data)
    return dict.fromkeys(keys, (schema.reader, schema.layout))


RECIPE = Recipe(
    config=RankingConfig,
    prepare=prepare,
    build=build,
    workload=workload,
    heads=_heads,
    check=check,
    draft=draft,
    held_out="data.valid_path",
    grow=Grow(
        base_files=base_files,
        tables=lambda config, data: ranking_tables(config, data.layout),
        facts=_facts,
        write_files=lambda config, data, folder: _write_files(data, folder),
        lasting=("ranking.", "data.dense_transform "),
        inputs=network_inputs,
        same_facts=("dense",),
        write_base=write_base,
    ),
    measure=measure,
    score=ClickScorer,
    pack=pack,
    report=report,
    tuning=Tuning(
        has_validation=lambda config: config.data.valid_path is not None,
        metric=lambda config: f"{HELD_OUT}auc",
        space=lambda config: {
            "optimizer.lr": around(config.optimizer.lr, 5),
            "dense_optimizer.lr": around(config.dense_optimizer.lr, 5),
        },
    ),
)
