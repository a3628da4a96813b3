"""The recipe of word2vec."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from embedtrain.checkpoint import CheckpointReader
from embedtrain.data.baskets import write_baskets
from embedtrain.data.corpus import PreparedCorpus
from embedtrain.data.prepare import CorpusOptions, prepare_corpus
from embedtrain.data.readers import Layout
from embedtrain.data.readers.blocks import read_lines
from embedtrain.data.row_names import STATE_KEY, VOCABULARY_NAME, read_row_names, vocabulary_source
from embedtrain.data.seal import Unverified
from embedtrain.data.skipgram import WORDS_AT_FIRST, SamplingOptions, TextBatches
from embedtrain.data.vector_files import check_vectors
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.distributed.runtime import Runtime
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.errors import UserError
from embedtrain.export.vectors import FloatRows
from embedtrain.jagged import Jagged
from embedtrain.metrics.figures import Section
from embedtrain.metrics.word_similarity import check_pairs, evaluate_similarity, read_pairs
from embedtrain.ops._backend.transfer import to_host
from embedtrain.optim.damping import CurvatureDamping, has_row_rates
from embedtrain.optim.optimizer import SparseOptimizer
from embedtrain.recipes.base import Grow, Recipe, Tuning, around, base_file, collection_options, takes_new_names
from embedtrain.recipes.layout import layout_of
from embedtrain.recipes.optimizers import build_optimizer, cannot_damp, optimizer_names
from embedtrain.recipes.word2vec.config import Word2VecConfig
from embedtrain.recipes.word2vec.model import INPUT, OUTPUT, Word2Vec, word2vec_tables
from embedtrain.recipes.word2vec.reporting import similarity_sections
from embedtrain.recipes.word2vec.workload import workload
from embedtrain.recipes.workload import Sizes
from embedtrain.spec import TableSpec
from embedtrain.train.calendar import Calendar
from embedtrain.train.checkpoints import load_weights
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.state import read_run_state
from embedtrain.train.task import Evaluation, Parts, Pretrained, Task

_logger = logging.getLogger(__name__)

_FEW_STEPS = 200
"""Number of steps below which a run is too short. On a text of 40,000 words with steps of 8,192 words, all cosines were
near 1 after 30 steps, and neighbours were sensible after 300."""


@dataclass(frozen=True)
class _KeptFacts:
    """Facts kept in the run folder: the lines of each file of word pairs, by path."""

    word_pairs: dict[str, list[str]]


def check(config: Word2VecConfig, is_new: bool) -> None:
    """Checks the files that a run reads besides its text, and whether the optimizer supports damping.

    Args:
        config: configuration of the run.
        is_new: whether the run has no checkpoint; only then are the files of `init_from` read.

    Raises:
        UserError: a file is missing or cannot be read, or the optimizer does not support the given damping.
    """
    if config.word2vec.damping == "curvature" and (found := cannot_damp(config.optimizer)):
        raise UserError(
            f"word2vec.damping=curvature: {found} cannot damp gradients, because the learning rate of a row is not "
            "known before a step. Use rowwise_adagrad or adagrad with initial_accumulator_value above 0, or sgd, or "
            "word2vec.damping=auto"
        )
    for path in _similarity_paths(config):
        _read_pairs(path)
    if config.init_from is not None and is_new:
        check_vectors(config.init_from, config.table.dim, "init_from")
    if config.data.base_vocabulary is not None:
        Vocabulary.load_base(config.data.base_vocabulary)


def prepare(config: Word2VecConfig, runtime: Runtime) -> tuple[PreparedCorpus, Sizes]:
    """Prepares the text of a configuration, or opens it in the cache. Collective: every rank.

    Raises:
        UserError: the text cannot be used.
    """
    corpus = _prepare_text(config, runtime)
    return corpus, Sizes(dict.fromkeys((INPUT, OUTPUT), len(corpus.vocabulary)))


def build(config: Word2VecConfig, runtime: Runtime, corpus: PreparedCorpus) -> Parts:
    """Builds the model over a prepared text. Collective: every rank.

    Raises:
        UserError: a step is too small for the ranks, or a file of the evaluation cannot be read.
    """
    model = _build_model(config, runtime, len(corpus.vocabulary))
    batches = _build_batches(config, runtime, corpus)
    optimizer = build_optimizer(config.optimizer, model.tables)
    if config.word2vec.damping != "none" and has_row_rates(optimizer):
        optimizer.preconditioner = CurvatureDamping({INPUT: OUTPUT})
        model.counts_rows = True
    _warn_of_few_steps(config, batches, optimizer, runtime)
    task = Task(
        model,
        model.tables,
        optimizer,
        batches,
        evaluation=_build_evaluation(config, model, corpus, runtime),
        unit="words",
        measures=[SIMILARITY] if _similarity_paths(config) else [],
        frequencies=dict.fromkeys((INPUT, OUTPUT), torch.from_numpy(corpus.vocabulary.counts)),
    )
    pretrained = {}
    if config.init_from is not None:
        pretrained[INPUT] = Pretrained(config.init_from, lambda: corpus.vocabulary.rows)
    write_files = functools.partial(_write_files, config, corpus)
    return Parts(task, _facts(corpus), write_files, pretrained, corpus.unverified)


def _warn_of_few_steps(
    config: Word2VecConfig, batches: TextBatches, optimizer: SparseOptimizer, runtime: Runtime
) -> None:
    """Logs a warning if a run that begins from initial values is too short.

    With damping and growing steps, long steps count as several short steps.
    """
    if config.start_from is not None or config.init_from is not None:
        return
    epochs = config.train.epochs
    num_steps = Calendar(batches).first_step_of(epochs)
    worth, per_epoch = float(num_steps), float(batches.steps_per_epoch)
    if optimizer.preconditioner is not None and batches.is_growing:
        per_epoch = batches.examples_per_epoch / WORDS_AT_FIRST
        worth = max(worth, epochs * per_epoch)
    if worth < _FEW_STEPS and runtime.rank == 0:
        # Steps that grow are short already.
        shorter = "" if batches.is_growing else ", or lower train.words_per_step with another run.path"
        _logger.warning(
            f"{num_steps} steps in all are too few for good word vectors: raise train.epochs to "
            f"{math.ceil(_FEW_STEPS / per_epoch):,} or more, which continues this run{shorter}"
        )


def _write_files(config: Word2VecConfig, corpus: PreparedCorpus, folder: RunFolder) -> None:
    """Writes the vocabulary and the word pairs of the evaluation to the run folder."""
    folder.write_vocabulary(corpus.vocabulary)
    paths = _similarity_paths(config)
    folder.keep_data(asdict(_KeptFacts({path: _read_pairs(path) for path in paths})) if paths else {})


def measure(config: Word2VecConfig, runtime: Runtime, checkpoint: str, held_out: str | None = None) -> dict[str, float]:
    """Measures a checkpoint on the word pairs in the run folder. Collective: every rank.

    Raises:
        UserError: words or pairs are missing in the run folder, or belong to another run.
    """
    if held_out is not None:
        raise UserError(f"words are measured on word tests: give --similarity {held_out} or --analogies {held_out}")
    return _word_pairs(config, runtime, checkpoint)(lambda: None)


def report(config: Word2VecConfig, runtime: Runtime, checkpoint: str) -> Iterator[Section]:
    """Yields human scores of word pairs against cosines; nothing without word pairs. Collective: every rank.

    Raises:
        UserError: words or pairs are missing in the run folder, or belong to another run.
    """
    if _similarity_paths(config):
        pairs = _word_pairs(config, runtime, checkpoint)
        yield from similarity_sections(pairs.unit_vectors(), pairs.words, pairs.lines)


def _word_pairs(config: Word2VecConfig, runtime: Runtime, checkpoint: str) -> WordSimilarity:
    """Returns the measure of a checkpoint on the word pairs in the run folder. Collective: every rank."""
    folder = RunFolder(config.run.path)
    with folder.open_data(_KeptFacts) as kept, CheckpointReader(checkpoint) as reader:
        if kept is None:
            raise UserError(
                f"{folder.kept_data_path} is missing, which holds the word pairs of evaluate.similarity: restore it, "
                "or run the training command again, which writes it again"
            )
        fingerprint = read_run_state(reader.manifest, checkpoint).data_fingerprint
        words = read_row_names(folder.path, reader.state, INPUT, reader.table(INPUT).shape[0]).words
    model = _build_model(config, runtime, len(words))
    load_weights(checkpoint, model.tables, None, fingerprint)
    return WordSimilarity(model.tables, words, kept.facts.word_pairs)


def _build_model(config: Word2VecConfig, runtime: Runtime, num_words: int) -> Word2Vec:
    return Word2Vec(
        num_words,
        config.table.dim,
        architecture=config.word2vec.architecture,
        dtype=getattr(torch, config.table.dtype),
        optimizers=optimizer_names(config.optimizer),
        **collection_options(config, runtime),
    )


def _facts(corpus: PreparedCorpus) -> dict[str, Any]:
    return {
        "data_fingerprint": corpus.fingerprint,
        "export_table": INPUT,
        STATE_KEY: dict.fromkeys((INPUT, OUTPUT), vocabulary_source(VOCABULARY_NAME, corpus.vocabulary)),
    }


def _build_evaluation(
    config: Word2VecConfig, model: Word2Vec, corpus: PreparedCorpus, runtime: Runtime
) -> Evaluation | None:
    paths = _similarity_paths(config)
    if not paths:
        return None
    measure = WordSimilarity(model.tables, corpus.vocabulary.words, {path: _read_pairs(path) for path in paths})
    if runtime.rank == 0:
        _tell_of_unknown_words(measure)
    return Evaluation(measure, config.evaluate.every_steps, config.evaluate.every_epochs)


def _tell_of_unknown_words(measure: WordSimilarity) -> None:
    for path, (num_unknown, num_pairs) in measure.count_unknown().items():
        if num_unknown:
            _logger.info(f"{path}: {num_unknown:,} of {num_pairs:,} pairs have an unknown word and do not count")
        if num_pairs - num_unknown < 2:
            _logger.warning(f"{path}: fewer than two pairs have known words, so {SIMILARITY} cannot be measured")


SIMILARITY = "similarity"
"""Name of the measure of word vectors."""


class WordSimilarity:
    """Measures how well the word vectors agree with human scores of word pairs.

    Args:
        tables: the tables of the model.
        words: the vocabulary, in the order of ids.
        lines: lines of each file of word pairs, by path.

    Attributes:
        words: words of the pairs that are in the vocabulary.
        lines: lines of each file of word pairs, by path.
    """

    def __init__(self, tables: EmbeddingCollection, words: Sequence[str], lines: Mapping[str, Sequence[str]]) -> None:
        self._tables = tables
        self.lines = lines
        asked = {
            word.upper()
            for path, of_file in lines.items()
            for first, second, _ in read_pairs(of_file, path)
            for word in (first, second)
        }
        # Only the words of the pairs, because the vectors of the whole vocabulary may not fit on one rank.
        ids = [number for number, word in enumerate(words) if word.upper() in asked]
        self._ids, self.words = torch.tensor(ids, dtype=torch.int64, device=tables.device), [words[i] for i in ids]

    def count_unknown(self) -> dict[str, tuple[int, int]]:
        """Returns, for each file, its number of pairs with a word out of the vocabulary, and of all pairs."""
        known = {word.upper() for word in self.words}
        counts = {}
        for path, lines in self.lines.items():
            pairs = [{first.upper(), second.upper()} for first, second, _ in read_pairs(lines, path)]
            counts[path] = sum(not pair <= known for pair in pairs), len(pairs)
        return counts

    @torch.no_grad()
    def unit_vectors(self) -> FloatRows:
        """Returns the vectors of the words, scaled to length 1. Collective: every rank."""
        vectors = self._tables({INPUT: Jagged.from_ids(self._ids)})[INPUT]
        unit: FloatRows = to_host(torch.nn.functional.normalize(vectors)).numpy()
        return unit

    def __call__(self, alive: Callable[[], None]) -> dict[str, float]:
        """Returns the mean Spearman correlation over the files. Collective: every rank."""
        unit = self.unit_vectors()
        found = [evaluate_similarity(unit, self.words, lines, source=path) for path, lines in self.lines.items()]
        alive()
        return {SIMILARITY: sum(report.spearman for report in found) / len(found)}


def _similarity_paths(config: Word2VecConfig) -> list[str]:
    return _listed(config.evaluate.similarity or [])


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _read_pairs(path: str) -> list[str]:
    try:
        lines = read_lines(path)
        check_pairs(lines, path)
    except UserError as error:
        raise UserError(f"evaluate.similarity: {error}") from error
    return lines


def _prepare_text(config: Word2VecConfig, runtime: Runtime) -> PreparedCorpus:
    data, cache_path = config.data, os.path.expanduser(config.data.cache_path)
    path, tokenizer = data.path, data.tokenizer
    unverified: Unverified = ()
    if data.format != "text":
        baskets = write_baskets(
            path,
            (data.basket_column, data.item_column),
            cache_path,
            runtime.ranks,
            format=data.format,
            layout=layout_of(data, "data"),
        )
        path, unverified, tokenizer = baskets.text_path, baskets.unverified, "whitespace"
    options = CorpusOptions(
        path=path,
        tokenizer=tokenizer,
        min_count=data.min_count,
        max_vocab_size=data.max_vocab_size,
        base_vocabulary=base_file(config, VOCABULARY_NAME) or data.base_vocabulary,
        takes_new=takes_new_names(config),
    )
    corpus = prepare_corpus(
        options,
        cache_path,
        runtime.ranks,
        unverified_sources=unverified,
        on_progress=_StageLog() if runtime.rank == 0 else None,
    )
    if corpus.num_sentences == corpus.num_tokens:
        unit, name = ("line", "words") if data.format == "text" else ("basket", "items")
        rare = f"; {name} that occur fewer than data.min_count={data.min_count} times are left out"
        raise UserError(
            f"{', '.join(_listed(data.path))}: no {unit} has two {name} of the vocabulary, so there is nothing to learn"
            f"{rare if data.min_count > 1 else ''}"
        )
    if runtime.rank == 0:
        _logger.info(
            f"text: {corpus.num_tokens:,} words of a vocabulary of {len(corpus.vocabulary):,}, in {corpus.path}"
        )
    return corpus


class _StageLog:
    """Logs the beginning of each stage of preparation."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, stage: str, fraction: float) -> None:
        if stage != self._stage:
            self._stage = stage
            _logger.info(f"preparing the text: {stage}")


def sampling_options(config: Word2VecConfig) -> SamplingOptions:
    """Returns the sampling options of a configuration."""
    settings = config.word2vec
    return SamplingOptions(
        window=settings.window,
        negatives=settings.negatives,
        sample=settings.sample,
        power=settings.power,
        negative_parts=settings.negative_parts,
    )


def _build_batches(config: Word2VecConfig, runtime: Runtime, corpus: PreparedCorpus) -> TextBatches:
    blocks_per_step = config.train.words_per_step // config.train.block_words
    if blocks_per_step < runtime.world_size:
        raise UserError(
            f"a step of train.words_per_step={config.train.words_per_step} is {blocks_per_step} blocks of "
            f"train.block_words={config.train.block_words}, too few for {runtime.world_size} ranks to share: "
            "raise the first or lower the second"
        )
    batches = TextBatches(
        corpus,
        sampling_options(config),
        block_words=config.train.block_words,
        blocks_per_step=blocks_per_step,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )
    batches.grow_steps(config.train.step_growth)
    return batches


def _heads(config: Word2VecConfig) -> dict[str, tuple[str, Layout]]:
    return {"data.path": (config.data.format, layout_of(config.data, "data"))}


def _tables(config: Word2VecConfig, corpus: PreparedCorpus) -> list[TableSpec]:
    dtype = getattr(torch, config.table.dtype)
    return word2vec_tables(len(corpus.vocabulary), config.table.dim, dtype, optimizer_names(config.optimizer))


def _search_space(config: Word2VecConfig) -> dict[str, str]:
    window = config.word2vec.window
    return {
        "optimizer.lr": around(config.optimizer.lr, 3),
        "word2vec.window": f"{max(1, window // 2)},{window},{2 * window}",
    }


RECIPE = Recipe(
    config=Word2VecConfig,
    prepare=prepare,
    build=build,
    workload=workload,
    heads=_heads,
    check=check,
    held_out="evaluate.similarity",
    grow=Grow(
        base_files=lambda config: [VOCABULARY_NAME],
        tables=_tables,
        facts=lambda config, corpus: _facts(corpus),
        write_files=_write_files,
    ),
    measure=measure,
    report=report,
    tuning=Tuning(
        has_validation=lambda config: bool(_similarity_paths(config)),
        metric=lambda config: SIMILARITY,
        space=_search_space,
    ),
)
