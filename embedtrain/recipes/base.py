"""What a model brings to be trained by `embedtrain train`: a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from embedtrain.config.sections import Config, TableConfig
from embedtrain.data.readers import Layout
from embedtrain.data.survey import Survey
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.distributed.runtime import Runtime
from embedtrain.embedding.collection import CollectionOptions
from embedtrain.export.recommendations import Recommendation
from embedtrain.export.vectors import Vectors
from embedtrain.recipes.optimizers import optimizer_names
from embedtrain.recipes.workload import Sizes, Workload
from embedtrain.spec import DEFAULT_OPTIMIZER, Init, TableSpec
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.task import Parts

ConfigT = TypeVar("ConfigT", bound=Config)
DataT = TypeVar("DataT")


@dataclass(frozen=True)
class Names:
    """A file of names in the run folder: line n names row n of its tables.

    Attributes:
        file_name: such as "vocabulary.tsv".
        tables: the tables whose rows it names.
        base_key: the key under which a grown run's configuration gives the old names to the preparation of new data.
        init_key: the key of the vectors that these tables start from; null in a grown run.
    """

    file_name: str
    tables: tuple[str, ...]
    base_key: str
    init_key: str


@dataclass(frozen=True)
class Grow(Generic[ConfigT, DataT]):
    """How a trained run gets rows for new names.

    Attributes:
        names: the files of names; a model with a table that none of them names cannot grow.
        vocabularies: returns the names that prepared data have, in the order of `names`.
        tables: returns the tables for prepared data.
        facts: returns the facts of prepared data, as `Parts.facts`.
        write_files: called on rank 0; writes to the run folder what of prepared data the answers of a run need, beside
            the names.
        data_key: the key of the data, which must be given anew.
    """

    names: Sequence[Names]
    vocabularies: Callable[[DataT], Sequence[Vocabulary]]
    tables: Callable[[ConfigT, DataT], Sequence[TableSpec]]
    facts: Callable[[DataT], Mapping[str, Any]]
    data_key: str = "data.path"
    write_files: Callable[[DataT, RunFolder], None] = lambda data, folder: None


@dataclass(frozen=True)
class Wanted:
    """Which recommendations are asked for.

    Attributes:
        users: raw ids; None for all users.
        top: how many items each.
        leaves_out_known: whether to leave out the items that a user has in the training data.
    """

    users: Sequence[str] | None
    top: int
    leaves_out_known: bool


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
            data are prepared, and raises UserError with the key of what cannot be used.
        draft: yields the lines of a first configuration, from the path of files of rows, what their columns hold, and
            the column to predict, None to guess it; raises UserError if it cannot use the columns. None if the model
            reads no rows.
        cache_key: the key of the folder of prepared data; a dry run gives it a folder of its own. Needed with `heads`.
        held_out: the key of held-out data, without which a run is not evaluated; None if a run needs no such key.
        grow: how a trained run gets rows for new names; None if it cannot.
        measure: collective; returns the measures of a checkpoint, given by its path, from what lies in the run folder.
            None if the data of the run have to be prepared for that.
        open: collective; opens the vectors of a checkpoint by the name of a table, None for the usual one. None if the
            vectors are rows of its tables.
        recommend: collective; yields the best items of users by a checkpoint. None if the model does not recommend.
    """

    config: type[ConfigT]
    prepare: Callable[[ConfigT, Runtime], tuple[DataT, Sizes]]
    build: Callable[[ConfigT, Runtime, DataT], Parts]
    workload: Callable[[ConfigT, Sizes], Workload]
    heads: Callable[[ConfigT], Mapping[str, tuple[str, Layout]]] = lambda config: {}
    check: Callable[[ConfigT], None] = lambda config: None
    draft: Callable[[str, Survey, str | None], Iterator[str]] | None = None
    cache_key: str = "data.cache_path"
    held_out: str | None = None
    grow: Grow[ConfigT, DataT] | None = None
    measure: Callable[[ConfigT, Runtime, str], Mapping[str, float]] | None = None
    open: Callable[[ConfigT, Runtime, str, str | None], Vectors] | None = None
    recommend: Callable[[ConfigT, Runtime, str, Wanted], Iterator[list[Recommendation]]] | None = None


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


def collection_options(table: TableConfig, runtime: Runtime, seed: int) -> CollectionOptions:
    """Returns the options of an `EmbeddingCollection` that the section `table` gives."""
    return CollectionOptions(
        device=runtime.device,
        ranks=runtime.ranks,
        seed=seed,
        wire_dtype=None if table.wire_dtype is None else getattr(torch, table.wire_dtype),
        placement=table.placement,
        cache_bytes=table.cache_bytes,
    )
