"""Hashes of the values of a column: the row of a table that is too large, or too new, for a vocabulary."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedtrain.ops._backend.mix import mix64_array

_WORD_BYTES = 8
_MASKS = np.array([(1 << 8 * length) - 1 for length in range(_WORD_BYTES + 1)], np.uint64)


def hashed_rows(values: pa.Array, num_rows: int) -> NDArray[np.int64]:
    """Returns a row for each of [n] texts: a hash of its bytes modulo `num_rows`; a missing text counts as empty."""
    return np.remainder(text_hashes(values), np.uint64(num_rows)).view(np.int64)


def text_hashes(values: pa.Array) -> NDArray[np.uint64]:
    """Returns a hash of the bytes of each of [n] texts; a missing text counts as empty.

    The hash takes eight bytes at a time, the last ones filled up with zeros, and begins with the length. It is part
    of what a trained table means, and must stay as it is.
    """
    starts, lengths, data = text_bytes(values.cast(pa.large_binary()).fill_null(b""))
    # The last text may end less than a word before the data does.
    padded = np.concatenate([data, np.zeros(_WORD_BYTES, np.uint8)])
    words = np.ndarray(len(data) + 1, "<u8", padded, strides=(1,))  # The eight bytes from each byte on.
    hashes = mix64_array(lengths.view(np.uint64))
    for start in range(0, int(lengths.max(initial=0)), _WORD_BYTES):
        has_more = np.flatnonzero(lengths > start)
        masks = _MASKS[np.minimum(lengths[has_more] - start, _WORD_BYTES)]
        hashes[has_more] = mix64_array(hashes[has_more] ^ words[starts[has_more] + start] & masks)
    return hashes


def text_bytes(texts: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """Returns the start and length of each of [n] texts, both [n] int64, in their bytes, which come third.

    Args:
        texts: large_string or large_binary, none missing.
    """
    _, offsets_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(data_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
    return offsets[:-1] - offsets[0], np.diff(offsets), data
