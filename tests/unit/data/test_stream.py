from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embedtrain.data import stream as stream_module
from embedtrain.data.readers.quotes import Quoting, open_test
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


def piped(data: bytes) -> int:
    """Returns a file descriptor that gives the bytes and then ends."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    return reader


@pytest.fixture
def standard_input() -> Iterator[Callable[[bytes], int]]:
    opened: list[int] = []

    def give(data: bytes) -> int:
        opened.append(piped(data))
        return opened[-1]

    yield give
    for descriptor in opened:
        os.close(descriptor)


def test_standard_input_leaves_out_what_was_read(standard_input: Callable[[bytes], int]) -> None:
    first = LineStream("-", standard_input=standard_input(b"1\r\n2\n3"))
    assert first.read(2) == ["1", "2"]
    again = LineStream("-", StreamPosition(**vars(first.position)), standard_input=standard_input(b"1\n2\n3"))
    assert again.read(2) == ["3"]
    assert again.position.line == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"3\n4\n5\n", "the first 2 lines of standard input differ from the lines read before"),
        (b"1\n", "standard input ends after 1 lines, but 2 were read before"),
    ],
)
def test_another_stream_than_the_one_that_was_read_is_refused(
    given: bytes, message: str, standard_input: Callable[[bytes], int]
) -> None:
    first = LineStream("-", standard_input=standard_input(b"1\n2\n3\n"))
    first.read(2)
    with pytest.raises(UserError, match=message):
        LineStream("-", first.position, standard_input=standard_input(given)).read(1)


def test_a_file_that_was_begun_must_still_be_there(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("1\n2\n")
    stream = LineStream(str(tmp_path))
    stream.read(3)
    (tmp_path / "a").unlink()
    assert LineStream(str(tmp_path), stream.position).read(9) == ["2"]
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match="b is gone, of which 1 lines were read"):
        LineStream(str(tmp_path), stream.position).read(1)


def test_lines_that_have_not_come_are_not_waited_for_and_none_is_lost() -> None:
    reader, writer = os.pipe()
    stream = LineStream("-", standard_input=reader)
    os.write(writer, b"1\n2")
    assert stream.take(2) is None
    assert stream.position.line == 0  # nothing was handed out
    os.write(writer, b"\n3\n")
    taken = stream.take(2)
    assert taken is not None
    assert taken.texts == ["1", "2"]
    os.close(writer)
    assert [stream.read(2), stream.read(2)] == [["3"], []]
    os.close(reader)


def test_lines_know_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n2\n")
    (tmp_path / "b").write_text("")
    (tmp_path / "c").write_text("3\n4\n")
    stream = LineStream(str(tmp_path))
    stream.read(1)
    taken = stream.take(3)
    assert taken is not None
    assert [taken.place(index) for index in range(3)] == ["a:2", "c:1", "c:2"]
    assert LineStream(str(tmp_path), stream.position).read(1) == []


def test_one_file_is_a_stream_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n2\n")
    stream = LineStream(str(tmp_path / "a"))
    assert stream.read(1) == ["1"]
    assert LineStream(str(tmp_path / "a"), stream.position).read(5) == ["2"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file or folder"):
        LineStream(str(tmp_path / "absent")).read(1)
    (tmp_path / "a").write_bytes(b"fine\n\xff\n")
    with pytest.raises(UserError, match=r"line 2 of .*/a is not UTF-8"):
        LineStream(str(tmp_path)).read(2)


def test_a_stray_quote_costs_one_line_and_each_line_is_scanned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "MAX_OPEN_BYTES", 1 << 12)
    num_scanned = 0

    def counting(quoting: Quoting) -> Callable[[bytes, bool], bool]:
        is_open_after = open_test(quoting)

        def count(line: bytes, is_open: bool) -> bool:
            nonlocal num_scanned
            num_scanned += len(line)
            return is_open_after(line, is_open)

        return count

    monkeypatch.setattr(stream_module, "open_test", counting)
    lines = ["0,a", '1,"b', *["2,c"] * 50_000, '3,"d\ne"', '4,"f', "5,g"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    stream = LineStream(str(tmp_path), quoting=Quoting(",", '"'))
    taken = stream.take(10)
    assert taken is not None
    assert taken.texts == ["0,a", "", *["2,c"] * 8]
    assert list(taken.wrong) == [1]
    assert taken.place(1).endswith("a.csv:2")
    assert stream.position.line == 10
    assert num_scanned < 3 << 12
    # It goes on from a position amid the lines that were held back.
    rest = LineStream(str(tmp_path), StreamPosition(**vars(stream.position)), quoting=Quoting(",", '"')).take(10**6)
    assert rest is not None
    assert rest.texts == [*["2,c"] * 49_992, '3,"d\ne"', "", "5,g"]
    assert list(rest.wrong) == [49_993]
    with pytest.raises(UserError, match=r"a\.csv:2: a quote opened on this line is never closed"):
        LineStream(str(tmp_path), quoting=Quoting(",", '"')).read(10)


@pytest.mark.parametrize("quoting", [None, Quoting(",", '"')])
def test_a_line_may_not_be_longer_than_one_of_a_file(
    quoting: Quoting | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "MAX_RECORD_BYTES", 1 << 20)
    (tmp_path / "a.csv").write_bytes(b"a\n" + bytes([120]) * (3 << 20))
    with pytest.raises(UserError, match=r"a\.csv: expected lines of at most 1 MiB"):
        LineStream(str(tmp_path), quoting=quoting).read(2)


def test_line_ends_that_fall_between_two_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\nbc\rd\n\r\n\re\r")
    for size in range(1, 9):
        monkeypatch.setattr(stream_module, "_READ_BYTES", size)
        assert LineStream(str(tmp_path)).read(9) == ["a", "bc", "d", "", "", "e"]


LINES = ["a,b", "", 'c,"d', 'e",f', "g", "ä,\u2028", 'h,"i"', "j\r", "k"]


@pytest.mark.parametrize("read_bytes", [1 << 16, 11, 3])
@pytest.mark.parametrize("num_lines", [1, 2, 3, 100])
def test_lines_that_are_taken_together_are_those_that_are_taken_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int, num_lines: int
) -> None:
    monkeypatch.setattr(stream_module, "_READ_BYTES", read_bytes)
    text = "\n".join([*(f"plain {number},ü" for number in range(40)), *LINES, *("x" * 20, "y" * 7) * 9])
    (tmp_path / "a.csv").write_bytes(text.encode())
    (tmp_path / "b.csv").write_bytes(f"{text}\n".encode())
    for quoting in (None, Quoting(",", '"')):

        def read(position: StreamPosition | None = None) -> Iterator[tuple[list[str], list[str], StreamPosition]]:
            stream = LineStream(str(tmp_path), position, quoting=quoting)  # noqa: B023, called in this round alone
            while (lines := stream.take(num_lines)) is not None and lines.texts:
                yield lines.texts, [lines.place(index) for index in range(len(lines.texts))], stream.position

        quick = list(read())
        with monkeypatch.context() as one_by_one:
            one_by_one.setattr(stream_module._Records, "run_of", lambda *_: None)
            slow = list(read())
        assert quick == slow
        for number in (0, len(quick) // 2, len(quick) - 1):
            assert list(read(quick[number][2])) == quick[number + 1 :]


def test_a_url_that_cannot_be_used_is_named() -> None:
    with pytest.raises(UserError, match="nosuch://x"):
        LineStream("nosuch://x").read(1)
