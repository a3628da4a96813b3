"""The named rows of a checkpoint, and their differences from the rows published before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from embedtrain.checkpoint import CheckpointReader
from embedtrain.data.row_names import Numbered, read_row_names
from embedtrain.ops._backend.mix import mix64_array
from embedtrain.optim.dense import weights_in
from embedtrain.serve.published import Vectors
from embedtrain.sharding.layout import read_layout

_WEIGHT = "/weight"
_BLOCK_BYTES = 8 << 20

Digests = NDArray[np.uint64]


def row_digests(rows: Vectors) -> Digests:
    """Returns [n] uint64: a hash of the bytes of each row of `rows` [n, dim]."""
    words = np.ascontiguousarray(rows, "<f4").view("<u4")
    hashes = np.full(len(words), words.shape[1], np.uint64)
    for first in range(0, words.shape[1], 2):
        pair = words[:, first].astype(np.uint64)
        if first + 1 < words.shape[1]:
            pair |= words[:, first + 1].astype(np.uint64) << np.uint64(32)
        hashes = mix64_array(hashes ^ pair)
    return hashes


class Table:
    """Reads a table of a checkpoint by the names of its rows.

    Args:
        reader: reader of the checkpoint.
        run_path: the run folder, which holds the names of the rows.
        name: name of the table.
    """

    def __init__(self, reader: CheckpointReader, run_path: str, name: str) -> None:
        info = reader.table(name)
        self.name = name
        self.dim = info.shape[1]
        self.names: Sequence[str] = read_row_names(run_path, reader.state, name, info.shape[0]).words
        self._reader = reader
        self._layout = read_layout(info.layout, info.shape[0], name)
        self._num_rows = info.shape[0]

    def digests(self) -> Digests:
        """Returns a hash of each named row, in the order of the names; reads the table once, sequentially."""
        found = np.empty(self._num_rows, np.uint64)
        at_once = max(1, _BLOCK_BYTES // (4 * self.dim))
        for start in range(0, self._num_rows, at_once):
            stop = min(start + at_once, self._num_rows)
            rows = self._reader.read(self.name + _WEIGHT, start, stop).float().numpy()
            found[self._layout.id_of(torch.arange(start, stop)).numpy()] = row_digests(rows)
        return found[: len(self.names)]

    def blocks(self, places: NDArray[np.int64]) -> Iterator[tuple[list[str], Vectors]]:
        """Yields names and vectors of the rows at `places`, about 8 MiB at a time."""
        at_once = max(1, _BLOCK_BYTES // (4 * self.dim))
        for start in range(0, len(places), at_once):
            part = places[start : start + at_once]
            slots = self._layout.slot_of(torch.from_numpy(part))
            rows: Vectors = self._reader.gather(self.name + _WEIGHT, slots).float().numpy()
            yield [self.names[place] for place in part.tolist()], rows


def dense_of(reader: CheckpointReader) -> dict[str, Vectors]:
    """Returns the float32 parameters of a checkpoint's dense network by name; empty if there is no network."""
    return {name: tensor.float().numpy() for name, tensor in weights_in(reader.replicated()).items()}


@dataclass(frozen=True)
class TableChanges:
    """Describes how a table differs from its published version.

    Attributes:
        changed: [n] int64; places of the rows that are new or have new values.
        num_added: number of new rows among them.
        deleted: names that no longer have a row.
        digests: hashes of all rows.
        has_same_names: whether the names and their order are unchanged.
    """

    changed: NDArray[np.int64]
    num_added: int
    deleted: Sequence[str]
    digests: Digests
    has_same_names: bool

    @property
    def is_none(self) -> bool:
        """Whether the table equals its published version."""
        return len(self.changed) == 0 and len(self.deleted) == 0 and self.has_same_names


def compare(names: Sequence[str], digests: Digests, old_names: Sequence[str], old_digests: Digests) -> TableChanges:
    """Compares the rows of a table with its published rows, by name.

    Args:
        names: [n], without duplicates.
        digests: [n]; hashes of their rows.
        old_names: [m]; the published names.
        old_digests: [m]; hashes of the published rows.
    """
    aligned, is_known = np.zeros(len(names), np.uint64), np.zeros(len(names), bool)
    places, deleted = _places(old_names, names)
    is_here = places >= 0
    aligned[places[is_here]] = old_digests[is_here]
    is_known[places[is_here]] = True
    changed = np.flatnonzero(~is_known | (aligned != digests))
    is_same = len(names) == len(old_names) and bool((places == np.arange(len(places))).all())
    return TableChanges(changed, int((~is_known).sum()), deleted, digests, is_same)


def _places(old: Sequence[str], new: Sequence[str]) -> tuple[NDArray[np.int64], Sequence[str]]:
    """Returns for each name of `old` its place in `new` or -1, and the names of `old` that `new` lacks."""
    if isinstance(old, Numbered) and isinstance(new, Numbered) and old.affixes == new.affixes:
        places = np.arange(len(old))
        return np.where(places < len(new), places, -1), old[len(new) :]
    before, after = texts_of(old), texts_of(new)
    if after.slice(0, len(before)).equals(before):
        return np.arange(len(before)), []
    found = pc.index_in(before, value_set=after)
    return np.asarray(found.fill_null(-1), np.int64), before.filter(found.is_null()).to_pylist()


def texts_of(names: Sequence[str]) -> pa.LargeStringArray:
    """Returns names as an Arrow array."""
    return pa.array(list(names), pa.large_string())


def names_facts(names: Sequence[str]) -> Mapping[str, Any] | None:
    """Returns numbered names as JSON; None for other names, which need a file."""
    if not isinstance(names, Numbered):
        return None
    return {"numbered": list(names.affixes), "count": len(names)}


def names_from(facts: Mapping[str, Any]) -> Numbered:
    """Returns the names from the result of `names_facts`."""
    begin, end = facts["numbered"]
    return Numbered(range(facts["count"]), begin, end)
