"""Words and sentences of text, a chunk at a time: arrays in, arrays out, no Python loop over words."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import repeat
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

# A longer line is cut into sentences of this many words, as gensim does (word2vec.c cuts at 1,000 kept
# words): a text without line ends is still trained on whole, and a sentence has a bounded size.
MAX_SENTENCE_WORDS = 10_000

_NEWLINE, _SPACE = 10, 32
_SEPARATORS = bytes(range(_SPACE + 1))


class Tokens(NamedTuple):
    """The words of a chunk of text.

    Attributes:
        words: [n] large_binary; UTF-8.
        begins: [n] bool; whether the word is the first of a sentence.
    """

    words: pa.LargeBinaryArray
    begins: NDArray[np.bool_]


def _letters(text: bytes) -> bytes:
    """Lower-cases, and turns into separators what is neither a letter nor a mark on one (an accent)."""
    if text.isascii():
        return text.translate(_ascii_letters())
    codes = np.frombuffer(text.decode().lower().encode("utf-32-le"), "<u4")
    # A product with 0 or 1 takes a quarter of the time of np.where, and NUL separates as well as a space.
    kept: NDArray[np.uint32] = codes * _is_kept()[codes]
    return kept.tobytes().decode("utf-32-le").encode()


def _as_is(text: bytes) -> bytes:
    return text


# A tokenizer rewrites UTF-8 text so that separators (bytes up to a space) part words, newlines sentences.
TOKENIZERS: dict[str, Callable[[bytes], bytes]] = {"letters": _letters, "whitespace": _as_is}


def tokenize(chunks: Iterable[bytes], tokenizer: str) -> Iterator[Tokens]:
    """Splits text into words and marks the words that begin a sentence.

    Args:
        chunks: UTF-8, each cut at white space; a line may go on from chunk to chunk.
        tokenizer: a name in `TOKENIZERS`: `letters` (lower-cased words of Unicode letters) or `whitespace`
            (what stands between ASCII white space, as it is).
    """
    words_in_line = 0
    for chunk in chunks:
        text = TOKENIZERS[tokenizer](chunk)
        words, starts = _split(text)
        newlines = np.flatnonzero(np.frombuffer(text, np.uint8) == _NEWLINE)
        # Each line's first word, as its number in the chunk: negative where the line began in an earlier one.
        line_first = np.concatenate(([-words_in_line], np.searchsorted(starts, newlines)))
        line_sizes = np.diff(line_first, append=len(starts))
        line_sizes[0] -= words_in_line
        place_in_line = np.arange(len(starts)) - np.repeat(line_first, line_sizes)
        yield Tokens(words, place_in_line % MAX_SENTENCE_WORDS == 0)
        words_in_line = len(starts) - int(line_first[-1])


def encode(tokens: Iterable[Tokens], rows: Mapping[bytes, int]) -> Iterator[NDArray[np.int32]]:
    """Turns words into ids: words that have none are dropped, the first kept one of a sentence becomes ~id.

    Args:
        rows: id of each word of the vocabulary, by its UTF-8 bytes.

    Yields:
        [kept] int32; one array per chunk. Sentences without a kept word leave no trace.
    """
    unmarked = False  # Whether the sentence that is open at the chunk's start has no kept word yet.
    for words, begins in tokens:
        ids = _ids(words, rows)
        sentence = np.cumsum(begins)
        kept = ids >= 0
        sentence_kept = np.concatenate(([-1 if unmarked else 0], sentence[kept]))
        encoded = ids[kept]
        marked = np.diff(sentence_kept) != 0
        encoded[marked] = ~encoded[marked]
        yield encoded
        if len(sentence):
            unmarked = bool(sentence[-1] != sentence_kept[-1])


def _split(text: bytes) -> tuple[pa.LargeBinaryArray, NDArray[np.int64]]:
    """Returns what stands between separators ([n] large_binary), and where in the text ([n] int64)."""
    inside = np.zeros(len(text) + 2, np.bool_)
    np.greater(np.frombuffer(text, np.uint8), _SPACE, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    offsets = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(ends - starts, out=offsets[1:])
    letters = text.translate(None, delete=_SEPARATORS)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(letters)]
    return pa.Array.from_buffers(pa.large_binary(), len(starts), buffers), starts


def _ids(words: pa.LargeBinaryArray, rows: Mapping[bytes, int]) -> NDArray[np.int32]:
    """Looks up [n] words, each distinct one once; int32, -1 where there is no row."""
    distinct = words.dictionary_encode()
    values = distinct.dictionary.to_pylist()
    rows_of_values = np.fromiter(map(rows.get, values, repeat(-1)), np.int32, len(values))
    ids: NDArray[np.int32] = rows_of_values[distinct.indices.to_numpy()]
    return ids


@cache
def _ascii_letters() -> bytes:
    lower = bytes(range(128)).lower()
    return bytes(b if chr(b).isalpha() or b == _NEWLINE else _SPACE for b in lower) + bytes(128)


@cache
def _is_kept() -> NDArray[np.bool_]:
    """[code points] bool; the letters (Unicode category L), the marks that go with them (M), and newline."""
    codes = range(sys.maxunicode + 1)
    kept = np.fromiter((unicodedata.category(chr(code))[0] in "LM" for code in codes), np.bool_, len(codes))
    kept[_NEWLINE] = True
    return kept
