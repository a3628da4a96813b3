from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedtrain.data import text
from embedtrain.data.text import TOKENIZERS, encode, tokenize
from embedtrain.data.vocabulary import WordRows


def is_inside_word(character: str, tokenizer: str) -> bool:
    if tokenizer == "letters":
        return unicodedata.category(character)[0] in "LM"
    return ord(character) > ord(" ")


def tokens_by_hand(content: str, tokenizer: str, rows: dict[bytes, int]) -> list[int]:
    """The definition, word by word."""
    tokens = []
    for line in content.split("\n"):
        line = line.lower() if tokenizer == "letters" else line
        words = "".join(c if is_inside_word(c, tokenizer) else "\0" for c in line).split("\0")
        words = [word for word in words if word]
        for start in range(0, len(words), text.MAX_SENTENCE_WORDS):
            sentence = words[start : start + text.MAX_SENTENCE_WORDS]
            kept = [rows[word.encode()] for word in sentence if word.encode() in rows]
            tokens += [~kept[0], *kept[1:]] if kept else []
    return tokens


def cut_at_spaces(content: bytes, chunk_bytes: int) -> Iterator[bytes]:
    """Cuts wherever white space allows it, in the middle of lines too."""
    pieces = re.findall(rb"[^ \n\t]*[ \n\t]?", content)
    chunk = b""
    for piece in pieces:
        chunk += piece
        if len(chunk) >= chunk_bytes:
            yield chunk
            chunk = b""
    yield chunk


def words_of(content: str, tokenizer: str = "letters") -> list[str]:
    return [w.decode() for t in tokenize([content.encode()], tokenizer) for w in t.words.to_pylist()]


def word_rows(*words: bytes) -> WordRows:
    return WordRows(pa.array(words, pa.large_binary()))


ALPHABET = st.sampled_from("abcABCzé\u00c9ßΣ\u03c3И中\u0130'-1\u00b2_,.\t\r  \n\n\u2028\u00a0\U0001d504")
CONTENT = st.text(ALPHABET, max_size=300) | st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=60)


@given(CONTENT, st.integers(1, 50), st.integers(1, 6), st.sampled_from(sorted(TOKENIZERS)))
def test_encodes_as_a_loop_over_words_does(content: str, chunk_bytes: int, max_words: int, tokenizer: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "MAX_SENTENCE_WORDS", max_words)
        distinct = sorted(set(words_of(content, tokenizer)))
        rows = {word.encode(): row for row, word in enumerate(distinct[::2])}
        chunks = cut_at_spaces(content.encode(), chunk_bytes)
        tokens = tokenize(chunks, tokenizer)
        encoded = np.concatenate([np.zeros(0, np.int32), *encode(tokens, word_rows(*rows))])
        assert encoded.dtype == np.int32
        assert encoded.tolist() == tokens_by_hand(content, tokenizer, rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("The Cat's 2nd_Life", ["the", "cat", "s", "nd", "life"]),
        ("ÉCOLE Straße — “Привет”", ["école", "straße", "привет"]),
        ("naïve cafe\u0301", ["naïve", "cafe\u0301"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("x² ½ 42", ["x"]),
        ("", []),
        ("\n\n \n", []),
    ],
)
def test_letters_are_lower_cased_with_their_marks(content: str, words: list[str]) -> None:
    assert words_of(content) == words


def test_ascii_text_is_split_as_any_other() -> None:
    content = bytes(range(1, 128)).decode()
    assert words_of(content) == words_of(content + " é")[:-1]


def test_whitespace_keeps_words_as_they_are() -> None:
    assert words_of("Don't\tPANIC, 42!\r\nÉ", "whitespace") == ["Don't", "PANIC,", "42!", "É"]


def test_a_line_longer_than_the_limit_is_cut_into_sentences() -> None:
    num_words = 2 * text.MAX_SENTENCE_WORDS + 5
    chunks = cut_at_spaces(b"a " * num_words + b"\na", 1000)
    encoded = np.concatenate(list(encode(tokenize(chunks, "letters"), word_rows(b"a"))))
    assert np.flatnonzero(encoded < 0).tolist() == [
        0,
        text.MAX_SENTENCE_WORDS,
        2 * text.MAX_SENTENCE_WORDS,
        num_words,
    ]


def test_the_first_kept_word_of_a_sentence_carries_its_mark() -> None:
    rows = word_rows(b"a", b"b")
    chunks = [b"x x a b\nx\n\nb x a x\nx ", b"x ", b"a b\n"]
    assert np.concatenate(list(encode(tokenize(chunks, "letters"), rows))).tolist() == [-1, 1, -2, 0, -1, 1]


def test_every_character_is_lower_cased_and_kept_as_unicode_says() -> None:
    characters = [
        c for c in map(chr, range(1, sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Co", "Cs")
    ]
    content = "\n".join(f"a{character}b" for character in characters)
    kept = "".join(c if c == "\n" or is_inside_word(c, "letters") else " " for c in content.lower())
    assert words_of(content) == kept.split()


@given(st.text(st.sampled_from("Σ\u03a3aA.'\u00ad\u0301\u0130\u02b0\u00a0 \n\t\r\x1f1"), max_size=40))
def test_a_sigma_is_lower_cased_by_the_letters_around_it(content: str) -> None:
    kept = "".join(c if is_inside_word(c, "letters") else " " for c in content.lower())
    assert words_of(content) == kept.split()
