"""One rule for each oddity of text files, whoever reads them: click logs, interactions and their streams."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedtrain.data.click_log import DENSE, IDS
from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
from embedtrain.data.click_stream import ClickStream, StreamOptions
from embedtrain.data.columns import read_columns
from embedtrain.data.readers import FORMATS, Layout, suffixes_of
from embedtrain.data.readers import csv as csv_reader
from embedtrain.data.readers.csv import Csv
from embedtrain.data.sources import expand_sources
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import UserError
from tests.unit.data.click_example import prepared

Pairs = list[tuple[str, str]]
BODY = "".join(f"{n % 2},u{n}\n" for n in range(20))
EXPECTED = [(str(n % 2), f"u{n}") for n in range(20)]


def as_columns(path: Path, quote: str | None, tmp_path: Path) -> Pairs:
    format = "tsv" if ".tsv" in path.name else "csv"
    sources = expand_sources(str(path), suffixes_of(format))
    batches = read_columns(sources, ["y", "u"], format, Layout(quote=quote))
    return [pair for rows in batches for pair in zip(*(column.to_pylist() for column in rows.columns), strict=True)]


def schema_of(path: Path, quote: str | None, **options: object) -> ClickSchema:
    is_tsv = ".tsv" in path.name
    return ClickSchema(
        file_format="tsv" if is_tsv else "csv",
        label="y",
        delimiter="\t" if is_tsv else ",",
        quote=quote,
        **options,  # type: ignore[arg-type]
    )


def as_clicks(path: Path, quote: str | None, tmp_path: Path) -> Pairs:
    schema = schema_of(path, quote, categorical=(CategoricalColumn(name="u"),))
    log = prepared(path, schema, tmp_path / "cache", part_bytes=20, chunk_bytes=50)
    words = [b"", *log.vocabulary("u")["word"].to_pylist()]
    examples = log.read(0, log.num_examples).examples
    return [(str(int(e["label"])), words[e[IDS][0]].decode()) for e in examples]


READERS = pytest.mark.parametrize("read", [as_columns, as_clicks])
Read = Callable[[Path, "str | None", Path], Pairs]


def written(tmp_path: Path, content: str | bytes, name: str = "a.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


CRLF = "y,u\n" + BODY
SAME = {
    "plain": CRLF,
    "crlf": CRLF.replace("\n", "\r\n"),
    "bare_cr": CRLF.replace("\n", "\r"),
    "mixed_ends": "y,u\r" + BODY[:40] + BODY[40:].replace("\n", "\r\n"),
    "no_last_end": CRLF[:-1],
    "blank_lines": "\n\r\n" + CRLF.replace("\n", "\n\n") + "\n\n",
    "mark": b"\xef\xbb\xbf" + CRLF.encode(),
    "mark_and_quoted_names": b'\xef\xbb\xbf"y","u"\r\n' + BODY.encode(),
    "quoted": "y,u\n" + "".join(f'"{n % 2}","u{n}"\n' for n in range(20)),
    "other_order": "u, y ,\n" + "".join(f"u{n},{n % 2},\n" for n in range(20)),
    "unnamed_columns": ",y,u,\n" + "".join(f"{n},{n % 2},u{n},x\n" for n in range(20)),
    "gzip_members": gzip.compress(CRLF[:30].encode()) + gzip.compress(b"") + gzip.compress(CRLF[30:].encode()),
    "bz2_members": bz2.compress(CRLF[:30].encode()) + bz2.compress(CRLF[30:].encode()),
    "xz_members": lzma.compress(CRLF[:30].encode()) + lzma.compress(CRLF[30:].encode()),
    "zstd_frames": b"".join(pa.compress(t.encode(), "zstd", asbytes=True) for t in (CRLF[:30], CRLF[30:])),
}


@READERS
@pytest.mark.parametrize("content", SAME.values(), ids=SAME)
def test_files_that_say_the_same(read: Read, content: str | bytes, tmp_path: Path) -> None:
    assert read(written(tmp_path, content), "auto", tmp_path) == EXPECTED


@READERS
def test_quoted_fields_hold_line_breaks_delimiters_and_quotes(read: Read, tmp_path: Path) -> None:
    names = ["line one\nline two", "a\r\nb", 'the "Weird" one, and', '5" disk', "u"]
    content = io.StringIO(newline="")
    csv.writer(content).writerows([("y", "u"), *((n % 2, names[n % 5]) for n in range(30))])
    found = read(written(tmp_path, content.getvalue()), "auto", tmp_path)
    assert found == [(str(n % 2), names[n % 5]) for n in range(30)]


@READERS
def test_a_tsv_is_quoted_only_if_told(read: Read, tmp_path: Path) -> None:
    path = written(tmp_path, 'y\tu\n1\t"Weird Al\n0\t"Crocodile" Dundee\n1\tplain\n', "a.tsv")
    assert read(path, "auto", tmp_path) == [("1", '"Weird Al'), ("0", '"Crocodile" Dundee'), ("1", "plain")]
    path = written(tmp_path, 'y\tu\n1\t"two\tfields\nand lines"\n', "b.tsv")
    assert read(path, '"', tmp_path) == [("1", "two\tfields\nand lines")]
    path = written(tmp_path, "y,u\n1,'a,b'\n0,\"c\n", "c.csv")
    assert read(path, "'", tmp_path) == [("1", "a,b"), ("0", '"c')]
    path = written(tmp_path, 'y,u\n1,"a\n', "d.csv")
    assert read(path, None, tmp_path) == [("1", '"a')]


REFUSED = {
    "quote_open": (
        "y,u\n" + BODY + '1,"open\n' + BODY,
        r"a\.csv:22: a quote opened on this line is never closed",
    ),
    "quote_open_packed": (
        gzip.compress(("y,u\n" + BODY + '1,"open\n' + BODY).encode()),
        r"a\.csv:22: a quote opened on this line is never closed",
    ),
    "repeated_names": ("y,u,u\n1,a,b\n", r"a\.csv: the file names 'u' more than once"),
    "nul": ("y,u\n" + BODY + "1,a\0b\n", r"a\.csv:22: a binary file, not text: NUL at byte 117"),
    "latin1": (("y,u\r" + BODY).encode() + b"1,caf\xe9\n", r"a\.csv:22: not UTF-8 text: 0xe9 at byte 119"),
    "utf16": (("y,u\n" + BODY).encode("utf-16"), r"a\.csv: UTF-16 text: expected UTF-8; .*iconv -f UTF-16"),
    "missing": ("y,v\n" + BODY, r"a\.csv: there is no column '?u'?; .* '?y'?, '?v'?"),
    "ragged": ("y,u\n\n" + BODY + "1,a,b\n", r"a\.csv:23: expected 2 fields, got 3"),
    "ragged_after_quoted_breaks": ('y,u\n1,"a\r\n\rb"\n0\n', r"a\.csv:5: expected 2 fields, got 1"),
    "empty": ("", r"a\.csv is empty"),
    "truncated": (gzip.compress(os.urandom(99))[:-3], r"a\.csv is not a valid gzip file"),
}


@READERS
@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_files_that_are_refused_name_file_and_line(
    read: Read, content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read(written(tmp_path, content), "auto", tmp_path)


def test_repeated_names_of_parquet_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array(["a"]), pa.array(["b"])], names=["y", "u", "u"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: the file names 'u' more than once"):
        list(read_columns(expand_sources(str(tmp_path / "a.parquet")), ["y", "u"], "parquet"))


IDS_OF_PARQUET = [
    pa.array([7, 8, 7]),
    pa.array([7, 8, 7], pa.uint8()),
    pa.array(["7", "8", "7"]),
    pa.array(["7", "8", "7"]).cast(pa.string_view()),
    pa.array(["7", "8", "7"]).dictionary_encode(),
    pa.array([7, 8, 7]).dictionary_encode(),
]


@pytest.mark.parametrize("ids", IDS_OF_PARQUET, ids=lambda ids: str(ids.type).split(",")[0])
def test_ids_are_spelled_alike_in_every_type_of_column(ids: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"y": [1, 0, 1], "u": ids}), tmp_path / "a.parquet")
    rows = read_columns(expand_sources(str(tmp_path / "a.parquet")), ["y", "u"], "parquet")
    assert [each.columns[1].to_pylist() for each in rows] == [["7", "8", "7"]]
    schema = ClickSchema(file_format="parquet", label="y", categorical=(CategoricalColumn(name="u"),))
    log = prepared(tmp_path / "a.parquet", schema, tmp_path / "cache")
    assert log.vocabulary("u")["word"].to_pylist() == [b"7", b"8"]


SPELLINGS = {
    "7": 7,
    "007": 7,
    "+7": 7,
    " 7 ": 7,
    "0x1F": None,
    "1_000": None,
    "\uff17": None,
    "1e2": 100.0,
    ".5": 0.5,
    "5.": 5.0,
    "1d3": None,
    "Infinity": None,
    "nan": None,
}


@pytest.mark.parametrize("is_id", [True, False])
@pytest.mark.parametrize("text", SPELLINGS)
def test_a_number_is_read_alike_whatever_stands_beside_it(text: str, is_id: bool, tmp_path: Path) -> None:
    expected = SPELLINGS[text] if not is_id or isinstance(SPELLINGS[text], int) else None
    schema = ClickSchema(
        file_format="csv",
        label="y",
        dense=() if is_id else ("u",),
        categorical=(CategoricalColumn(name="u" if is_id else "c", num_rows=2000, encoding="id" if is_id else "hash"),),
        dense_transform="none",
    )
    for neighbours in ("", "1,bad,c\n"):
        path = written(tmp_path, f"y,u,c\n1,{text},c\n0,2,c\n{neighbours}")
        log = prepared(path, schema, tmp_path / f"cache{len(neighbours)}", max_bad_lines=2)
        found = log.read(0, log.num_examples).examples[IDS if is_id else DENSE].ravel().tolist()
        assert found == ([2] if expected is None else [expected, 2])


LISTS = [
    pa.array([["a", "b"], ["a", "c"], ["d", "a"]]),
    pa.FixedSizeListArray.from_arrays(pa.array(["a", "b", "a", "c", "d", "a"]), 2),
    pa.ListArray.from_arrays(pa.array([0, 2, 4, 6], pa.int32()), pa.array(list("abacda")).dictionary_encode()),
]


@pytest.mark.parametrize("lists", LISTS, ids=["list", "fixed_size_list", "list_of_dictionary"])
def test_lists_are_bags_in_every_type_of_column(lists: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"y": [1, 0, 1], "u": lists}), tmp_path / "a.parquet")
    rows = read_columns(expand_sources(str(tmp_path / "a.parquet")), ["y", "u"], "parquet")
    assert [each.columns[1].to_pylist() for each in rows] == [lists.to_pylist()]
    bag = CategoricalColumn(name="u", is_bag=True)
    log = prepared(
        tmp_path / "a.parquet", ClickSchema(file_format="parquet", label="y", categorical=(bag,)), tmp_path / "cache"
    )
    words = [b"", *log.vocabulary("u")["word"].to_pylist()]
    assert [words[row] for row in log.read(0, 3).values] == [b"a", b"b", b"a", b"c", b"d", b"a"]


def test_row_groups_and_files_of_no_rows(tmp_path: Path) -> None:
    table = pa.table({"y": [1, 0, 1], "u": ["a", "b", "a"]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table.slice(0, 0), table.slice(0, 2), table.slice(0, 0), table.slice(2)):
            writer.write_table(part)
    pq.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    (tmp_path / "_SUCCESS").touch()
    schema = ClickSchema(file_format="parquet", label="y", categorical=(CategoricalColumn(name="u"),))
    assert prepared(tmp_path, schema, tmp_path / "cache").num_examples == 3


def test_a_first_line_may_be_long(tmp_path: Path) -> None:
    name = "u" * (1 << 18)
    path = written(tmp_path, f'\n\n y,"{name}\n,""x""",,007\n1,a,,\n')
    source = expand_sources(str(path), (".csv",))[0]
    assert FORMATS["csv"].columns(source, [], Layout()) == ("y", f'{name}\n,"x"', "", "007")


def test_what_no_rule_foresees_is_refused_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise pa.ArrowInvalid("no rule\nforesees it")

    path = written(tmp_path, "0,a\n1,b\n")
    monkeypatch.setattr(Csv, "parse", fail)
    with pytest.raises(UserError, match=r"a\.csv:1 and the 1 lines after it: no rule foresees it"):
        stream_of(path)
    with pytest.raises(UserError, match=r"a\.csv:1 and the lines after it: no rule foresees it"):
        list(read_columns(expand_sources(str(path)), ["u"], "csv", Layout(columns=("y", "u"))))


def test_records_that_are_counted_otherwise_than_parsed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_reader, "_records", lambda block, quoting: (np.zeros(0, np.int64), np.zeros(0, np.int64)))
    with pytest.raises(UserError, match=r"a\.csv:1 and the .*: the text has 0 records, of which 2 could be parsed"):
        stream_of(written(tmp_path, "0,a\n\n1,b\n"))


def stream_of(path: Path, max_bad_lines: int = 0) -> list[float]:
    column = CategoricalColumn(name="u", num_rows=100, encoding="hash")
    schema = ClickSchema(file_format="csv", label="y", columns=("y", "u"), categorical=(column,))
    stream = ClickStream(StreamOptions(str(path), 7, max_bad_lines=max_bad_lines), schema, ONE_PROCESS)
    labels: list[float] = []
    position: dict[str, object] = {}
    while True:
        batch, reached, is_over = stream.next_batch(position)
        position = dict(reached)
        if is_over:
            return labels
        assert batch is not None
        labels += batch.labels.tolist()


@pytest.mark.parametrize(
    "name", [name for name in SAME if "order" not in name and "names" not in name and "unnamed" not in name]
)
def test_a_stream_follows_the_same_rules(name: str, tmp_path: Path) -> None:
    content = SAME[name]
    (tmp_path / "s").mkdir()
    written(tmp_path / "s", content)
    (tmp_path / "s" / "_SUCCESS").touch()
    # The line of names is no example.
    assert stream_of(tmp_path / "s", max_bad_lines=1) == [n % 2 for n in range(20)]


MARK = b"\xef\xbb\xbf"
JOINED = {
    "csv": (MARK + b"y,u\n1,a\n" + MARK + b"y,u\n1,b\n", None),
    "tsv": (b"y\tu\n1\ta\n" + MARK + b"1\tb", None),
    "lines": (b"1 a\n1 b\n" + MARK + b"1 c\n", "lines"),
    "jsonl": (MARK + b'{"y": 1, "u": 2}\n{"y": 1, "u": 2}\r' + MARK + b'{"y": 1, "u": 2}\n', "jsonl"),
    "quoted": (b'y,u\n1,"\n' + MARK + b'b"\n', None),
    "csv_crlf": (MARK + b"y,u\r\n1,a\r\n" + MARK + b"y,u\r\n1,b\r\n", None),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_byte_order_mark_within_a_file_is_refused_in_every_format(name: str, tmp_path: Path) -> None:
    content, format = JOINED[name]
    format = format or ("tsv" if name == "tsv" else "csv")
    path = written(tmp_path, content, f"a.{'txt' if format == 'lines' else format}")
    with pytest.raises(UserError, match=rf"{path}:3: the line begins with a byte-order mark"):
        list(read_columns(expand_sources(str(path)), ["y", "u"], format))


def test_a_byte_order_mark_within_a_stream_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, MARK + b"1,a\n" + MARK + b"1,b\n")
    with pytest.raises(UserError, match=r"line 2 of .*a\.csv: the line begins with a byte-order mark"):
        stream_of(path)


def test_records_of_a_stream_go_on_through_quoted_line_breaks(tmp_path: Path) -> None:
    path = written(tmp_path, '0,a\n1,"b\n\r\nc"\n0,d\n9,"x\ny"\n1,z')
    assert stream_of(path, max_bad_lines=1) == [0, 1, 0, 1]
    with pytest.raises(UserError, match=r"a\.csv:6: column y: expected a label of 0 or 1, got '9'"):
        stream_of(path)
    path = written(tmp_path, '0,a\n1,"b\nc\n0,d\n')
    with pytest.raises(UserError, match=r"a\.csv:2: a quote .* never closed"):
        stream_of(path)
    # The second line of the record that is given up is a line of its own, with too few fields.
    assert stream_of(path, max_bad_lines=2) == [0, 0]
    path = written(tmp_path, "0,a\n1,b\0\n")
    with pytest.raises(UserError, match=r"line 2 of .*a\.csv is not text: it holds NUL"):
        stream_of(path)
    path = written(tmp_path, gzip.compress(b"0,a\n" * 999)[:-9])
    with pytest.raises(UserError, match=r"a\.csv is not a valid gzip file"):
        stream_of(path)
