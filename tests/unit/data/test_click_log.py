from __future__ import annotations

import gzip
import math
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedtrain.data.click_batches import ClickBatches
from embedtrain.data.click_log import DENSE, IDS, LABEL
from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
from embedtrain.data.prepare_clicks import ClickBase
from embedtrain.data.sources import refuse_changes
from embedtrain.data.token_hash import hashed_rows
from embedtrain.data.vocabulary import COUNTS_SCHEMA
from embedtrain.errors import UserError
from tests.unit.data.click_example import criteo_line, criteo_schema, examples_of, prepared, write_criteo


def rows_of(text: str, num_rows: int = 1000) -> int:
    return int(hashed_rows(pa.array([text]), num_rows)[0])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_criteo_line_becomes_an_example(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "day.tsv"
    lines = [criteo_line(1, [3, "", -2], ["68fd1e64", "", "ABCDEF01"]), criteo_line(0, [1, 5, 0], ["68fd1e64"])]
    path.write_text("\n".join(lines))  # the last line may lack its end
    log = prepared(path, criteo_schema(), cache)
    examples = log.read(0, 2).examples
    assert examples[LABEL].tolist() == [1.0, 0.0]
    first, second = examples[DENSE]
    # A missing number is NaN, a negative one keeps its sign.
    np.testing.assert_allclose(first[:3], [math.log(4), np.nan, -math.log(3)], rtol=1e-6)
    np.testing.assert_allclose(second[:3], [math.log(2), math.log(6), 0], rtol=1e-6)
    assert examples[IDS][0, :3].tolist() == [rows_of("68fd1e64"), rows_of(""), rows_of("ABCDEF01")]
    assert log.num_positives == 1
    assert log.num_rows["C26"] == 1000


def test_dense_columns_are_normalised_and_missing_ones_are_the_mean(tmp_path: Path, cache: Path) -> None:
    path = write_criteo(tmp_path / "day.tsv", 400)
    log = prepared(path, criteo_schema(), cache)
    dense = ClickBatches(log, 400, block_examples=16).batch(0, 0).dense.numpy()
    is_missing = np.isnan(log.read(0, 400).examples[DENSE])
    assert is_missing.any()
    assert (dense[is_missing] == 0).all()
    present = np.where(is_missing, np.nan, dense)
    np.testing.assert_allclose(np.nanmean(present, axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.nanstd(present, axis=0), 1, atol=1e-5)


def test_every_example_comes_once_an_epoch_in_an_order_of_its_own(tmp_path: Path, cache: Path) -> None:
    path = write_criteo(tmp_path / "day.tsv", 333)
    log = prepared(path, criteo_schema(), cache)
    in_order = examples_of(ClickBatches(log, 1024).batch(0, 0))
    batches = ClickBatches(log, 64, block_examples=8, seed=3)
    epochs = []
    for epoch in (0, 1):
        epochs.append([e for step in range(batches.steps_per_epoch) for e in examples_of(batches.batch(epoch, step))])
    assert sorted(map(repr, epochs[0])) == sorted(map(repr, in_order))
    assert epochs[0] != epochs[1]
    # Nothing but the step's number is needed to be back at an example.
    again = ClickBatches(log, 64, block_examples=8, seed=3)
    assert examples_of(again.batch(1, 2)) == epochs[1][128:192]


@pytest.mark.parametrize("part_bytes", [1 << 30, 3000, 500])
def test_the_parts_of_a_file_do_not_change_the_examples(tmp_path: Path, cache: Path, part_bytes: int) -> None:
    path = write_criteo(tmp_path / "day.tsv", 100)
    schema = criteo_schema(num_rows=None)
    whole = prepared(path, schema, cache / "whole")
    parts = prepared(path, schema, cache / "parts", part_bytes=part_bytes, chunk_bytes=700)
    assert parts.read(0, 100).examples.tobytes() == whole.read(0, 100).examples.tobytes()
    assert parts.read(37, 61).examples.tobytes() == whole.read(37, 61).examples.tobytes()
    np.testing.assert_allclose(parts.dense_std, whole.dense_std, rtol=1e-12)


def test_a_vocabulary_has_a_row_for_each_value_and_one_for_all_others(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "train.csv").write_text("y,city\n1,Rome\n0,Oslo\n1, Rome \n0,\n0,Lima\n1,Oslo\n")
    (tmp_path / "valid.csv").write_text("y,city\n1,Kyiv\n0,Rome\n0,Lima\n")
    column = CategoricalColumn(name="city", min_count=2)
    schema = ClickSchema(file_format="csv", label="y", categorical=(column,))
    log = prepared(tmp_path / "train.csv", schema, cache)
    assert log.vocabulary("city")["word"].to_pylist() == [b"Oslo", b"Rome"]
    assert log.num_rows == {"city": 3}
    assert log.read(0, 6).examples[IDS][:, 0].tolist() == [2, 1, 2, 0, 0, 1]
    valid = prepared(tmp_path / "valid.csv", schema, cache, like=log)
    assert valid.read(0, 3).examples[IDS][:, 0].tolist() == [0, 2, 0]
    assert valid.num_rows == log.num_rows


def test_a_vocabulary_keeps_the_most_frequent_values_of_a_table_of_given_size(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.csv").write_text("y,city\n1,a\n0,b\n1,b\n0,c\n0,c\n1,c\n")
    column = CategoricalColumn(name="city", num_rows=3)
    log = prepared(tmp_path / "a.csv", ClickSchema(file_format="csv", label="y", categorical=(column,)), cache)
    assert log.read(0, 6).examples[IDS][:, 0].tolist() == [0, 2, 2, 1, 1, 1]


def test_csv_parquet_and_compressed_csv_give_the_same_examples(tmp_path: Path, cache: Path) -> None:
    tags = [[], ["b"], ["a", "b", "a"], ["c", ""]]
    table = pa.table(
        {
            "clicked": pa.array([1, 0, 0, 1], pa.int8()),
            "unused": pa.array([b"x"] * 4),
            "price": pa.array([1.5, None, -3.0, 0.0]),
            "user": pa.array([7, 8, 7, 9], pa.uint64()),
            "shop": pa.array(["s", "t", None, "s"]).dictionary_encode(),
            "tags": pa.array(tags),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    lines = ["user,clicked,price,shop,tags", "7,1,1.5,s,", '8,0,,"t",b', "", "7,0,-3,,a|b|a", "9,1,0,s,c|", ""]
    (tmp_path / "a.csv").write_text("\r\n".join(lines))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    columns = (
        CategoricalColumn(name="user", num_rows=10, encoding="id"),
        CategoricalColumn(name="shop"),
        CategoricalColumn(name="tags", num_rows=50, encoding="hash", is_bag=True),
    )
    logs = []
    for name, file_format in (("a.parquet", "parquet"), ("a.csv", "csv"), ("a.csv.gz", "csv")):
        schema = ClickSchema(file_format=file_format, label="clicked", dense=("price",), categorical=columns)
        logs.append(prepared(tmp_path / name, schema, cache, part_bytes=10))
    batches = [ClickBatches(log, 32).batch(0, 0) for log in logs]
    bags = batches[0].features["tags"]
    assert bags.lengths.tolist() == [0, 1, 3, 2]
    assert bags.values.tolist() == [rows_of(tag, 50) for bag in tags for tag in bag]
    assert batches[0].features["user"].values.tolist() == [7, 8, 7, 9]
    for other in batches[1:]:
        assert examples_of(other) == examples_of(batches[0])


def test_logs_are_read_from_any_file_system(cache: Path) -> None:
    with fsspec.open("memory://clicks/a.csv", "wt") as file:
        file.write("1,u\n0,v\n")
    schema = ClickSchema(
        file_format="csv", label="y", columns=("y", "u"), categorical=(CategoricalColumn(name="u"),), delimiter=","
    )
    assert prepared("memory://clicks/a.csv", schema, cache).num_examples == 2


BAD_LINES = {
    "1\tx": "expected 40 fields, got 2",
    criteo_line(2): "column label: expected a label of 0 or 1, got '2'",
    criteo_line(""): "column label: the label is missing",
    criteo_line(1, [1, "nan"]): "column I2: nan is not a finite number",
    criteo_line(1, [1, 2, "1e300"]): "column I3: 1e+300 is not a finite number",
    criteo_line(1, ["abc"]): "column I1: could not convert string to float: 'abc'",
    criteo_line(1, [1], ["68fd1e6g"]): "column C1: '68fd1e6g' is not hexadecimal",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_reported_with_file_and_line(tmp_path: Path, cache: Path, line: str) -> None:
    path = tmp_path / "day.tsv"
    good = criteo_line(1, [1, 2], ["68fd1e64"])
    path.write_text("\n".join([good, "", good, line, good]) + "\n")
    with pytest.raises(UserError) as raised:
        prepared(path, criteo_schema(), cache)
    assert f"{path}:4: {BAD_LINES[line]}" in str(raised.value)
    assert not list(cache.iterdir())
    log = prepared(path, criteo_schema(), cache, max_bad_lines=1)
    assert (log.num_examples, log.num_faults) == (3, 1)
    with pytest.raises(UserError, match=r"has 1 bad lines, which exceeds data\.max_bad_lines=0"):
        prepared(path, criteo_schema(), cache)


def test_line_numbers_count_from_the_start_of_the_file_whatever_the_part(tmp_path: Path, cache: Path) -> None:
    path = write_criteo(tmp_path / "day.tsv", 60)
    lines = path.read_text().splitlines()
    lines[41] = criteo_line(1, ["nan"])
    lines[57] = "short"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as raised:
        prepared(path, criteo_schema(), cache, part_bytes=900, chunk_bytes=400, max_bad_lines=1)
    assert f"{path}:42: column I1" in str(raised.value)
    assert f"{path}:58: expected 40 fields" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("9223372036854775808", "id 9223372036854775808 is past 2\\^63 - 1"),
        ("-1", "id -1 is outside 0 to 99"),
        ("100", "id 100 is outside 0 to 99"),
        ("", "the id is missing"),
        ("7.0", "'7.0' is not an integer"),
    ],
)
def test_ids_that_are_no_rows_are_refused(tmp_path: Path, cache: Path, text: str, reason: str) -> None:
    path = tmp_path / "a.csv"
    column = CategoricalColumn(name="user", num_rows=100, encoding="id")
    path.write_text(f"y,user\n1,3\n0,{text}\n")
    with pytest.raises(UserError, match=f"a.csv:3: column user: {reason}"):
        prepared(path, ClickSchema(file_format="csv", label="y", categorical=(column,)), cache)
    bag = CategoricalColumn(name="user", num_rows=100, encoding="id", is_bag=True)
    path.write_text(f"y,user\n1,3\n0,5|{text}|6\n")
    with pytest.raises(UserError, match=f"a.csv:3: column user: {reason}"):
        prepared(path, ClickSchema(file_format="csv", label="y", categorical=(bag,)), cache)


def test_parquet_rows_and_types_are_checked(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.parquet"
    user = CategoricalColumn(name="user", num_rows=10, encoding="id")
    schema = ClickSchema(file_format="parquet", label="y", dense=("x",), categorical=(user,))
    columns = {"y": [1, 0], "x": [1.0, math.nan], "user": pa.array([1, 2**63], pa.uint64())}
    pq.write_table(pa.table(columns), path, row_group_size=1)
    with pytest.raises(UserError, match=r"a.parquet, row 1: column x: nan is not a finite number"):
        prepared(path, schema, cache)
    pq.write_table(pa.table(columns | {"x": [1.0, 2.0]}), path)
    with pytest.raises(UserError, match=r"a.parquet, row 1: column user: id 9223372036854775808 is past 2\^63 - 1"):
        prepared(path, schema, cache)
    pq.write_table(pa.table(columns | {"user": [1.0, 2.0]}), path)
    with pytest.raises(UserError, match=r"column user has the type double, .* cast it to integers or texts"):
        prepared(path, schema, cache)
    pq.write_table(pa.table(columns | {"user": [[1], [2]]}), path)
    with pytest.raises(UserError, match=r"column user holds lists .*: declare it as a categorical bag"):
        prepared(path, schema, cache)
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"a.parquet is not a valid Parquet file"):
        prepared(path, schema, cache)


def test_wrong_column_names_are_refused_with_those_that_exist(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.csv").write_text("y,usr\n1,3\n")
    pq.write_table(pa.table({"y": [1], "usr": [3]}), tmp_path / "a.parquet")
    for name, file_format in (("a.csv", "csv"), ("a.parquet", "parquet")):
        schema = ClickSchema(file_format=file_format, label="y", categorical=(CategoricalColumn(name="user"),))
        message = f"{name}: there is no column 'user'; its columns are 'y', 'usr'; data.categorical says which to read"
        with pytest.raises(UserError, match=message):
            prepared(tmp_path / name, schema, cache)


@pytest.mark.parametrize("part_bytes", [1 << 20, 40])
def test_quoted_line_breaks_belong_to_their_field_however_the_file_is_divided(
    tmp_path: Path, cache: Path, part_bytes: int
) -> None:
    lines = ["y,u", *(f'{n % 2},"a\n{n},""b"""' if n % 3 else f"{n % 2},{n}" for n in range(40)), "9,x"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    schema = ClickSchema(file_format="csv", label="y", categorical=(CategoricalColumn(name="u"),))
    log = prepared(tmp_path / "a.csv", schema, cache, part_bytes=part_bytes, chunk_bytes=30, max_bad_lines=1)
    words = [b"", *log.vocabulary("u")["word"].to_pylist()]
    values = [words[row].decode() for row in log.read(0, 40).examples[IDS][:, 0]]
    assert values == [f'a\n{n},"b"' if n % 3 else str(n) for n in range(40)]
    line = sum(text.count("\n") + 1 for text in lines)
    with pytest.raises(UserError, match=rf"a\.csv:{line}: column y: expected a label of 0 or 1"):
        prepared(tmp_path / "a.csv", schema, cache / "again", part_bytes=part_bytes, chunk_bytes=30)


def test_a_log_without_examples_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.csv").write_text("y,u\n")
    schema = ClickSchema(file_format="csv", label="y", categorical=(CategoricalColumn(name="u"),))
    with pytest.raises(UserError, match="the click log has no usable line"):
        prepared(tmp_path / "a.csv", schema, cache)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(UserError, match=r"a.csv is empty"):
        prepared(tmp_path / "a.csv", schema, cache)


def test_a_file_that_changes_between_epochs_is_found(tmp_path: Path, cache: Path) -> None:
    path = write_criteo(tmp_path / "day.tsv", 50)
    log = prepared(tmp_path, criteo_schema(), cache)
    batches = ClickBatches(
        log, 64, seed=1, on_epoch=lambda: refuse_changes(str(tmp_path), (".tsv",), log.source_identities)
    )
    batches.batch(0, 0)
    write_criteo(path, 51)
    with pytest.raises(UserError, match=r"day.tsv: changed while the run trained on it"):
        batches.batch(1, 0)
    assert prepared(tmp_path, criteo_schema(), cache).fingerprint != log.fingerprint


def test_the_same_content_has_the_same_fingerprint(tmp_path: Path, cache: Path) -> None:
    path = write_criteo(tmp_path / "day.tsv", 50)
    schema = criteo_schema(num_rows=None)
    first = prepared(path, schema, cache)
    path.write_text(path.read_text())  # a newer file of the same bytes
    second = prepared(path, schema, cache)
    assert second.path != first.path
    assert second.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "hash"}, "feature u: encoding 'hash' needs num_rows"),
        ({"encoding": "hsh"}, "feature u: encoding must be one of"),
        ({"num_rows": 0}, "feature u: num_rows must be at least 1, got 0"),
        ({"min_count": 0}, "feature u: min_count must be at least 1"),
    ],
)
def test_columns_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CategoricalColumn(name="u", **options)  # type: ignore[arg-type]


def test_schemas_are_checked() -> None:
    column = CategoricalColumn(name="u")
    with pytest.raises(UserError, match="the label and the categorical columns name u more than once"):
        ClickSchema(file_format="csv", label="y", categorical=(column, column))
    with pytest.raises(UserError, match="columns: there is no column u; there are y, v"):
        ClickSchema(file_format="csv", label="y", categorical=(column,), columns=("y", "v"))
    with pytest.raises(UserError, match="at least one categorical column"):
        ClickSchema(file_format="csv", label="y", dense=("x",))


def test_what_another_run_knew_decides_on_the_prepared_examples() -> None:
    def facts(words: list[bytes], counts: list[int], mean: float = 0.0) -> tuple[object, ...]:
        values = pa.table([pa.array(words, pa.large_binary()), pa.array(counts, pa.int64())], schema=COUNTS_SCHEMA)
        return ClickBase({"city": values}, np.array([mean]), np.ones(1), takes_new=True).facts

    assert facts([b"ab", b"c"], [2, 1]) == facts([b"ab", b"c"], [2, 1])
    others = [facts([b"a", b"bc"], [2, 1]), facts([b"ab", b"c"], [2, 2]), facts([b"ab", b"c"], [2, 1], mean=0.5)]
    assert facts([b"ab", b"c"], [2, 1]) not in others
