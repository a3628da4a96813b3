"""Reading the trained vectors of a run folder in blocks of rows, in id order, without building the model."""

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
    """The vectors of one table of a checkpoint. As a context manager it closes the checkpoint's files.

    Attributes:
        table: name of the table.
        step: the optimizer step at which the checkpoint was saved.
        num_rows: number of rows, one per word in `words`.
        dim: length of a vector.
        words: the word of each row; row numbers if rows have no names.
        counts: [num_rows] int64; how often each word occurs in the data; None if unknown.
        read: returns the vectors of ids `[start, stop)` given `start` and `stop`.
        on_close: closes the files that `read` uses.
        noun: what a row stands for: "word", "user" or "item".
        find: returns the row of any text by its hash; None unless the table is hashed.
        checksum: checksum of the checkpoint's manifest; empty if the vectors do not come from a checkpoint.
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
        """Returns [stop - start, dim]: the vectors of ids `[start, stop)`."""
        return self.read(start, stop)

    def blocks(self, block_rows: int | None = None) -> Iterator[tuple[int, FloatRows]]:
        """Yields (id of the first row, [n, dim]) from the first id to the last.

        Args:
            block_rows: rows per block (the last may have fewer); None for blocks of about 8 MiB.
        """
        block_rows = block_rows or max(1, _BLOCK_BYTES // (4 * self.dim))
        for start in range(0, self.num_rows, block_rows):
            yield start, self.rows(start, min(start + block_rows, self.num_rows))

    def first(self, num_rows: int) -> Vectors:
        """Returns only the first `num_rows` rows; with a vocabulary these are the most frequent words."""
        words = self.words[:num_rows]
        counts = None if self.counts is None else self.counts[:num_rows]
        return replace(self, num_rows=len(words), words=words, counts=counts)

    def row_of(self, word: str) -> int:
        """Returns the id of `word`.

        Raises:
            UserError: the word is unknown; suggests similar words among the most frequent ones.
        """
        if self.find is not None:
            return self.find(word)
        try:
            return self.words.index(word)
        except ValueError:
            in_other_case = [word.lower()] if word.lower() in self.words else []
            close = in_other_case or difflib.get_close_matches(word, islice(self.words, _SUGGESTION_WORDS))
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise UserError(
                f"unknown {self.noun} {word!r}: it is not one of the {self.num_rows:,} {self.noun}s of table "
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

    Rows get their names from `embedtrain.data.row_names`; rows without a name are left out.

    Args:
        run_path: the run folder, any fsspec URL.
        table: name of the table; None for the checkpoint's `export_table`, or its only table.
        step: step of the checkpoint, "best" or "newest"; None for the best if the run keeps it, otherwise the newest.

    Raises:
        UserError: the folder, a complete checkpoint or the table does not exist; or the file of row names is missing,
            unreadable, or not the file that the table was trained with.
        CheckpointError: the table has a layout that this version does not know.
    """
    run_path = run_path.rstrip("/")
    file_system, path = file_system_of(run_path)
    if not file_system.isdir(path):
        raise UserError(f"{run_path!r} is not a run folder: give the run.path of a training")
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
        raise UserError(
            f"{run_path!r} has no default table: name one with --table NAME: {', '.join(tables) or 'it has none'}"
        )
    chosen = table or export_table or tables[0]
    if chosen not in tables:
        raise UserError(f"{run_path!r} has no table {chosen!r}; it has {', '.join(tables) or 'none'}")
    return chosen
