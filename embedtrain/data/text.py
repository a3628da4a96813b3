"""Tokenizing text into words and sentences, chunk by chunk, without a Python loop over words."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedtrain.data.vocabulary import WordRows

# Longer lines are cut into sentences of this many words, as in gensim (word2vec.c cuts at 1,000 kept words).
# This bounds the size of a sentence, and a text without line ends is still used completely.
MAX_SENTENCE_WORDS = 10_000

_CUT = re.compile(rb"[A-Za-z][_:/#.@-]?[0-9]|[0-9][_:/#@-]?[A-Za-z]|[A-Za-z0-9]_[A-Za-z0-9]")
_NUMBER = re.compile(rb"[0-9]+")

_NEWLINE, _SPACE = 10, 32
_SEPARATORS = bytes(range(_SPACE + 1))
_SIGMA = 0x3A3
_NOT_SEEN = 0xFFFFFFFF


class Tokens(NamedTuple):
    """Holds the words of a chunk of text.

    Attributes:
        words: [n] large_binary; UTF-8.
        begins: [n] bool; whether the word begins a sentence.
    """

    words: pa.LargeBinaryArray
    begins: NDArray[np.bool_]


def _letters(text: bytes) -> bytes:
    """Lower-cases text, and replaces every character that is not a letter or its mark (accent) by a separator."""
    if text.isascii():
        return text.translate(_ascii_letters())
    characters = text.decode().replace(
        "\u0130", "\u0130".lower()
    )  # The only letter whose lower case has two characters.
    codes = _with_lower_sigmas(characters, np.frombuffer(characters.encode("utf-32-le"), "<u4"))
    return _lower_letters(codes).tobytes().decode("utf-32-le").encode()


def _with_lower_sigmas(characters: str, codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Lower-cases words with a capital sigma, the only letter whose lower case depends on its neighbours.

    Args:
        characters: text.
        codes: [n] its code points.
    """
    sigmas = np.flatnonzero(codes == _SIGMA)
    if not len(sigmas):
        return codes
    # Python then sees only the letters of the same word as neighbours.
    separators = np.flatnonzero(codes <= _SPACE)
    edges = np.concatenate(([-1], separators, [len(codes)]))
    words = np.unique(np.searchsorted(separators, sigmas))
    lower = codes.copy()
    for start, stop in zip((edges[words] + 1).tolist(), edges[words + 1].tolist(), strict=True):
        lower[start:stop] = np.frombuffer(characters[start:stop].lower().encode("utf-32-le"), "<u4")
    return lower


def _lower_letters(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Returns the lower case of [n] code points; 0 unless it is a letter, a mark or a newline."""
    table = _letter_table()
    letters: NDArray[np.uint32] = table[codes]
    is_new = letters == _NOT_SEEN
    if is_new.any():
        new = np.unique(codes[is_new])
        table[new] = [_lower_letter(code) for code in new.tolist()]
        letters = table[codes]
    return letters


def _as_is(text: bytes) -> bytes:
    return text


# A tokenizer rewrites UTF-8 text so that bytes up to a space separate words, and newlines separate sentences.
TOKENIZERS: dict[str, Callable[[bytes], bytes]] = {"letters": _letters, "whitespace": _as_is}


def tokenize(chunks: Iterable[bytes], tokenizer: str) -> Iterator[Tokens]:
    """Splits text into words, and marks words that begin a sentence.

    Args:
        chunks: UTF-8 text, cut at white space; a line may span chunks.
        tokenizer: a name in `TOKENIZERS`: `letters` (lower-cased words of Unicode letters) or `whitespace`
            (unchanged words between ASCII white space).
    """
    words_in_line = 0
    for chunk in chunks:
        text = TOKENIZERS[tokenizer](chunk)
        words, starts = _split(text)
        newlines = np.flatnonzero(np.frombuffer(text, np.uint8) == _NEWLINE)
        # The index in the chunk of each line's first word: negative if the line began in an earlier chunk.
        line_first = np.concatenate(([-words_in_line], np.searchsorted(starts, newlines)))
        line_sizes = np.diff(line_first, append=len(starts))
        line_sizes[0] -= words_in_line
        place_in_line = np.arange(len(starts)) - np.repeat(line_first, line_sizes)
        yield Tokens(words, place_in_line % MAX_SENTENCE_WORDS == 0)
        words_in_line = len(starts) - int(line_first[-1])


def lost_words(text: bytes) -> tuple[float, str]:
    """Returns the share of words that the tokenizer `letters` cuts or drops, and an example of them.

    Words with a digit or an underscore, such as node_12, are cut; numbers are dropped. Punctuation around words does
    not count.
    """
    words = text.split()
    lost = [word for word in words if _CUT.search(word) or _NUMBER.fullmatch(word)]
    return len(lost) / max(len(words), 1), lost[0].decode(errors="replace") if lost else ""


def encode(tokens: Iterable[Tokens], rows: WordRows) -> Iterator[NDArray[np.int32]]:
    """Encodes words as ids, dropping unknown words; the first kept word of a sentence becomes ~id.

    Args:
        rows: maps the vocabulary's words to ids.

    Yields:
        [kept] int32 per chunk. Sentences without a kept word are dropped.
    """
    unmarked = False  # Whether the sentence that continues from the previous chunk has no kept word yet.
    for words, begins in tokens:
        ids = rows.of(words)
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
    """Returns the words between separators ([n] large_binary) and their positions in the text ([n] int64)."""
    inside = np.zeros(len(text) + 2, np.bool_)
    np.greater(np.frombuffer(text, np.uint8), _SPACE, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    offsets = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(ends - starts, out=offsets[1:])
    letters = text.translate(None, delete=_SEPARATORS)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(letters)]
    return pa.Array.from_buffers(pa.large_binary(), len(starts), buffers), starts


@cache
def _ascii_letters() -> bytes:
    return bytes(_lower_letter(code) for code in range(128)) + bytes(128)


@cache
def _letter_table() -> NDArray[np.uint32]:
    """Returns [code points] uint32: the cache of `_lower_letter`, filled when a text contains a code point.

    Filling all million code points at once would take two seconds, and a text has few of them.
    """
    table = np.full(sys.maxunicode + 1, _NOT_SEEN, np.uint32)
    table[:128] = [_lower_letter(code) for code in range(128)]
    return table


def _lower_letter(code: int) -> int:
    """Returns the lower case of a letter (Unicode category L), a mark (M) or a newline; 0 for other characters."""
    lower = chr(code).lower()
    return ord(lower) if code == _NEWLINE or unicodedata.category(lower)[0] in "LM" else 0
