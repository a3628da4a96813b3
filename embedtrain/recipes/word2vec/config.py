"""The configuration of word vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from embedtrain.config.optimizer import OptimizerConfig, section
from embedtrain.config.sections import (
    MAX_WIDTH,
    Config,
    EvaluateConfig,
    LogConfig,
    RowFilesConfig,
    TableConfig,
    TrainConfig,
    file_keys,
    refuse_stream,
    require_at_least_one,
    require_paths,
)
from embedtrain.data.readers import AUTO, require_format
from embedtrain.errors import UserError
from embedtrain.recipes.layout import layout_of

_MAX_POWER = 2
"""Keeps count ** power in the range that float64 represents accurately, for counts up to about a billion."""

INPUT, OUTPUT = "input", "output"
"""Names of the tables: "input" holds the word vectors, "output" the vectors that predict neighbours."""


@dataclass
class TextConfig(RowFilesConfig):
    """Settings of the text."""

    path: str | list[str] = "???"
    """A file, a glob, a folder, or a list of them, on any fsspec URL."""
    format: str = "text"
    """text; the other formats hold baskets of items, which train as sentences (item2vec). lines has
    `user item item ...` per line; csv, tsv, jsonl and parquet have one item per row. auto chooses by the file
    suffix."""
    basket_column: str = "user"
    """csv, tsv, jsonl and parquet: column that names the basket of each item."""
    item_column: str = "item"
    """csv, tsv, jsonl and parquet: column of the items' raw ids."""
    tokenizer: str = "letters"
    """letters takes lower-cased words of letters only: node_12 becomes node, and numbers are dropped. whitespace splits
    at white space and keeps each token unchanged, such as the node ids of walks."""
    min_count: int = 5
    """Words with fewer occurrences are left out."""
    max_vocab_size: int | None = None
    """Maximum number of words, of which the most frequent are kept; null keeps all."""
    base_vocabulary: str | None = None
    """Vocabulary file that `grow` writes. Its words are kept, and its counts are added to the counts of the text."""
    cache_path: str = "~/.cache/embedtrain"
    """Local folder of the prepared text."""


@dataclass
class SkipGramConfig:
    """Settings of the model, named as in word2vec if word2vec has them."""

    architecture: Literal["skipgram", "cbow"] = "skipgram"
    """skipgram predicts each neighbour from the centre; cbow predicts the centre from the mean of its neighbours."""
    window: int = 5
    """Maximum number of neighbours on each side; each centre draws its width between 1 and this."""
    negatives: int = 5
    """Number of sampled negatives per centre."""
    sample: float = 1e-3
    """Subsampling threshold: occurrences of words above this share of the text are dropped at random; 0 keeps all."""
    power: float = 0.75
    """Negatives are drawn with probability proportional to count ** power."""
    damping: Literal["auto", "curvature", "none"] = "auto"
    """curvature damps gradients along directions in which large steps overshoot, so that steps of 524,288 words train
    as well as short ones. auto uses curvature with rowwise_adagrad, adagrad and sgd, and none with other optimizers.
    See docs/large_steps.md."""
    negative_parts: int = 16
    """Number of parts of the vocabulary. It is halved until parts have 2,000 words on average. Each block of text draws
    its negatives from one part, in turn, so the rows that are in use fit better into the processor's cache. If the
    number of ranks divides this number, ranks draw mostly from rows that they own. 1 draws from the whole vocabulary,
    as word2vec does."""


@dataclass
class TextTrainConfig(TrainConfig):
    """Settings of the training loop."""

    words_per_step: int = 524288
    """Words of the text per step, over all ranks."""
    step_growth: float | None = 0.05
    """Maximum size of early steps, as a share of the words trained so far, but not below 16,384 words or, if that is
    less, words_per_step. null gives every step words_per_step words."""
    block_words: int = 512
    """Consecutive words that are read together; a step consists of whole blocks from random positions of the text."""


@dataclass
class WordEvaluateConfig(EvaluateConfig):
    """Says how to measure word similarity during training."""

    similarity: str | list[str] | None = None
    """File of `word word score` lines, or a list of files; null for none. The mean over the files is logged as
    `similarity`."""


@dataclass
class Word2VecConfig(Config):
    """The configuration of a word2vec run."""

    model: Literal["word2vec"] = "word2vec"
    init_from: str | None = None
    """File of initial word vectors, in any format that `export` writes, or of fastText or GloVe; null for none."""
    data: TextConfig = field(default_factory=TextConfig)
    table: TableConfig = field(default_factory=TableConfig)
    word2vec: SkipGramConfig = field(default_factory=SkipGramConfig)
    train: TextTrainConfig = field(default_factory=TextTrainConfig)
    evaluate: WordEvaluateConfig = field(default_factory=WordEvaluateConfig)
    # Steps are long, so a run has few of them.
    log: LogConfig = field(default_factory=lambda: LogConfig(every_steps=10))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: section("rowwise_adagrad", lr=0.7, initial_accumulator_value=100.0)
    )

    MEANT: ClassVar[Mapping[str, str]] = {
        **Config.MEANT,
        "batch_size": "train.words_per_step",
        "vector_size": "table.dim",
        "size": "table.dim",
        "negative": "word2vec.negatives",
        "sg": "word2vec.architecture",
        "corpus": "data.path",
        "pretrained": "init_from",
    }
    # The text is compared by content, so its path may change.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *Config.MAY_CHANGE,
        *file_keys("data"),
        "data.base_vocabulary",
        "data.cache_path",
        "evaluate.",
    )

    def table_names(self) -> list[str]:
        """Returns the table of the word vectors, and the table of the vectors that predict neighbours."""
        return [INPUT, OUTPUT]

    def check(self) -> None:
        """Checks ranges that types do not express."""
        super().check()
        refuse_stream(self.data.path, "the words of a text are counted before training")
        require_paths({"data.path": self.data.path})
        require_format(self.data.format, ("text", AUTO), "data.format")
        layout_of(self.data, "data")
        require_paths({"evaluate.similarity": self.evaluate.similarity}, may_be_none=True)
        counts = {
            "table.dim": self.table.dim,
            "train.words_per_step": self.train.words_per_step,
            "train.block_words": self.train.block_words,
            "data.min_count": self.data.min_count,
            "data.max_vocab_size": self.data.max_vocab_size,
            "word2vec.negative_parts": self.word2vec.negative_parts,
            "evaluate.every_epochs": self.evaluate.every_epochs,
            "evaluate.every_steps": self.evaluate.every_steps,
        }
        require_at_least_one(iter(counts.items()))
        widths = {"word2vec.window": self.word2vec.window, "word2vec.negatives": self.word2vec.negatives}
        require_at_least_one(iter(widths.items()), at_most=MAX_WIDTH)
        if not -_MAX_POWER <= self.word2vec.power <= _MAX_POWER:
            raise UserError(f"word2vec.power must be in [{-_MAX_POWER}, {_MAX_POWER}], got {self.word2vec.power}")
        if not 0 <= self.word2vec.sample < 1:
            raise UserError(f"word2vec.sample must be a share in [0, 1), got {self.word2vec.sample}")
        growth = self.train.step_growth
        if growth is not None and not 0 < growth <= 1:
            raise UserError(f"train.step_growth must be a share in (0, 1] or null, got {growth}")
        words, block_words = self.train.words_per_step, self.train.block_words
        if words % block_words:
            raise UserError(
                f"train.words_per_step must be a multiple of train.block_words, got {words} and {block_words}: "
                f"train.words_per_step={max(1, words // block_words) * block_words} would do"
            )
