"""Starting a table from vectors that were trained before: of a file by name, of an array by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.embedding.table_group import TableShard
from embedtrain.errors import UserError
from embedtrain.spec import TableSpec

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class InitCounts:
    """What became of a table that was started from a file.

    Attributes:
        num_copied: rows whose names the file has; the others keep their first values.
        num_rows: rows of the table.
        num_in_file: vectors of the file or array, those included that the table has no row for.
    """

    num_copied: int
    num_rows: int
    num_in_file: int


def init_from(
    tables: EmbeddingCollection,
    table: str,
    source: str | Tensor | NDArray[Any],
    rows: Mapping[str, int] | Tensor | NDArray[Any] | None = None,
) -> InitCounts:
    """Copies the vectors of a file or an array into rows of a table; all other rows stay as they are.

    If a name occurs twice in the file, the first wins. The optimizer's state is not touched. Every rank reads the
    source, about 8 MiB at a time, and keeps its own rows: the result is the same on any number of ranks.

    Collective: every rank.

    Args:
        tables: the collection.
        table: name of the table to start.
        source: the file, any fsspec URL; `embedtrain.data.vector_files.read_vectors` says in which formats. Or an
            array [n, dim], of torch or NumPy, which may be a memory map.
        rows: of a file, the row of each name. Of an array, [n] int64, distinct, of torch or NumPy; if None, it has all
            rows in order.

    Raises:
        UserError: on every rank; there is no such table or file, it cannot be read, its vectors have another dim than
            the table or values that are not finite, or it has none of the names; or `rows` does not fit the source. An
            array that is refused has changed no row; a file may have, with the parts that come before its fault.
    """
    tables.write_back()
    shard = tables.shards.get(table)

    def copy() -> InitCounts:
        if shard is None:
            raise UserError(f"there is no table {table!r}; the tables are {', '.join(tables.shards)}")
        if isinstance(source, str) and isinstance(rows, Mapping):
            return _copy(shard, source, rows)
        if isinstance(source, str) or isinstance(rows, Mapping):
            raise UserError("rows must be the row of each name for a file, and a tensor of rows or None for an array")
        return _copy_array(shard, source, None if rows is None else torch.as_tensor(rows))

    return tables.ranks.run_on_each(copy)


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


def _copy_array(shard: TableShard, source: Tensor | NDArray[Any], rows: Tensor | None) -> InitCounts:
    spec, (start, stop) = shard.spec, shard.slots
    if tuple(source.shape[1:]) != (spec.dim,) or (rows is None and source.shape[0] != spec.num_rows):
        wanted = f"[{spec.num_rows if rows is None else 'n'}, {spec.dim}]"
        raise UserError(f"table {spec.name!r}: expected an array {wanted}, got {list(source.shape)}")
    if rows is not None:
        _check_rows(spec, rows, source.shape[0])
    for first, block in _blocks(source, spec.dim):
        is_finite = block.isfinite().all(dim=1)
        if not bool(is_finite.all()):
            bad = first + int((~is_finite).nonzero()[0])
            raise UserError(f"table {spec.name!r}: vector {bad} of the array has a value that is not finite")
    shard.changes.before_update_of_all()
    for first, block in _blocks(source, spec.dim):
        last = first + len(block)
        ids = torch.arange(first, last) if rows is None else rows[first:last].cpu()
        slots = shard.layout.slot_of(ids)
        is_own = (slots >= start) & (slots < stop)
        weight = shard.weight
        copied = block[is_own.to(block.device)].to(weight)
        weight.index_copy_(0, (slots[is_own] - start).to(weight.device), copied)
    return InitCounts(source.shape[0], spec.num_rows, source.shape[0])


def _blocks(source: Tensor | NDArray[Any], dim: int) -> Iterator[tuple[int, Tensor]]:
    """Yields an array in parts of about 8 MiB, each with the place of its first vector."""
    block_rows = max(1, _BLOCK_BYTES // (4 * dim))
    for first in range(0, source.shape[0], block_rows):
        yield first, torch.as_tensor(source[first : first + block_rows]).detach()


def _check_rows(spec: TableSpec, rows: Tensor, num_vectors: int) -> None:
    if rows.shape != (num_vectors,) or rows.dtype != torch.int64:
        raise UserError(f"rows must be [{num_vectors}] int64, one per vector, got {rows.dtype} {list(rows.shape)}")
    if num_vectors and not 0 <= int(rows.min()) <= int(rows.max()) < spec.num_rows:
        raise UserError(
            f"rows of table {spec.name!r} are 0 to {spec.num_rows - 1}, got {int(rows.min())} to {int(rows.max())}"
        )
    if len(rows.unique()) != num_vectors:
        raise UserError("rows must be distinct")


def _own_places(
    shard: TableShard, names: Sequence[str], rows: Mapping[str, int], seen: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], Tensor]:
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
