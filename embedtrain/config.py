"""A run's configuration: defaults, then a YAML file, then `key=value` on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from embedtrain.errors import UserError


@dataclass
class RunConfig:
    """The run itself."""

    path: str = "runs/default"
    """Folder of the run, any fsspec URL; the same command resumes what lies there."""
    device: str = "auto"
    """auto (a GPU a rank where there are any), cpu or cuda."""
    timeout_seconds: float = 600.0
    """How long a collective waits for a rank before the run fails."""


@dataclass
class DataConfig:
    """The text."""

    path: Any = "???"
    """A file, a glob, a folder, a list of them, on any fsspec URL; or python-docs."""
    tokenizer: str = "letters"
    """letters (lower-cased words of letters) or whitespace (as it stands)."""
    min_count: int = 5
    """Words seen less often are left out."""
    max_vocab_size: int | None = None
    """At most so many words, the most frequent ones; null for all."""
    cache_path: str = "~/.cache/embedtrain"
    """Local folder for the prepared text."""


@dataclass
class TableConfig:
    """The two tables of a word2vec model."""

    dim: int = 100
    """Columns."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the rows."""
    wire_dtype: Literal["float32", "bfloat16"] | None = None
    """In which vectors and gradients travel between ranks; null: as stored, and float32."""


@dataclass
class Word2VecConfig:
    """word2vec's own settings; its names where it has them."""

    architecture: Literal["skipgram", "cbow"] = "skipgram"
    window: int = 5
    """Most words to each side; each centre draws its own width."""
    negatives: int = 5
    """Negative words a centre."""
    sample: float = 1e-3
    """Words above this share of the text are subsampled; 0 keeps all."""
    power: float = 0.75
    """Negatives are drawn by count ** power."""


@dataclass
class TrainConfig:
    """The loop."""

    epochs: int = 5
    """Passes over the text."""
    words_per_step: int = 8192
    """Words of the text between two updates, over all ranks."""
    block_words: int = 512
    """Consecutive words that are read together; a step is made of whole blocks from all over the text."""


@dataclass
class OptimizerConfig:
    """Row-wise Adagrad; see `embedtrain.optim.RowwiseAdagrad`."""

    name: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    lr: float = 0.6
    eps: float = 1e-10
    initial_accumulator_value: float = 100.0
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    max_grad_norm: float | None = None
    nonfinite: Literal["error", "skip"] = "error"


@dataclass
class ScheduleConfig:
    """The learning rate over the run."""

    name: Literal["constant", "linear", "cosine"] = "linear"
    min_factor: float = 1e-4
    """The rate does not fall below this factor of optimizer.lr."""


@dataclass
class CheckpointConfig:
    """When to save; the end of the run is always saved."""

    every_steps: int | None = None
    every_seconds: float | None = 600.0
    mode: Literal["async", "sync"] = "async"
    """async writes in the background while training goes on; sync writes before it goes on."""
    max_extra_memory_bytes: int | None = 2**30
    """Bound on a rank's copies of rows that change during a save in the background; null for none."""
    max_failures: int = 3
    """Failed saves in a row that are only warned of."""
    full_every: int = 1
    """Each so manieth save holds all rows, those between only the rows touched since the last; 1 for all rows."""
    keep_last: int | None = 3
    """How many of the newest stay. Where keep_last, keep_every and keep_best are null, all stay."""
    keep_every: int | None = None
    """Checkpoints stay whose step is a multiple of this."""
    keep_best: int | None = None
    """How many of the best by best_metric stay."""
    best_metric: str = "loss"
    """A name in metrics.jsonl; its newest value when the checkpoint is saved counts."""
    best_mode: Literal["min", "max"] = "min"


@dataclass
class ResumeConfig:
    """How a run comes back from its newest checkpoint."""

    on_corrupt: Literal["error", "fallback"] = "error"
    """error refuses a damaged one; fallback takes the newest older one that is whole, and deletes the damaged."""
    convert_dtype: bool = False
    """Whether table.dtype may differ from the checkpoint's."""
    optimizer_state: Literal["require", "reset"] = "require"
    """reset starts the optimizer's state anew."""
    tables: list[str] | None = None
    """Load these tables only and start the others anew; null for all."""


@dataclass
class LogConfig:
    """What is shown and kept."""

    every_steps: int = 50
    tensorboard: bool = True
    """Also write scalars for TensorBoard into the run folder, where that is local."""


@dataclass
class Config:
    """Everything that defines a run."""

    model: Literal["word2vec"] = "word2vec"
    seed: int = 1
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    table: TableConfig = field(default_factory=TableConfig)
    word2vec: Word2VecConfig = field(default_factory=Word2VecConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    log: LogConfig = field(default_factory=LogConfig)


_MAY_CHANGE = ("run.", "checkpoint.", "resume.", "log.", "data.path", "data.cache_path")
"""Keys that a resumed run may give anew; whether the text is the same is judged by its content."""


_MEANT = {
    "learning_rate": "optimizer.lr",
    "alpha": "optimizer.lr",
    "batch_size": "train.words_per_step",
    "vector_size": "table.dim",
    "size": "table.dim",
    "iter": "train.epochs",
    "negative": "word2vec.negatives",
    "sg": "word2vec.architecture",
    "corpus": "data.path",
    "output": "run.path",
}
"""Names that other programs have for our keys, too far from them for a search by spelling."""


def load_config(path: str | None, overrides: Sequence[str]) -> Config:
    """Reads and checks a configuration.

    Args:
        path: a YAML file; None for the defaults.
        overrides: `key=value` each.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong; the message says what was meant.
    """
    merged = OmegaConf.structured(Config)
    layers: list[tuple[str, Any]] = []
    if path is not None:
        layers.append((path, _read_yaml(path)))
    layers.extend((f"{override!r}", _parse_override(override)) for override in overrides)
    for source, layer in layers:
        _refuse_unknown_keys(source, layer)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise UserError(f"{source}: {_explain(error)}") from error
    try:
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error
    _check(config)
    return config


def to_yaml(config: Config) -> str:
    """Returns the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differing_keys(first_yaml: str, second_yaml: str, may_change: tuple[str, ...] = ()) -> list[str]:
    """Returns the keys in which two resolved configurations differ, of those that define what is trained.

    Args:
        first_yaml: the configuration that was.
        second_yaml: the configuration that is.
        may_change: beginnings of further keys that may differ.
    """
    first, second = (dict(_flatten(OmegaConf.create(text))) for text in (first_yaml, second_yaml))
    return [
        f"{key} (was {first.get(key, 'absent')}, is {second.get(key, 'absent')})"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key) and not key.startswith(_MAY_CHANGE + may_change)
    ]


def _read_yaml(path: str) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no configuration file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a configuration: {error}") from error
    except Exception as error:  # yaml's own errors have no common base that omegaconf exports
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: expected keys and values, got a list")
    return loaded


def _parse_override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise UserError(f"expected key=value, such as optimizer.lr=0.1, got {override!r}")
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:
        raise UserError(f"{override!r} is not a key and a value: {' '.join(str(error).split())}") from error


def _refuse_unknown_keys(source: str, layer: DictConfig) -> None:
    known = [key for key, _ in _flatten(OmegaConf.structured(Config))]
    sections = {key.rpartition(".")[0] for key in known if "." in key}
    for key, _ in _flatten(layer):
        if key in known or key in sections:
            continue
        meant = _MEANT.get(key.rpartition(".")[2])
        near = [meant] if meant else difflib.get_close_matches(key, known + sorted(sections), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
        raise UserError(f"{source}: there is no key {key}; {hint}")


def _explain(error: OmegaConfBaseException) -> str:
    """Returns the first line of omegaconf's message, with the key."""
    first_line = (error.msg or str(error)).splitlines()[0]
    return f"{error.full_key}: {first_line}" if error.full_key else first_line


def _flatten(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key in node:
        full_key = f"{prefix}{key}"
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(value, DictConfig):
            yield from _flatten(value, f"{full_key}.")
        else:
            yield full_key, value


def _check(config: Config) -> None:
    """Checks the ranges that types cannot say."""
    at_least_one = {
        "table.dim": config.table.dim,
        "train.epochs": config.train.epochs,
        "train.words_per_step": config.train.words_per_step,
        "train.block_words": config.train.block_words,
        "word2vec.window": config.word2vec.window,
        "log.every_steps": config.log.every_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "checkpoint.full_every": config.checkpoint.full_every,
    }
    for key, value in at_least_one.items():
        if value is not None and value < 1:
            raise UserError(f"{key} must be at least 1, got {value}")
    for name in ("max_failures", "max_extra_memory_bytes"):
        setting = getattr(config.checkpoint, name)
        if setting is not None and setting < 0:
            raise UserError(f"checkpoint.{name} must be at least 0, got {setting}")
    if config.word2vec.negatives < 1:
        raise UserError(f"word2vec.negatives must be at least 1, got {config.word2vec.negatives}")
    if not 0 <= config.word2vec.sample < 1:
        raise UserError(f"word2vec.sample must be a share in [0, 1), got {config.word2vec.sample}")
    if not 0 <= config.schedule.min_factor <= 1:
        raise UserError(f"schedule.min_factor must be in [0, 1], got {config.schedule.min_factor}")
    if not config.optimizer.lr > 0:
        raise UserError(f"optimizer.lr must be positive, got {config.optimizer.lr}")
    if config.run.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"run.device must be auto, cpu or cuda, got {config.run.device!r}")
    if config.train.words_per_step % config.train.block_words:
        raise UserError(
            f"train.words_per_step must be a multiple of train.block_words, got {config.train.words_per_step} "
            f"and {config.train.block_words}"
        )
