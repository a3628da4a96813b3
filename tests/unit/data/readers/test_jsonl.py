"""JSON lines do for every model what CSV does: the same rows, ids and categories."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedtrain.data.baskets import write_baskets
from embedtrain.data.click_log import DENSE, IDS, LABEL
from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
from embedtrain.data.click_stream import ClickStream, StreamOptions
from embedtrain.data.columns import read_columns
from embedtrain.data.head import write_head
from embedtrain.data.interactions import InteractionOptions, Interactions, prepare_interactions
from embedtrain.data.readers import FORMATS, Layout, jsonl
from embedtrain.data.readers.rows import Parsed, Uses
from embedtrain.data.side_features import SideOptions
from embedtrain.data.sources import expand_sources
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import UserError
from tests.unit.data.click_example import prepared

CITIES = ["Rome", "Oslo", "", 'Ne"w\nYork']
ROWS = [
    {"label": n % 2, "age": n + 0.5, "city": CITIES[n % 4], "tags": [str(t) for t in range(n % 3)]} for n in range(40)
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        text = "|".join(value) if isinstance(value, list) else str(value)
        return '"' + text.replace('"', '""') + '"'

    lines = [",".join(rows[0]), *(",".join(map(cell, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def schema_of(format: str, **options: Any) -> ClickSchema:
    columns = CategoricalColumn(name="city", **options), CategoricalColumn(name="tags", is_bag=True, **options)
    return ClickSchema(file_format=format, label="label", dense=("age",), categorical=columns, dense_transform="none")


def test_a_click_log_is_that_of_csv(tmp_path: Path) -> None:
    logs = [
        prepared(write(tmp_path / f"a.{format}", ROWS), schema_of(format), tmp_path / "cache", part_bytes=100)
        for format, write in (("csv", write_csv), ("jsonl", write_jsonl))
    ]
    csv, jsonl = (log.read(0, 40) for log in logs)
    for field in (LABEL, DENSE, IDS):
        np.testing.assert_array_equal(jsonl.examples[field], csv.examples[field])
    assert jsonl.values.tolist() == csv.values.tolist()
    assert logs[1].vocabulary("city").equals(logs[0].vocabulary("city"))


def test_a_stream(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    stream = ClickStream(
        StreamOptions(path, lines_per_step=64), schema_of("jsonl", num_rows=100, encoding="hash"), ONE_PROCESS
    )
    batch, _, _ = stream.next_batch({})
    assert batch is not None
    assert batch.labels.tolist() == [n % 2 for n in range(40)]
    assert batch.dense.flatten().tolist() == [n + 0.5 for n in range(40)]
    assert batch.features["tags"].lengths.tolist() == [n % 3 for n in range(40)]


def test_bad_lines_are_named_and_left_out(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS[:3]]
    lines[1:1] = [
        '{"label": 1,',
        "",
        "[1]",
        '{"label": 1, "label": 0}',
        '{"label": 7, "city": "x"}',
        '{"city": {"x": 1}}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(
        UserError, match=rf"{path}:2: not a JSON object: .*; {path}:4: expected a JSON object, got list; "
    ):
        prepared(path, schema_of("jsonl"), tmp_path / "cache")
    log = prepared(path, schema_of("jsonl"), tmp_path / "cache", max_bad_lines=5)
    assert (log.num_examples, log.num_faults) == (3, 5)


def test_interactions_features_and_held_out_data(tmp_path: Path) -> None:
    def prepare(format: str, write: Any) -> Interactions:
        pairs = [{"user": n % 5, "item": f"i{n % 7}"} for n in range(30)]
        items = [{"id": f"i{n}", "genre": [f"g{n % 3}", "all"], "maker": f"m{n % 2}"} for n in range(7)]
        options = InteractionOptions(
            path=write(tmp_path / f"train.{format}", pairs),
            held_out_path=write(tmp_path / f"test.{format}", [{"user": "3", "item": "i1"}, {"user": 3, "item": "new"}]),
            items=SideOptions(
                path=write(tmp_path / f"items.{format}", items), separators={"genre": "|", "maker": None}
            ),
        )
        return prepare_interactions(options, str(tmp_path / "cache"), ONE_PROCESS)

    csv, jsonl = prepare("csv", write_csv), prepare("jsonl", write_jsonl)
    assert jsonl.fingerprint == csv.fingerprint
    assert jsonl.users.words == csv.users.words == ["0", "1", "2", "3", "4"]
    assert jsonl.held_out.values.tolist() == csv.held_out.values.tolist()


def test_baskets(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"s": 1, "i": "a"}, {"s": 2, "i": "é"}, {"s": 1, "i": 7}])
    text = write_baskets(path, ("s", "i"), str(tmp_path / "cache"), ONE_PROCESS, format="jsonl").text_path
    assert sorted(Path(text).read_text(encoding="utf-8").splitlines()) == ["a 7", "é"]


def test_its_head_is_whole_lines(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "head").mkdir()
    heads = write_head(path, "auto", str(tmp_path / "head"), 300)
    assert heads is not None
    kept = [json.loads(line) for line in Path(heads[0]).read_text().splitlines()]
    assert kept == ROWS[: len(kept)]
    assert 0 < len(kept) < 40


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], [1, 2]),
        ([1, "x", None], ["1", "x", None]),
        ([2**64 - 1, 1], [str(2**64 - 1), "1"]),
        (["2020-01-01", "2020-01-02"], ["2020-01-01", "2020-01-02"]),
        ([[1, "x"], ["y"], None], [["1", "x"], ["y"], None]),
        ([1, 1.5], [1.0, 1.5]),
    ],
)
def test_values_are_read_as_they_are_spelled(values: list[Any], expected: list[Any]) -> None:
    block = "".join(json.dumps({"a": value, "b": {"c": [{}]}}) + "\n" for value in values).encode()
    uses = Uses(
        numbers=frozenset({"a"}) if 1.5 in values else frozenset(),
        separators={"a": "|"} if list in map(type, values) else {},
    )
    parsed = FORMATS["jsonl"].parse(block, ["a"], ("a",), Layout(), uses)  # type: ignore[attr-defined]
    assert parsed.batch.column("a").to_pylist() == expected


BAGS = {
    '"ab"': ["ab"],
    '"a|b"': ["a", "b"],
    '["a|b", "c"]': ["a|b", "c"],
    "7": ["7"],
    "[7, 8]": ["7", "8"],
    "true": ["true"],
    '""': [],
    '" "': [],
    "[]": [],
    "null": [],
}
NEIGHBOURS = ["", '"x"', '["x"]', "9", "[9]", "null", "1.5", '{"a": 1}']


def parsed_values(value: str, neighbour: str, uses: Uses) -> tuple[Any, dict[int, str]]:
    lines = [f'{{"a": {each}}}' for each in (value, neighbour) if each]
    parsed = FORMATS["jsonl"].parse("\n".join(lines).encode(), ["a"], ("a",), Layout(), uses)  # type: ignore[attr-defined]
    found = parsed.batch.column("a").to_pylist()
    return found[0] if found else None, parsed.wrong


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("value", BAGS)
def test_a_bag_is_that_of_csv_whatever_stands_beside_it(value: str, neighbour: str) -> None:
    bag, wrong = parsed_values(value, neighbour, Uses(separators={"a": "|"}))
    assert [str(each) for each in bag or []] == BAGS[value]
    assert 0 not in wrong
    whole, _ = parsed_values(value, neighbour, Uses(separators={"a": None}))
    assert [str(each) for each in whole or []] == (["a|b"] if value == '"a|b"' else BAGS[value])


REFUSED = {
    "1.50": "column a: expected integers or strings, got the floating-point number 1.5",
    "1.0": "column a: expected integers or strings, got the floating-point number 1.0",
    '["x"]': r"column a: expected one value, since the column is no bag, got \[\"x\"\]",
    "[]": r"column a: expected one value, since the column is no bag, got \[\]",
    '"x\\u0000"': "column a: the text .* holds NUL",
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("value", REFUSED)
def test_what_is_no_id_is_refused_whatever_stands_beside_it(value: str, neighbour: str, tmp_path: Path) -> None:
    _, wrong = parsed_values(value, neighbour, Uses())
    assert re.fullmatch(REFUSED[value], wrong[0])
    neighbour = neighbour or '"x"'
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": "x", "y": 1}}\n{{"a": {value}, "y": 0}}\n{{"a": {neighbour}, "y": 1}}\n')
    with pytest.raises(UserError, match=f"a.jsonl:2: {REFUSED[value]}"):
        list(read_columns(expand_sources(str(path)), ["y", "a"]))
    schema = ClickSchema(file_format="jsonl", label="y", categorical=(CategoricalColumn(name="a"),))
    log = prepared(path, schema, tmp_path / "cache", max_bad_lines=2)
    assert log.num_examples + log.num_faults == 3
    assert log.num_faults == 1 + (neighbour in ('["x"]', "[9]", "1.5", '{"a": 1}'))


def test_in_bags_too_floats_and_nul_are_refused() -> None:
    for value in ("1.5", "[1.5]", '[1, "x", 2.0]', '["\\u0000"]', '"\\u0000"'):
        for neighbour in NEIGHBOURS:
            assert 0 in parsed_values(value, neighbour, Uses(separators={"a": "|"}))[1]


@pytest.mark.parametrize("neighbour", ["true", "1", '"1"', "null", "1.0", '"x"', '["x"]'])
def test_a_boolean_is_a_number_whatever_stands_beside_it(neighbour: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [f'{{"y": {y}, "n": {y}, "id": {y}, "bag": {bag}}}' for y, bag in (("true", "true"), ("false", "[false]"))]
    last = f'{{"y": {neighbour}, "n": {neighbour}, "id": {neighbour}, "bag": {neighbour}}}'
    path.write_text("\n".join([*rows, last]) + "\n")
    columns = (
        CategoricalColumn(name="id", encoding="id", num_rows=2),
        CategoricalColumn(name="bag", encoding="id", num_rows=2, is_bag=True),
    )
    schema = ClickSchema(file_format="jsonl", label="y", dense=("n",), categorical=columns, dense_transform="none")
    log = prepared(path, schema, tmp_path / "cache", max_bad_lines=1)
    records = log.read(0, 2)
    assert records.examples[LABEL].tolist() == [1, 0]
    assert records.examples[DENSE].tolist() == [[1], [0]]
    assert records.examples[IDS].tolist() == [[1], [0]]
    assert records.values[:2].tolist() == [1, 0]


@pytest.mark.parametrize("neighbour", ["true", "1", '"x"', "null"])
def test_a_boolean_among_texts_is_a_text_whatever_stands_beside_it(neighbour: str) -> None:
    value, wrong = parsed_values("true", neighbour, Uses())
    assert (str(value).lower(), wrong) == ("true", {})


def test_numbers_and_labels_may_have_fractions(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"label": 1.0, "age": 1.5, "city": "x", "tags": "a"}, {"label": 0, "age": "2.5"}]
    )
    log = prepared(path, schema_of("jsonl"), tmp_path / "cache")
    assert log.read(0, 2).examples[DENSE].ravel().tolist() == [1.5, 2.5]
    assert log.read(0, 2).examples[LABEL].tolist() == [1, 0]


def parsed_of(block: str) -> Parsed:
    return FORMATS["jsonl"].parse(block.encode(), ["a"], ("a",), Layout(), Uses())  # type: ignore[attr-defined,no-any-return]


GOOD = '{"a": 1}\n'
DEEP = "[" * 100_000 + "]" * 100_000
BAD_LINES = {
    "two_objects_and_a_blank_line": (GOOD + GOOD[:-1] + GOOD + "\n" + GOOD, [0, 3], [1]),
    "an_object_over_two_lines": (GOOD + '{"a":\n2}' + GOOD + GOOD, [0, 3], [1, 2]),
    "an_object_over_two_lines_of_braces": ('{"b": {"a": 1}\n} {"a": 1}\n' + GOOD, [2], [0, 1]),
    "null": (GOOD + "null\n" + GOOD, [0, 2], [1]),
    "null_first": ("null\n" + GOOD, [1], [0]),
    "null_after_an_object": (GOOD[:-1] + " null\n\n" + GOOD, [2], [0]),
    "repeated": ('{"a": 1, "a": 2}\n' + GOOD, [1], [0]),
    "repeated_but_not_read": ('{"a": 1, "b": 2, "b": {"c": 1, "c": 2}}\n' + GOOD, [0, 1], []),
    "repeated_but_not_read_and_blank": ('\n{"a": 1, "b": 2, "b": 3}\n' + GOOD, [1, 2], []),
    "surrogate": ('{"a": "\\uD800"}\n' + GOOD, [1], [0]),
    "surrogate_not_read": ('{"a": 1, "b": "\\udfff"}\n' + GOOD, [1], [0]),
    "surrogate_pair": ('\n{"a": "\\ud800\\udc00"}\n' + GOOD, [1, 2], []),
    "deep": (f'{{"a": {DEEP}}}\n' + GOOD, [1], [0]),
    "lists_of_lists": ('{"a": [[1]]}\n', [], [0]),
}


@pytest.mark.parametrize(("block", "lines", "wrong"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_is_judged_alone_and_by_its_own_number(block: str, lines: list[int], wrong: list[int]) -> None:
    # A blank line sends the block through the other path.
    for more in ("", "\n"):
        parsed = parsed_of(block + more)
        found = range(parsed.batch.num_rows) if parsed.find_lines is None else parsed.find_lines().tolist()
        assert list(found) == lines
        assert list(parsed.wrong) == wrong


def test_a_deep_line_of_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"user": 1, "item": 2}}\n{{"user": {DEEP}, "item": 2}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not a JSON object that can be read: it is nested too deeply"):
        prepare_interactions(InteractionOptions(path=str(path)), str(tmp_path / "cache"), ONE_PROCESS)


def test_a_key_that_comes_late_is_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "read_records", functools.partial(jsonl.read_records, chunk_bytes=100))
    path = write_jsonl(tmp_path / "a.jsonl", [*[{"user": 1, "item": 2}] * 100, {"user": 1, "item": 2, "late": "x"}])
    rows = read_columns(expand_sources(path, (".jsonl",)), ["user", "late"])
    assert [value for each in rows for value in each.columns[1].to_pylist() if value] == ["x"]


def test_a_column_that_is_not_there_and_a_file_of_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(
        UserError, match="there is no column 'user', 'item'; its columns are 'label', 'age', 'city', 'tags'"
    ):
        prepare_interactions(InteractionOptions(path=path), str(tmp_path / "cache"), ONE_PROCESS)
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"b.jsonl: expected lines of JSON objects, found none"):
        prepare_interactions(InteractionOptions(path=str(tmp_path / "b.jsonl")), str(tmp_path / "cache"), ONE_PROCESS)
    (tmp_path / "c.jsonl").write_text('\n[1]\n{"user": 1,\n')
    with pytest.raises(UserError, match=r"c.jsonl:2: expected a JSON object, got list"):
        prepare_interactions(InteractionOptions(path=str(tmp_path / "c.jsonl")), str(tmp_path / "cache"), ONE_PROCESS)
