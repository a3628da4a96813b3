"""What a model brings to be trained by `embedtrain train`: a recipe."""

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
"""Begins the names of the files in a run folder that hold what another run, from which this one was started, knew."""


def base_file(config: Config, name: str) -> str | None:
    """Returns where a run keeps a file of the run that it was started from; None if it was not started from one.

    Args:
        config: of the run.
        name: of the file in the folder of the other run.
    """
    return None if config.start_from is None else RunFolder(config.run.path).join(f"{BASE}{name}")


def takes_new_names(config: Config) -> bool:
    """Returns whether words, ids and values without a row get one."""
    return config.start_from is None or config.start_from_grow


@dataclass(frozen=True)
class Grow(Generic[ConfigT, DataT]):
    """How a run goes on with the tables of another, for other data.

    `prepare` is told by `base_file` and `takes_new_names` which names have rows already, and whether others get one.
    The names that `facts` and `write_files` give to the rows of the new run say which old row is whose.

    Attributes:
        base_files: returns the files of the old run folder that `prepare` reads from `base_file`.
        tables: returns the tables for prepared data.
        facts: returns the facts of prepared data, as `Parts.facts`.
        write_files: called on rank 0; writes to the run folder what `Parts.write_files` writes.
        data_key: the key of the data, which must be given anew to `embedtrain grow`.
        lasting: beginnings of the keys on which the tensors of a checkpoint depend, beside those of all models.
        inputs: returns, by key, the columns and widths that the dense part takes, in its order, given or by default;
            they must be those of the old run, since parameters of the same shape may be of other columns.
            A key that only one of the runs has is not compared.
        same_facts: facts that must be those of the old run.
        write_base: called on rank 0 with the state of the old checkpoint; writes what else `prepare` needs of it.
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
    """Which recommendations are asked for.

    Attributes:
        users: raw ids; None for all users.
        top: how many items each.
        leaves_out_known: whether to leave out the items that a user has: in the training data, or else as given here.
        items: raw ids of items that a user has who was not in the training, in place of `users`.
        history_path: files of users and their items, in place of `users`, in the format of the training data.
        features_path: files of users and their features, in place of `users`, in the format of those of the training.
        index_path: an index that finds the items, and may miss some; None to compare with all of them.
    """

    users: Sequence[str] | None
    top: int
    leaves_out_known: bool
    items: Sequence[str] | None = None
    history_path: str | None = None
    features_path: str | None = None
    index_path: str | None = None


class RowScorer(Protocol):
    """A trained model that gives each row of a file a probability; see `ClickScorer`.

    Attributes:
        schema: what the columns mean.
        ranks: those that share the tables.
    """

    schema: ClickSchema
    ranks: Ranks

    def encode(self, rows: Rows, schema: ClickSchema, where: str) -> tuple[ClickBatch, dict[int, str]]:
        """Returns the rows that can be used, as a batch, and what is wrong with the others, by line."""

    def nothing(self) -> ClickBatch:
        """Returns a batch of no rows."""

    def logits(self, batch: ClickBatch) -> Tensor:
        """Returns the logits of a batch, on the CPU. Collective: every rank."""


@dataclass(frozen=True)
class PackedTable:
    """A table of a package.

    Attributes:
        num_rows: rows.
        dim: columns.
        blocks: yields the rows in order, [n, dim] on the CPU, some MiB at a time.
    """

    num_rows: int
    dim: int
    blocks: Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class PackedNetwork:
    """The network of a package, and what it takes.

    Attributes:
        module: the network.
        arguments: examples of what it takes: tensors, or lists of them, each of three rows.
        names: of the inputs in ONNX, list after list; none if it cannot be written as ONNX.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Packed:
    """What a package consists of, beside the scorer.

    Attributes:
        model: the kind of the package.
        step: of the checkpoint.
        facts: JSON; what the scorer has to know of the files, and of how rows become ids and numbers.
        tables: by file name.
        texts: by file name, [n] large_binary; different texts, whose place in the list is wanted.
        network: returns a row for each row that it is given; None without one.
        programs: by file name, the text of further Python files, which may import `scorer`.
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
    """How `embedtrain tune` searches for the settings of a model.

    Attributes:
        has_validation: whether training measures itself on data that are neither trained on nor the test part.
        metric: returns the measure of these data that trials are judged by, unless `checkpoint.best_metric` names one.
        space: returns, by setting, what is searched by default: "0.03:0.3:log" or "1,2,4".
        split_off: settings, `key=value` each, that split validation data off; empty if they must be given.
        final: settings of the training that follows the search, such as on the validation data too.
    """

    has_validation: Callable[[ConfigT], bool]
    metric: Callable[[ConfigT], str]
    space: Callable[[ConfigT], Mapping[str, str]]
    split_off: Sequence[str] = ()
    final: Sequence[str] = ()


NETWORK_NAME = "network.pt2"
"""The file of the network in a package."""


@dataclass(frozen=True)
class Recipe(Generic[ConfigT, DataT]):
    """All that embedtrain has to know of a model.

    Attributes:
        config: the class of its configuration.
        prepare: collective; prepares the data of a run or finds them in a cache. Returns the data in any form, for
            `build`, and the sizes that they give the tables.
        build: collective; builds model, optimizers and batches from a configuration and prepared data.
        workload: returns what a run asks of its machines, from a configuration and sizes; no data are read.
        heads: returns the keys of data that may be large, each with the format and layout of its files. A dry run
            replaces them by their first megabytes.
        check: opens and parses the small files that a run reads later, such as questions; called on rank 0 before the
            data are prepared, and raises UserError with the key of what cannot be used. Its second argument says
            whether the run is new: vectors that tables start from are not read again if there is a checkpoint.
        draft: yields the lines of a first configuration, from the path of files of rows, what their columns hold, and
            the column to predict, None to guess it; raises UserError if it cannot use the columns. None if the model
            reads no rows.
        cache_key: the key of the folder of prepared data; a dry run gives it a folder of its own. Needed with `heads`.
        held_out: the key of held-out data, without which a run is not evaluated; None if a run needs no such key.
        grow: how a trained run gets rows for new names; None if it cannot.
        measure: collective; returns the measures of a checkpoint, given by its path, from what lies in the run folder;
            on the held-out data of a path if one is given, which none is if the model scores rows. None if the data of
            the run have to be prepared for that.
        measure_new_users: collective; returns the measures of a checkpoint, given by its path, on users who were not in
            the training: those of the files of a path, each known by a fraction of their items. None if the model
            cannot.
        open: collective; opens the vectors of a checkpoint by the name of a table, None for the usual one. None if the
            vectors are rows of its tables.
        recommend: collective; yields the best items of users by a checkpoint. None if the model does not recommend.
        score: collective; opens a checkpoint, given by its path, to score rows of files. The section `data` of the
            configuration describes these files. None if the model does not score rows.
        pack: opens a checkpoint, given by its path, to write a package; for one process. None if the model cannot be
            packed.
        report: collective; yields what the report says of this model alone, from a checkpoint given by its path: charts
            and tables that take a bounded time. If it raises UserError, the report is without the rest. None if the
            report has nothing to add to the curves.
        tuning: how `embedtrain tune` searches for its settings; None if it cannot.
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
    """Returns a range of `Tuning.space` around a setting's value, on a logarithmic scale."""
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
    """Returns a table as a configuration stores and trains it.

    Args:
        config: of the run.
        name: of the table.
        num_rows: rows.
        dim: columns; None for `table.dim`.
        init: distribution of the first values; see `TableSpec`.
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
    """Returns how much memory a rank's save in the background may take; None for no bound."""
    return checkpoint.max_extra_memory_bytes if checkpoint.mode == "async" else 0


def collection_options(config: Config, runtime: Runtime, *, is_trained: bool = True) -> CollectionOptions:
    """Returns the options of an `EmbeddingCollection` that a configuration gives.

    Args:
        config: its section `table`, above all.
        runtime: of this process.
        is_trained: whether the tables are trained, and so saved meanwhile.
    """
    table = config.table
    placement: PlacementChoice | Auto = table.placement
    if placement == "auto" and is_trained:
        placement = Auto(save_bytes_of(config.checkpoint) or 0)  # without a bound, nothing can be left for it
    return CollectionOptions(
        device=runtime.device,
        ranks=runtime.ranks,
        seed=config.seed,
        wire_dtype=None if table.wire_dtype is None else getattr(torch, table.wire_dtype),
        placement=placement,
        cache_bytes=table.cache_bytes,
    )


def table_blocks(reader: CheckpointReader, spec: TableSpec) -> Iterator[Tensor]:
    """Yields the rows of a table of a checkpoint in the order of the ids, some MiB at a time."""
    name = f"{spec.name}/weight"
    layout = read_layout(reader.tensors[name].layout, spec.num_rows, spec.name)
    at_once = max(1, _BLOCK_BYTES // (4 * spec.dim))
    for start in range(0, spec.num_rows, at_once):
        ids = torch.arange(start, min(start + at_once, spec.num_rows))
        yield reader.gather(name, layout.slot_of(ids))
