"""The trained vectors of a run folder, read in blocks of rows in the order of the ids, without a model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch

from embedtrain.checkpoint import CheckpointReader, choose_checkpoint
from embedtrain.checkpoint.choice import Step
from embedtrain.data.row_names import read_row_names, read_table_facts
from embedtrain.data.sources import file_system_of
from embedtrain.errors import UserError
from embedtrain.sharding.layout import read_layout

FloatRows = npt.NDArray[np.float32]

_WEIGHT = "/weight"
_BLOCK_BYTES = 8 << 20
_SUGGESTION_WORDS = 50_000


@dataclass(frozen=True, eq=False, repr=False)
class Vectors:
    """One table of a checkpoint. A context manager: leaving it closes the checkpoint's files.

    Attributes:
        table: name of the table.
        step: the optimizer step at which the checkpoint was saved.
        num_rows: number of rows, one for each of `words`.
        dim: length of a vector.
        words: the word of each row; row numbers if the rows have no names.
        counts: [num_rows] int64, how often the word occurs in the data; None if nobody counted.
        read: returns the vectors of the ids from its first argument up to its second.
        on_close: gives back what `read` holds open.
        noun: what a row stands for: a word, a user, an item.
        find: returns the row of a text that need not be among `words`, by its hash; None if only these have rows.
        checksum: of the checkpoint's manifest; empty if the vectors are of no checkpoint.
        titles: returns what people call some of the rows, by word; rows without a title are left out.
    """

    table: str
    step: int
    num_rows: int
    dim: int
    words: Sequence[str]
    counts: npt.NDArray[np.int64] | None
    read: Callable[[int, int], FloatRows]
    on_close: Callable[[], None] = lambda: None
    noun: str = "word"
    find: Callable[[str], int] | None = None
    checksum: str = ""
    titles: Callable[[Sequence[str]], Mapping[str, str]] = lambda words: {}

    def __enter__(self) -> Vectors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the checkpoint's files."""
        self.on_close()

    def rows(self, start: int, stop: int) -> FloatRows:
        """Returns [stop - start, dim]: the vectors of the ids from `start` up to `stop`."""
        return self.read(start, stop)

    def blocks(self, block_rows: int | None = None) -> Iterator[tuple[int, FloatRows]]:
        """Yields (id of the first row, [n, dim]) from the first id to the last.

        Args:
            block_rows: rows of every block but the last; None for about 8 MiB of them.
        """
        block_rows = block_rows or max(1, _BLOCK_BYTES // (4 * self.dim))
        for start in range(0, self.num_rows, block_rows):
            yield start, self.rows(start, min(start + block_rows, self.num_rows))

    def first(self, num_rows: int) -> Vectors:
        """Returns the first rows alone: the most frequent words, where there is a vocabulary."""
        words = self.words[:num_rows]
        counts = None if self.counts is None else self.counts[:num_rows]
        return replace(self, num_rows=len(words), words=words, counts=counts)

    def row_of(self, word: str) -> int:
        """Returns the id of `word`, by a search through the words or by `find`.

        Raises:
            UserError: there is no such word; names the closest of the frequent ones.
        """
        if self.find is not None:
            return self.find(word)
        try:
            return self.words.index(word)
        except ValueError:
            close = difflib.get_close_matches(word, islice(self.words, _SUGGESTION_WORDS))
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise UserError(
                f"unknown {self.noun} {word!r}: not among the {self.num_rows:,} {self.noun}s of table "
                f"{self.table!r}{hint}"
            ) from None


def unit_rows(rows: FloatRows) -> FloatRows:
    """Returns the rows [n, dim] scaled to length 1; a zero row stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    unit: FloatRows = (rows / lengths).astype(np.float32, copy=False)
    return unit


def open_vectors(run_path: str, table: str | None = None, step: Step = None) -> Vectors:
    """Opens a table of a complete checkpoint in a run folder.

    The rows have the names that `embedtrain.data.row_names` knows of; rows without a name are left out.

    Args:
        run_path: the run folder, any fsspec URL.
        table: which table; None for the `export_table` that the checkpoint names, or the only one.
        step: of the checkpoint, "best" or "newest"; None for the best if the run keeps it, and else for the newest.

    Raises:
        UserError: no such folder, no complete checkpoint in it, no such table, or a file of names that is missing,
            unreadable, or not the one that the table was trained with.
        CheckpointError: the table's rows lie in an order that this version does not know.
    """
    run_path = run_path.rstrip("/")
    file_system, path = file_system_of(run_path)
    if not file_system.isdir(path):
        raise UserError(f"no run folder at {run_path!r}; expected the run.path that a training wrote to")
    reader = CheckpointReader(choose_checkpoint(f"{run_path}/checkpoints", step, run_path))
    try:
        return _open_table(reader, run_path, table)
    except BaseException:
        reader.close()
        raise


def _open_table(reader: CheckpointReader, run_path: str, table: str | None) -> Vectors:
    tables = sorted(name.removesuffix(_WEIGHT) for name in reader.tensors if name.endswith(_WEIGHT))
    table = _choose_table(table, read_table_facts(reader.state, run_path).export_table, tables, run_path)
    info = reader.table(table)
    num_rows, dim = info.shape
    layout = read_layout(info.layout, num_rows, table)
    names = read_row_names(run_path, reader.state, table, num_rows)

    def read(start: int, stop: int) -> FloatRows:
        slots = layout.slot_of(torch.arange(start, stop))
        rows: FloatRows = reader.gather(table + _WEIGHT, slots).float().numpy()
        return rows

    return Vectors(
        table,
        reader.step,
        len(names.words),
        dim,
        names.words,
        names.counts,
        read,
        reader.close,
        names.noun,
        names.find,
        reader.manifest.checksum,
    )


def _choose_table(table: str | None, export_table: str | None, tables: list[str], run_path: str) -> str:
    if table is None and export_table is None and len(tables) != 1:
        raise UserError(f"name a table of {run_path!r} by --table NAME: {', '.join(tables) or 'it has none'}")
    chosen = table or export_table or tables[0]
    if chosen not in tables:
        raise UserError(f"no table {chosen!r} in {run_path!r}; it has: {', '.join(tables) or 'none'}")
    return chosen
