"""Small texts, such as files of questions, are opened as all texts are."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from embedtrain.data.readers.blocks import read_lines
from embedtrain.errors import UserError
from embedtrain.metrics import evaluate_analogies, evaluate_similarity

PAIRS = "king\tqueen\t8.5\nman\twoman\t8.3\nriver\twater\t7\n"


@pytest.mark.parametrize(
    "content",
    [
        PAIRS.encode(),
        b"\xef\xbb\xbf" + PAIRS.encode(),
        PAIRS.replace("\n", "\r\n").encode(),
        gzip.compress(PAIRS.encode()),
        PAIRS.encode()[:-1],
    ],
    ids=["plain", "mark", "crlf", "gzip", "no_last_end"],
)
def test_lines_are_the_same_however_they_are_stored(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_bytes(content)
    assert read_lines(str(tmp_path / "p.tsv")) == PAIRS.splitlines()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"p\.tsv: no such file or folder"):
        read_lines(str(tmp_path / "p.tsv"))
    (tmp_path / "p.tsv").write_bytes(b"a b\ncaf\xe9 c\n")
    with pytest.raises(UserError, match=r"p\.tsv:2: not UTF-8 text"):
        read_lines(str(tmp_path / "p.tsv"))
    (tmp_path / "q.txt").write_text("")
    assert read_lines(str(tmp_path / "q.txt")) == []


@pytest.mark.parametrize("evaluate", [evaluate_analogies, evaluate_similarity])
def test_an_evaluation_is_not_restricted_to_less_than_a_word(evaluate: object) -> None:
    for number in (0, -3):
        with pytest.raises(UserError, match=f"restrict_vocab must be at least 1, got {number}"):
            evaluate(np.eye(4, dtype=np.float32), list("abcd"), ["a b 1", "c d 2"], number)  # type: ignore[operator]
