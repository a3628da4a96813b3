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
"""A count of a billion to a power much larger is past what a floating-point number holds to the unit."""

INPUT, OUTPUT = "input", "output"
"""The tables: "input" holds the word vectors, "output" the vectors that predict their neighbours."""


@dataclass
class TextConfig(RowFilesConfig):
    """The text."""

    path: str | list[str] = "???"
    """A file, a glob, a folder, a list of them, on any fsspec URL."""
    format: str = "text"
    """text; or baskets of items, which word2vec takes for sentences (item2vec): lines of `user item item ...`, or
    a table with one item per row: csv, tsv, jsonl, parquet; auto goes by the suffix."""
    basket_column: str = "user"
    """Of a table of items: the column by which they stand together."""
    item_column: str = "item"
    """Of a table of items: the column of the items' raw ids."""
    tokenizer: str = "letters"
    """letters: lower-cased words of letters, so that node_12 becomes node, and numbers are dropped; whitespace: what
    stands between spaces, as it is, such as the ids of walks."""
    min_count: int = 5
    """Words seen less often are left out."""
    max_vocab_size: int | None = None
    """At most so many words, the most frequent ones; null for all."""
    base_vocabulary: str | None = None
    """A file of words, as `grow` writes one, that are kept and whose counts are added to those of the text."""
    cache_path: str = "~/.cache/embedtrain"
    """Local folder for the prepared text."""


@dataclass
class SkipGramConfig:
    """word2vec's own settings; its own names if it has them."""

    architecture: Literal["skipgram", "cbow"] = "skipgram"
    """skipgram predicts each neighbour from the centre; cbow predicts the centre from the mean of its neighbours."""
    window: int = 5
    """Most words to each side; each centre draws its own width."""
    negatives: int = 5
    """Negative words a centre."""
    sample: float = 1e-3
    """Words above this share of the text are subsampled; 0 keeps all."""
    power: float = 0.75
    """Negatives are drawn by count ** power."""
    damping: Literal["auto", "curvature", "none"] = "auto"
    """curvature damps gradients along the directions in which large steps would overshoot, so that steps of 131,072
    words train as well as short ones; auto does so with any optimizer that it can be done with: rowwise_adagrad,
    adagrad and sgd. See docs/large_steps.md."""
    negative_parts: int = 4
    """A block of text draws its negatives from one of so many parts of the vocabulary, each in turn, of 1,000 words at
    least: ranks that divide the parts draw from rows that they own. 1: from all, as word2vec does."""


@dataclass
class TextTrainConfig(TrainConfig):
    """The loop over a text."""

    words_per_step: int = 131072
    """Words of the text between two updates, over all ranks."""
    step_growth: float | None = 0.1
    """The first steps are shorter: of at most this share of the words so far, and of 16,384 words at least. null: all
    steps are of words_per_step."""
    block_words: int = 512
    """Consecutive words that are read together; a step is made of whole blocks from all over the text."""


@dataclass
class WordEvaluateConfig(EvaluateConfig):
    """Agreement with people's scores of word pairs during training."""

    similarity: str | list[str] | None = None
    """A file of `word word score` lines, or a list of them; null for none. Logged as `similarity`, their mean."""


@dataclass
class Word2VecConfig(Config):
    """Everything that defines a run of word2vec."""

    model: Literal["word2vec"] = "word2vec"
    init_from: str | None = None
    """A file of vectors by word, of any format that `export` writes or of fastText or GloVe, that words start from."""
    data: TextConfig = field(default_factory=TextConfig)
    table: TableConfig = field(default_factory=TableConfig)
    word2vec: SkipGramConfig = field(default_factory=SkipGramConfig)
    train: TextTrainConfig = field(default_factory=TextTrainConfig)
    evaluate: WordEvaluateConfig = field(default_factory=WordEvaluateConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: section("rowwise_adagrad", lr=0.8, initial_accumulator_value=100.0)
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
    # Whether the text is the same is judged by its content.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *Config.MAY_CHANGE,
        *file_keys("data"),
        "data.base_vocabulary",
        "data.cache_path",
        "evaluate.",
    )

    def table_names(self) -> list[str]:
        """Returns the table of the words' vectors, and the table of the vectors that predict their neighbours."""
        return [INPUT, OUTPUT]

    def check(self) -> None:
        """Checks the ranges that types cannot say."""
        super().check()
        refuse_stream(self.data.path, "the words of a text are counted before it is trained on")
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
        if self.train.words_per_step % self.train.block_words:
            raise UserError(
                f"train.words_per_step must be a multiple of train.block_words, got {self.train.words_per_step} "
                f"and {self.train.block_words}"
            )
