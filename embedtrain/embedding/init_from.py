"""Initialises a table from trained vectors: from a file by name, or from an array by row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.embedding.table_group import TableShard
from embedtrain.errors import UserError
from embedtrain.spec import TableSpec

_BLOCK_BYTES = 8 << 20
_NO_NUMBERS = (torch.bool, torch.complex32, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class InitCounts:
    """Holds the counts of one `init_from`.

    Attributes:
        num_copied: number of rows that got a vector; the other rows keep their initial values.
        num_rows: number of rows of the table.
        num_in_file: number of vectors in the file or array, including vectors without a row in the table.
    """

    num_copied: int
    num_rows: int
    num_in_file: int


def init_from(
    tables: EmbeddingCollection,
    table: str,
    source: str | os.PathLike[str] | ArrayLike | Tensor,
    rows: Mapping[str, int] | ArrayLike | Tensor | None = None,
) -> InitCounts:
    """Copies the vectors of a file or an array into rows of a table; other rows and optimizer state do not change.

    If a name occurs twice in the file, the first wins. Every rank reads the source, about 8 MiB at a time, and copies
    the rows that it owns. So the result is the same on any number of ranks.

    Collective: every rank.

    Args:
        tables: the collection.
        table: name of the table to initialise.
        source: a file, any fsspec URL, in a format of `embedtrain.data.vector_files.read_vectors`; or an array [n, dim]
            of real numbers: a torch tensor, a NumPy array, a memory map or nested lists.
        rows: for a file, the row of each name. For an array, [n] int64 distinct rows, as a torch tensor, a NumPy array
            or a list; None if the array has all rows in order.

    Raises:
        UserError: raised on every rank. The table or the file does not exist, or the file cannot be read. Vectors have
            another dim than the table, or values that are not finite in its dtype. The file has none of the names, or
            `rows` does not fit the source. An array is checked before any row changes. A file is checked while it is
            copied, so rows may have changed before the error; the message then says how many.
    """
    tables.write_back()
    shard = tables.shards.get(table) if isinstance(table, str) else None

    def copy() -> InitCounts:
        if shard is None:
            raise UserError(f"there is no table {table!r}; the tables are {', '.join(tables.shards)}")
        is_file = isinstance(source, str | os.PathLike)
        if is_file != isinstance(rows, Mapping):
            raise UserError("rows must be the row of each name for a file, and a tensor of rows or None for an array")
        if isinstance(source, str | os.PathLike) and isinstance(rows, Mapping):
            return _copy(shard, os.fspath(source), rows)
        array = _as_array(source, "the array")
        return _copy_array(shard, array, None if rows is None else _as_tensor(_as_array(rows, "rows"), "rows"))

    return tables.ranks.run_on_each(copy)


def _copy(shard: TableShard, path: str, rows: Mapping[str, int]) -> InitCounts:
    # Imported here because it needs Arrow, whose import is slow.
    from embedtrain.data.vector_files import read_vectors

    shard.changes.before_update_of_all()
    seen = np.zeros(shard.spec.num_rows, dtype=bool)
    num_in_file, example, num_changed = 0, "", 0
    weight = shard.weight
    try:
        for block in read_vectors(path, shard.spec.dim):
            example = example or next(iter(block.names), "")
            num_in_file += len(block.names)
            places, local_rows = _own_places(shard, block.names, rows, seen)
            with np.errstate(over="ignore"):  # values too large for float32 are refused below
                copied = torch.tensor(block.rows(places), dtype=weight.dtype, device=weight.device)
            if (bad := _first_bad(copied)) is not None:
                name = block.names[places[bad]]
                raise UserError(f"{path}: the vector of {name!r} has a value that is not finite{_in(weight.dtype)}")
            weight.index_copy_(0, local_rows.to(weight.device), copied)
            num_changed += len(local_rows)
    except UserError as error:
        if num_changed:
            raise UserError(
                f"{error}. Table {shard.spec.name!r} already has {num_changed:,} vectors of the file: create it again"
            ) from error
        raise
    if not seen.any():
        raise UserError(
            f"{path}: expected names of table {shard.spec.name!r}, such as {next(iter(rows), '')!r}, but none of its "
            f"{num_in_file:,} names is among the table's {len(rows):,} names. The first name in the file is "
            f"{example!r}: compare the spelling"
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
        if (bad := _first_bad(block.to(spec.dtype))) is not None:
            what = f"vector {first + bad} of the array has a value that is not finite{_in(spec.dtype)}"
            raise UserError(f"table {spec.name!r}: {what}")
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
    """Yields an array in parts of about 8 MiB, each with the index of its first vector."""
    block_rows = max(1, _BLOCK_BYTES // (4 * dim))
    for first in range(0, source.shape[0], block_rows):
        yield first, _as_tensor(source[first : first + block_rows], "the array")


def _as_array(values: object, name: str) -> Tensor | NDArray[Any]:
    """Returns a tensor unchanged, and other values as a NumPy array; arrays are not copied."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided:
            raise UserError(f"{name} must be dense, got a tensor of layout {values.layout}")
        return values
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # such as lists of unequal lengths
        raise UserError(f"{name} must be an array of numbers: {error}") from error


def _as_tensor(values: Tensor | NDArray[Any], name: str) -> Tensor:
    """Returns numbers of any byte order and strides as a tensor of the same type.

    Raises:
        UserError: they are not real numbers, but for example text or booleans.
    """
    is_real = values.dtype.kind in "fiu" if isinstance(values, np.ndarray) else values.dtype not in _NO_NUMBERS
    if not is_real:
        raise UserError(f"{name} must have real numbers, got {values.dtype}")
    if isinstance(values, Tensor):
        return values.detach()
    dtype = values.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(values, np.float64 if dtype.kind == "f" and dtype.itemsize > 8 else dtype))


def _first_bad(vectors: Tensor) -> int | None:
    """Returns the index of the first vector [n, dim] with a value that is not finite; None if all are finite."""
    is_finite = vectors.isfinite().all(dim=1)
    return None if bool(is_finite.all()) else int((~is_finite).nonzero()[0])


def _in(dtype: torch.dtype) -> str:
    return f" in the table's {str(dtype).removeprefix('torch.')}"


def _check_rows(spec: TableSpec, rows: Tensor, num_vectors: int) -> None:
    if rows.shape != (num_vectors,) or rows.dtype != torch.int64:
        raise UserError(f"rows must be [{num_vectors}] int64, one per vector, got {rows.dtype} {list(rows.shape)}")
    if num_vectors and not 0 <= int(rows.min()) <= int(rows.max()) < spec.num_rows:
        raise UserError(
            f"rows of table {spec.name!r} must be 0 to {spec.num_rows - 1}, got {int(rows.min())} to {int(rows.max())}"
        )
    if len(rows.unique()) != num_vectors:
        raise UserError("rows must be distinct")


def _own_places(
    shard: TableShard, names: Sequence[str], rows: Mapping[str, int], seen: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], Tensor]:
    """Returns the indices in `names` of the rows that this rank owns, and their local rows; marks all rows in `seen`.

    Rows that are already marked are left out.
    """
    named = [(place, row) for place, row in enumerate(map(rows.get, names)) if row is not None]
    for place, row in named:
        if not isinstance(row, int | np.integer) or not 0 <= row < len(seen):
            raise UserError(
                f"rows of table {shard.spec.name!r} must be integers from 0 to {len(seen) - 1}, got {row!r} for "
                f"{names[place]!r}"
            )
    found, first = np.unique(np.array([row for _, row in named], np.int64), return_index=True)
    is_new = ~seen[found]
    found = found[is_new]
    places = np.array([place for place, _ in named], np.int64)[first[is_new]]
    seen[found] = True
    slots = shard.layout.slot_of(torch.from_numpy(found))
    start, stop = shard.slots
    is_own = (slots >= start) & (slots < stop)
    return places[is_own.numpy()], slots[is_own] - start
