"""Starting a table from vectors that were trained before, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.embedding.table_group import TableShard
from embedtrain.errors import UserError


@dataclass(frozen=True)
class InitCounts:
    """What became of a table that was started from a file.

    Attributes:
        num_copied: rows whose names the file has; the others keep their first values.
        num_rows: rows of the table.
        num_in_file: vectors of the file, those included that the table has no row for.
    """

    num_copied: int
    num_rows: int
    num_in_file: int


def init_from(tables: EmbeddingCollection, table: str, path: str, rows: Mapping[str, int]) -> InitCounts:
    """Copies the vectors of a file into the rows of their names; all other rows stay as they are.

    Of a name that the file has twice the first counts. The optimizer's state is not touched. Every rank reads the
    file, about 8 MiB at a time, and keeps its own rows: the result is the same on any number of ranks.

    Collective: every rank.

    Args:
        tables: the collection.
        table: name of the table to start.
        path: the file, any fsspec URL; `embedtrain.data.vector_files.read_vectors` says in which formats.
        rows: the row of each name.

    Raises:
        UserError: on every rank; there is no such file, it cannot be read, its vectors have another dim than the
            table or values that are not finite, or it has none of the names.
    """
    tables.write_back()
    shard = tables.shards[table]
    return tables.ranks.run_on_each(lambda: _copy(shard, path, rows))


def _copy(shard: TableShard, path: str, rows: Mapping[str, int]) -> InitCounts:
    # Reading files takes Arrow, which takes long to import.
    from embedtrain.data.vector_files import read_vectors

    shard.changes.before_update_of_all()
    seen = np.zeros(shard.spec.num_rows, dtype=bool)
    num_in_file, example = 0, ""
    for block in read_vectors(path, shard.spec.dim):
        example = example or next(iter(block.names), "")
        num_in_file += len(block.names)
        places, local_rows = _own_places(shard, block.names, rows, seen)
        values = block.rows(places)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise UserError(f"{path}: the vector of {block.names[places[bad[0]]]!r} has a value that is not finite")
        weight = shard.weight
        copied = torch.tensor(values, dtype=weight.dtype, device=weight.device)
        weight.index_copy_(0, local_rows.to(weight.device), copied)
    if not seen.any():
        raise UserError(
            f"{path}: expected names of table {shard.spec.name!r}, such as {next(iter(rows), '')!r}, and none of its "
            f"{num_in_file:,} names is among the table's {len(rows):,}; it begins with {example!r}: compare how both "
            "are written"
        )
    return InitCounts(int(seen.sum()), shard.spec.num_rows, num_in_file)


def _own_places(
    shard: TableShard, names: Sequence[str], rows: Mapping[str, int], seen: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], torch.Tensor]:
    """Returns the places of the names whose rows this rank holds, and these rows; marks all rows found in `seen`."""
    ids = np.array([rows.get(name, -1) for name in names], np.int64)
    found, first = np.unique(ids, return_index=True)
    is_new = (found >= 0) & ~seen[found]
    found, places = found[is_new], first[is_new].astype(np.int64)
    seen[found] = True
    slots = shard.layout.slot_of(torch.from_numpy(found))
    start, stop = shard.slots
    is_own = (slots >= start) & (slots < stop)
    return places[is_own.numpy()], slots[is_own] - start
