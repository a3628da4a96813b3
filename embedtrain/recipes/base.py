"""The `Recipe`: what a model must provide so that `embedtrain train` and the other commands can use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import torch
from torch import Tensor, nn

from embedtrain.checkpoint import CheckpointReader
from embedtrain.config.sections import CheckpointConfig, Config
from embedtrain.data.click_batches import ClickBatch
from embedtrain.data.click_schema import ClickSchema
from embedtrain.data.readers import Layout, Rows
from embedtrain.data.survey import Survey
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import Runtime
from embedtrain.embedding.collection import CollectionOptions
from embedtrain.embedding.placement import Auto, PlacementChoice
from embedtrain.export.recommendations import Recommendation
from embedtrain.export.vectors import Vectors
from embedtrain.metrics.figures import Section
from embedtrain.recipes.optimizers import optimizer_names
from embedtrain.recipes.workload import Sizes, Workload
from embedtrain.sharding.layout import read_layout
from embedtrain.spec import DEFAULT_OPTIMIZER, Init, TableSpec
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.task import Parts

_BLOCK_BYTES = 8 << 20

ConfigT = TypeVar("ConfigT", bound=Config)
DataT = TypeVar("DataT")


BASE = "base-"
"""Prefix of the names of files in a run folder that were copied from the run in `start_from`."""


def base_file(config: Config, name: str) -> str | None:
    """Returns the path of the copy of a file of the run in `start_from`; None if the run does not start from another.

    Args:
        config: configuration of the run.
        name: name of the file in the folder of the other run.
    """
    return None if config.start_from is None else RunFolder(config.run.path).join(f"{BASE}{name}")


def takes_new_names(config: Config) -> bool:
    """Returns whether new words, ids and values in the data get rows."""
    return config.start_from is None or config.start_from_grow


@dataclass(frozen=True)
class Grow(Generic[ConfigT, DataT]):
    """Describes how a run starts with the tables of another run, on other data.

    `prepare` must keep the rows of the other run's names, which it reads from `base_file`, and give rows to new names
    only if `takes_new_names` is true. Rows of both runs are matched by the names in `facts` and `write_files`.

    Attributes:
        base_files: returns the names of the files in the old run folder that `prepare` reads through `base_file`.
        tables: returns the tables for prepared data.
        facts: returns the facts of prepared data, as in `Parts.facts`.
        write_files: called on rank 0; writes the files of `Parts.write_files` to the run folder.
        data_key: key of the data, which `embedtrain grow` requires.
        lasting: prefixes of further keys that must not change, because the tensors of a checkpoint depend on them.
        inputs: returns by key the columns and widths of the dense part's inputs, in their order. They must equal those
            of the old run, because parameters of equal shape may belong to other columns. A key that only one of the
            runs has is not compared.
        same_facts: names of facts that must be equal in both runs.
        write_base: called on rank 0 with the state of the old checkpoint; writes further files that `prepare` needs.
    """

    base_files: Callable[[ConfigT], Sequence[str]]
    tables: Callable[[ConfigT, DataT], Sequence[TableSpec]]
    facts: Callable[[ConfigT, DataT], Mapping[str, Any]]
    write_files: Callable[[ConfigT, DataT, RunFolder], None]
    data_key: str = "data.path"
    lasting: Sequence[str] = ()
    inputs: Callable[[ConfigT], Mapping[str, Any]] = lambda config: {}
    same_facts: Sequence[str] = ()
    write_base: Callable[[ConfigT, Mapping[str, Any]], None] | None = None


@dataclass(frozen=True)
class Wanted:
    """Holds a request for recommendations. At most one of `users`, `items`, `history_path`, `features_path` is given.

    Attributes:
        users: raw ids of users; None for all users.
        top: number of items per user.
        leaves_out_known: whether to leave out items that a user already has in the training data or in the request.
        items: raw ids of the items of one user, who need not be in the training data.
        history_path: files of users and their items, in the format of the training data.
        features_path: files of users and their features, in the format of the training's feature files.
        index_path: approximate index that finds the items; None to compare with all items.
    """

    users: Sequence[str] | None
    top: int
    leaves_out_known: bool
    items: Sequence[str] | None = None
    history_path: str | None = None
    features_path: str | None = None
    index_path: str | None = None


class RowScorer(Protocol):
    """Computes a probability per row of a file by a trained model; see `ClickScorer`.

    Attributes:
        schema: meaning of the columns.
        ranks: the ranks that share the tables.
    """

    schema: ClickSchema
    ranks: Ranks

    def encode(self, rows: Rows, schema: ClickSchema, where: str) -> tuple[ClickBatch, dict[int, str]]:
        """Returns the usable rows as a batch, and the reasons for bad rows by line."""

    def nothing(self) -> ClickBatch:
        """Returns an empty batch."""

    def logits(self, batch: ClickBatch) -> Tensor:
        """Returns the logits of a batch, on the CPU. Collective: every rank."""


@dataclass(frozen=True)
class PackedTable:
    """Describes a table of a package.

    Attributes:
        num_rows: number of rows.
        dim: length of the vectors.
        blocks: yields the rows in order, in blocks [n, dim] of some MiB on the CPU.
    """

    num_rows: int
    dim: int
    blocks: Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class PackedNetwork:
    """Describes the network of a package.

    Attributes:
        module: the network.
        arguments: example arguments: tensors or lists of tensors, each with three rows.
        names: names of all tensors of the arguments in ONNX; empty if the network cannot be exported to ONNX.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Packed:
    """Describes the contents of a package, except the scorer.

    Attributes:
        model: kind of the package.
        step: step of the checkpoint.
        facts: JSON for the scorer: the files, and how raw values become ids and numbers.
        tables: tables by file name.
        texts: vocabularies by file name, [n] large_binary; distinct texts whose index the scorer looks up.
        network: network that maps a batch of rows to a batch of rows; None if there is none.
        programs: text of further Python files by file name; they may import `scorer`.
    """

    model: str
    step: int
    facts: Mapping[str, Any]
    tables: Mapping[str, PackedTable]
    texts: Mapping[str, pa.LargeBinaryArray]
    network: PackedNetwork | None = None
    programs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning(Generic[ConfigT]):
    """Describes how `embedtrain tune` searches for the settings of a model.

    Attributes:
        has_validation: returns whether training measures on validation data, which are neither trained on nor test
            data.
        metric: returns the measure of the validation data by which trials are compared, unless
            `checkpoint.best_metric` names one.
        space: returns the default search space by setting, such as "0.03:0.3:log" or "1,2,4".
        split_off: settings `key=value` that split off validation data; empty if the user must give validation data.
        final: settings `key=value` of the training after the search, for example to train on the validation data too.
    """

    has_validation: Callable[[ConfigT], bool]
    metric: Callable[[ConfigT], str]
    space: Callable[[ConfigT], Mapping[str, str]]
    split_off: Sequence[str] = ()
    final: Sequence[str] = ()


NETWORK_NAME = "network.pt2"
"""Name of the network's file in a package."""


@dataclass(frozen=True)
class Recipe(Generic[ConfigT, DataT]):
    """Describes a model to embedtrain's commands. Only `config`, `prepare`, `build` and `workload` are required.

    The functions that take a checkpoint get its path. "Collective" means that every rank calls the function.

    Attributes:
        config: class of the configuration.
        prepare: collective; prepares the data of a run, or opens them in the cache. Returns the data, in any form that
            `build` accepts, and the sizes of the tables.
        build: collective; builds model, optimizers and batches from a configuration and prepared data.
        workload: returns what a run needs of its machines, from a configuration and sizes; reads no data.
        heads: returns the keys of data files that may be large, each with the format and layout of the files. A dry run
            replaces these files by their first megabytes.
        check: checks the small files that a run reads later, such as questions. Called on rank 0 before the data are
            prepared; raises UserError with the key of a file that cannot be used. The second argument is whether the
            run is new: files of initial vectors are read only by new runs.
        draft: yields the lines of a first configuration from the path of data files, a survey of their columns, and the
            column to predict (None to guess it). Raises UserError if it cannot use the columns. None if the model does
            not read files with columns.
        cache_key: key of the cache folder of prepared data, which a dry run replaces. Needed with `heads`.
        held_out: key of held-out data that a run needs to be evaluated; None if a run needs no such key.
        grow: describes how a run starts with the tables of another run; None if it cannot.
        measure: collective; returns the measures of a checkpoint on the held-out data in the run folder, or on the
            files of a path if one is given. Models with `score` never get a path. None if evaluation needs `prepare`
            and `build`.
        measure_new_users: collective; returns the measures of a checkpoint on users who are not in the training data:
            the users in the files of a path, of whom a fraction of their items is known. None if unsupported.
        open: collective; opens the vectors of a checkpoint by the name of a table; None for the default table. None if
            vectors are plain rows of tables.
        recommend: collective; yields the best items of users by a checkpoint. None if unsupported.
        score: collective; opens a checkpoint to score rows of files, which the section `data` of the configuration
            describes. None if unsupported.
        pack: opens a checkpoint to write a package, in one process. None if unsupported.
        report: collective; yields the model's own sections of the report from a checkpoint, in bounded time. If it
            raises UserError, the report lacks the remaining sections. None if there are no such sections.
        tuning: describes how `embedtrain tune` searches for settings; None if it cannot.
    """

    config: type[ConfigT]
    prepare: Callable[[ConfigT, Runtime], tuple[DataT, Sizes]]
    build: Callable[[ConfigT, Runtime, DataT], Parts]
    workload: Callable[[ConfigT, Sizes], Workload]
    heads: Callable[[ConfigT], Mapping[str, tuple[str, Layout]]] = lambda config: {}
    check: Callable[[ConfigT, bool], None] = lambda config, is_new: None
    draft: Callable[[str, Survey, str | None], Iterator[str]] | None = None
    cache_key: str = "data.cache_path"
    held_out: str | None = None
    grow: Grow[ConfigT, DataT] | None = None
    measure: Callable[[ConfigT, Runtime, str, str | None], Mapping[str, float]] | None = None
    measure_new_users: Callable[[ConfigT, Runtime, str, str, float], Mapping[str, float]] | None = None
    open: Callable[[ConfigT, Runtime, str, str | None], Vectors] | None = None
    recommend: Callable[[ConfigT, Runtime, str, Wanted], Iterator[list[Recommendation]]] | None = None
    score: Callable[[ConfigT, Runtime, str], RowScorer] | None = None
    pack: Callable[[ConfigT, Runtime, str], AbstractContextManager[Packed]] | None = None
    report: Callable[[ConfigT, Runtime, str], Iterator[Section]] | None = None
    tuning: Tuning[ConfigT] | None = None


def around(value: float, factor: float) -> str:
    """Returns a logarithmic range for `Tuning.space`, from `value / factor` to `value * factor`."""
    return f"{value / factor:.4g}:{value * factor:.4g}:log"


def table_spec(
    config: Config,
    name: str,
    num_rows: int,
    *,
    dim: int | None = None,
    init: Init = "uniform",
    init_scale: float | None = None,
) -> TableSpec:
    """Returns the declaration of a table with the dtype, dim and optimizer of a configuration.

    Args:
        config: configuration of the run.
        name: name of the table.
        num_rows: number of rows.
        dim: length of the vectors; None for `table.dim`.
        init: distribution of the initial values; see `TableSpec`.
        init_scale: see `TableSpec`.
    """
    return TableSpec(
        name,
        num_rows,
        config.table.dim if dim is None else dim,
        dtype=getattr(torch, config.table.dtype),
        init=init,
        init_scale=init_scale,
        optimizer=optimizer_names(config.optimizer).get(name, DEFAULT_OPTIMIZER),
    )


def save_bytes_of(checkpoint: CheckpointConfig) -> int | None:
    """Returns the maximum memory of a background save on a rank, in bytes; None for no limit."""
    return checkpoint.max_extra_memory_bytes if checkpoint.mode == "async" else 0


def collection_options(config: Config, runtime: Runtime, *, is_trained: bool = True) -> CollectionOptions:
    """Returns the options of an `EmbeddingCollection` for a configuration.

    Args:
        config: configuration of the run.
        runtime: runtime of this process.
        is_trained: whether the tables are trained; then "auto" placement reserves memory for background saves.
    """
    table = config.table
    placement: PlacementChoice | Auto = table.placement
    if placement == "auto" and is_trained:
        placement = Auto(save_bytes_of(config.checkpoint) or 0)  # without a limit, nothing can be reserved
    return CollectionOptions(
        device=runtime.device,
        ranks=runtime.ranks,
        seed=config.seed,
        wire_dtype=None if table.wire_dtype is None else getattr(torch, table.wire_dtype),
        placement=placement,
        cache_bytes=table.cache_bytes,
    )


def table_blocks(reader: CheckpointReader, spec: TableSpec) -> Iterator[Tensor]:
    """Yields the rows of a checkpoint's table in the order of ids, in blocks of some MiB."""
    name = f"{spec.name}/weight"
    layout = read_layout(reader.tensors[name].layout, spec.num_rows, spec.name)
    at_once = max(1, _BLOCK_BYTES // (4 * spec.dim))
    for start in range(0, spec.num_rows, at_once):
        ids = torch.arange(start, min(start + at_once, spec.num_rows))
        yield reader.gather(name, layout.slot_of(ids))
