"""`embedtrain diff`: the rows that moved most between two checkpoints, which are read in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
import numpy as np
from numpy.typing import NDArray

from embedtrain import storage
from embedtrain.commands.console import EXIT_DONE, command, tell
from embedtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from embedtrain.checkpoint import CheckpointReader, TensorInfo
    from embedtrain.data.row_names import RowNames
    from embedtrain.train.run_folder import RunFolder

_WEIGHT = "/weight"
_BLOCK_BYTES = 32 << 20


@command("embedtrain diff runs/x/checkpoints/step-000001000 runs/x --top 20")
@click.argument("first", metavar="A", type=click.Path(file_okay=False), help="Run folder, or folder of a checkpoint.")
@click.argument("second", metavar="B", type=click.Path(file_okay=False), help="The other run or checkpoint.")
@click.option("--table", metavar="NAME", help="Compare only this table.")
@click.option("--top", type=int, default=10, show_default=True, metavar="N", help="Number of rows to show per table.")
def diff(first: str, second: str, table: str | None, top: int) -> int:
    """Shows which rows moved most between two checkpoints."""
    print_difference(first, second, table, top)
    return EXIT_DONE


@dataclass(frozen=True)
class Side:
    """Reads one of the two checkpoints.

    Attributes:
        reader: reader of the checkpoint.
        folder: the checkpoint's run folder, which holds the names of its rows.
    """

    reader: CheckpointReader
    folder: RunFolder

    @classmethod
    def open(cls, path: str) -> Side:
        """Opens the newest checkpoint of a run folder, or the given checkpoint.

        Raises:
            UserError: there is none.
        """
        from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
        from embedtrain.checkpoint.manifest import MANIFEST_NAME, step_of
        from embedtrain.train.run_folder import CHECKPOINTS_NAME, RunFolder

        path = path.rstrip("/")
        parent, _, name = path.rpartition("/")
        if step_of(name) is not None:
            checkpoint: str | None = path if MANIFEST_NAME in storage.list_files(path) else None
            folder = RunFolder(parent.removesuffix(CHECKPOINTS_NAME) or ".")
        else:
            folder = RunFolder(path)
            checkpoint = latest_checkpoint(folder.checkpoints_path)
        if checkpoint is None:
            raise UserError(
                f"expected a run folder with a complete checkpoint, or the folder of a checkpoint such as "
                f"runs/x/checkpoints/step-000001000, got {path!r}"
            )
        return cls(CheckpointReader(checkpoint), folder)

    @property
    def tables(self) -> dict[str, TensorInfo]:
        """The tables by name."""
        names = sorted(name.removesuffix(_WEIGHT) for name in self.reader.tensors if name.endswith(_WEIGHT))
        return {name: self.reader.table(name) for name in names}

    def names(self, table: str) -> RowNames:
        """Returns the names of a table's rows."""
        from embedtrain.data.row_names import read_row_names

        return read_row_names(self.folder.path, self.reader.state, table, self.tables[table].shape[0])

    def words(self) -> str:
        """Returns a description of the checkpoint."""
        ranks = self.reader.manifest.world_size
        return f"{self.reader.path}, step {self.reader.step:,}, saved by {ranks} {'rank' if ranks == 1 else 'ranks'}"


@dataclass(frozen=True)
class Movement:
    """Holds how far the rows moved that a table has in both checkpoints.

    Attributes:
        num_rows: number of rows in both checkpoints.
        num_moved: number of these rows that differ in any bit.
        num_not_finite: number of these rows with a NaN or an infinity on either side.
        mean: mean Euclidean distance of the finite rows.
        names: names of the rows that moved most, largest distance first.
        distances: their distances.
        cosines: cosine between each row before and after; 0 if either is zero.
    """

    num_rows: int
    num_moved: int
    num_not_finite: int
    mean: float
    names: Sequence[str]
    distances: NDArray[np.float64]
    cosines: NDArray[np.float64]


def print_difference(first_path: str, second_path: str, table: str | None, top: int) -> None:
    """Prints which rows of each table moved most from one checkpoint to another.

    Rows are compared by their names (words, raw ids, values), or by their ids if they have no names.

    Args:
        first_path: a run folder or the folder of a checkpoint, any fsspec URL.
        second_path: a run folder or the folder of a checkpoint, any fsspec URL.
        table: only this one; None for all.
        top: how many rows of each table to name.

    Raises:
        UserError: there is no checkpoint, or none has the table.
    """
    if top < 0:
        raise UserError(f"--top must be at least 0, got {top}")
    first, second = Side.open(first_path), Side.open(second_path)
    with first.reader, second.reader:
        tell(f"from  {first.words()}", f"to    {second.words()}")
        names = sorted(first.tables.keys() | second.tables.keys())
        if table is not None and table not in names:
            raise UserError(f"--table must be one of {', '.join(names)}, got {table!r}")
        for name in names if table is None else [table]:
            _print_table(name, first, second, top)


def movement(name: str, first: Side, second: Side, top: int) -> tuple[Movement, int, int]:
    """Compares the rows of a table; returns their movement and the numbers of rows only in the first and the second.

    Args:
        name: a table of the same dim on both sides.
        first: the side with the rows before.
        second: the side with the rows after.
        top: how many rows to name.

    Raises:
        CheckpointError: a table cannot be read, or has a layout that this version does not know.
    """
    import torch

    before, after = first.tables[name], second.tables[name]
    pairs = _Pairs.of(first.names(name).words, second.names(name).words)
    num_rows = min(before.shape[0], after.shape[0]) if pairs.ids is None else len(pairs.ids[0])
    largest = _Largest(top)
    num_moved, num_not_finite, total = 0, 0, 0.0
    block = max(1, _BLOCK_BYTES // max(before.row_bytes, after.row_bytes, 1))
    for ids, was, now in _blocks(name, first, second, pairs, num_rows, block):
        num_moved += int((was != now).any(dim=1).sum())
        was, now = was.double(), now.double()
        distances = (now - was).norm(dim=1)
        is_finite = torch.isfinite(distances)
        num_not_finite += int((~is_finite).sum())
        total += float(distances[is_finite].sum())
        cosines = torch.nn.functional.cosine_similarity(was, now, dim=1)
        largest.add(ids[is_finite].numpy(), distances[is_finite].numpy(), cosines[is_finite].numpy())
    mean = total / max(num_rows - num_not_finite, 1)
    ids_, distances_, cosines_ = largest.found()
    moved = Movement(
        num_rows, num_moved, num_not_finite, mean, [pairs.name_of(int(row)) for row in ids_], distances_, cosines_
    )
    return moved, before.shape[0] - num_rows, after.shape[0] - num_rows


@dataclass(frozen=True)
class _Pairs:
    """Pairs the rows of the two sides by name or id.

    Attributes:
        names: of the first side's rows.
        ids: [n] of each side, pair by pair; None if each row has the same id on both.
    """

    names: Sequence[str]
    ids: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, first: Sequence[str], second: Sequence[str]) -> _Pairs:
        import torch

        from embedtrain.data.row_names import Numbered

        are_numbered = isinstance(first, Numbered) and isinstance(second, Numbered)
        if first == second or (are_numbered and first[:1] == second[:1]):
            return cls(first, None)
        if are_numbered:  # Hashed tables of different sizes have no rows in common.
            return cls(first, (torch.empty(0, dtype=torch.int64),) * 2)
        places = {name: row for row, name in enumerate(second)}
        found = [(row, places[name]) for row, name in enumerate(first) if name in places]
        pairs = torch.tensor(found, dtype=torch.int64).reshape(-1, 2)
        return cls(first, (pairs[:, 0].contiguous(), pairs[:, 1].contiguous()))

    def name_of(self, row: int) -> str:
        # Rows after the last name are never looked up.
        return self.names[row] if row < len(self.names) else str(row)


def _blocks(
    name: str, first: Side, second: Side, pairs: _Pairs, num_rows: int, block: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields ids of the first side, and the rows of both; in the order of the files if both have the same order."""
    import torch

    from embedtrain.sharding.layout import read_layout

    tensor = name + _WEIGHT
    infos = first.tables[name], second.tables[name]
    layouts = [read_layout(info.layout, info.shape[0], name) for info in infos]
    is_same_order = pairs.ids is None and infos[0].shape[0] == infos[1].shape[0]
    for start in range(0, num_rows, block):
        stop = min(start + block, num_rows)
        if is_same_order:
            ids = layouts[0].id_of(torch.arange(start, stop))
            yield ids, first.reader.read(tensor, start, stop), second.reader.read(tensor, start, stop)
            continue
        both = (torch.arange(start, stop),) * 2 if pairs.ids is None else tuple(ids[start:stop] for ids in pairs.ids)
        was, now = (
            side.reader.gather(tensor, layout.slot_of(ids))
            for side, layout, ids in zip((first, second), layouts, both, strict=True)
        )
        yield both[0], was, now


class _Largest:
    """Keeps the rows with the largest distances."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._ids = np.empty(0, np.int64)
        self._values = np.empty((2, 0), np.float64)

    def add(self, ids: NDArray[np.int64], distances: NDArray[np.float64], cosines: NDArray[np.float64]) -> None:
        ids = np.concatenate([self._ids, ids])
        values = np.concatenate([self._values, np.stack([distances, cosines])], axis=1)
        # Ties are ordered by id, so that the result does not depend on the order of the files.
        order = np.lexsort((ids, -values[0]))[: self._count]
        self._ids, self._values = ids[order], values[:, order]

    def found(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        return self._ids, self._values[0], self._values[1]


def _print_table(name: str, first: Side, second: Side, top: int) -> None:
    infos = [side.tables.get(name) for side in (first, second)]
    shapes = ["" if info is None else " x ".join(f"{size:,}" for size in info.shape) for info in infos]
    before, after = infos
    if before is None or after is None:
        side, shape = (second, shapes[1]) if before is None else (first, shapes[0])
        tell("", f"table {name}: only in {side.reader.path}, {shape}")
        return
    if before.shape[1:] != after.shape[1:]:
        tell("", f"table {name}: {shapes[0]} and {shapes[1]} cannot be compared, because their dims differ")
        return
    moved, num_gone, num_new = movement(name, first, second, top)
    tell(
        "",
        f"table {name}: {shapes[1]}; {moved.num_moved:,} of {moved.num_rows:,} common rows moved, "
        f"by {moved.mean:.4g} on average",
    )
    for number, path in ((num_gone, first.reader.path), (num_new, second.reader.path)):
        if number:
            tell(f"  {number:,} rows are only in {path}")
    if moved.num_not_finite:
        tell(f"  {moved.num_not_finite:,} rows are not finite: they hold a NaN or an infinity")
    shown = [row for row in zip(moved.names, moved.distances, moved.cosines, strict=True) if row[1] > 0]
    if shown:
        tell("  distance   cosine  row")
    for row, distance, cosine in shown:
        tell(f"  {distance:8.4g}  {cosine:7.3f}  {row}")
