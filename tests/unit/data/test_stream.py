from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest

from embedtrain.data.stream import LineStream, StreamPosition
from embedtrain.errors import UserError


def test_a_folder_is_read_in_order_of_names_and_each_line_once(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("3\n4\n")
    (tmp_path / "a.txt").write_text("1\n2")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"5\r\n"))
    (tmp_path / ".d.txt").write_text("hidden\n")
    (tmp_path / "e.txt.partial").write_text("unfinished\n")
    stream = LineStream(str(tmp_path))
    assert [stream.read(3), stream.read(3), stream.read(3)] == [["1", "2", "3"], ["4", "5"], []]


def test_it_goes_on_at_the_exact_line(tmp_path: Path) -> None:
    for name, text in (("a", "1\n2\n"), ("b", "3\n4\n"), ("c", "5\n")):
        (tmp_path / name).write_text(text)
    for num_read in range(6):
        stream = LineStream(str(tmp_path))
        first = stream.read(num_read)
        rest = LineStream(str(tmp_path), StreamPosition(**vars(stream.position))).read(9)
        assert first + rest == ["1", "2", "3", "4", "5"]


def test_a_growing_folder_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("1\n")
    waits: list[float] = []

    def grow(seconds: float) -> None:
        waits.append(seconds)
        (tmp_path / f"{len(waits) + 1}").write_text(f"{len(waits) + 1}\n")

    stream = LineStream(str(tmp_path), poll_seconds=0.5, pause=grow)
    assert stream.read(3) == ["1", "2", "3"]
    assert waits == [0.5, 0.5]


def test_a_file_that_comes_too_late_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "5").write_text("5\n")
    stream = LineStream(str(tmp_path), poll_seconds=1.0, pause=lambda _: (tmp_path / "4").write_text("4\n"))
    with pytest.raises(UserError, match="4 appeared after 5 was begun"):
        stream.read(2)


def test_standard_input_leaves_out_what_was_read() -> None:
    def stream(position: StreamPosition | None = None) -> LineStream:
        return LineStream("-", position, standard_input=io.BytesIO(b"1\n2\n3\n"))

    first = stream()
    assert first.read(2) == ["1", "2"]
    assert stream(first.position).read(2) == ["3"]


def test_one_file_is_a_stream_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n2\n")
    stream = LineStream(str(tmp_path / "a"))
    assert stream.read(1) == ["1"]
    assert LineStream(str(tmp_path / "a"), stream.position).read(5) == ["2"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file or folder"):
        LineStream(str(tmp_path / "absent")).read(1)
    (tmp_path / "a").write_bytes(b"fine\n\xff\n")
    with pytest.raises(UserError, match="line 2 of a is not UTF-8"):
        LineStream(str(tmp_path)).read(2)
