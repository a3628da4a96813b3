"""Hashes of the values of a column: the row of a table that is too large, or too new, for a vocabulary."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from embedtrain.ops._backend.mix import mix64

_WORD_BYTES = 8


def hashed_rows(values: pa.Array, num_rows: int) -> NDArray[np.int64]:
    """Returns a row for each of [n] texts: a hash of its bytes modulo `num_rows`; a missing text counts as empty.

    The hash takes eight bytes at a time, the last ones filled up with zeros, and begins with the length. It is part
    of what a trained table means, and must stay as it is.
    """
    texts = values.cast(pa.large_binary()).fill_null(b"")
    _, offsets_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    starts, lengths = offsets[:-1], np.diff(offsets)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    hashes = mix64(torch.from_numpy(lengths.copy())).numpy()
    for start in range(0, int(lengths.max(initial=0)), _WORD_BYTES):
        has_more = np.flatnonzero(lengths > start)
        words = _words(data, starts[has_more] + start, lengths[has_more] - start)
        hashes[has_more] = mix64(torch.from_numpy(hashes[has_more] ^ words)).numpy()
    return np.asarray(np.remainder(hashes.view(np.uint64), np.uint64(num_rows)).view(np.int64))


def _words(data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the eight bytes from each start as a little-endian integer, zeros past each length."""
    places = np.arange(_WORD_BYTES)
    # The last text may end less than a word before the data does.
    taken = data[np.minimum(starts[:, None] + places, len(data) - 1)]
    taken *= places < lengths[:, None]
    return np.asarray(taken.view("<i8")[:, 0])
