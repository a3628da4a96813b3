"""`embedtrain init`: a configuration of a file's columns, and of what embedtrain brings, by name."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedtrain.cli import main
from embedtrain.config.resolved import to_yaml
from embedtrain.config.values import settings_of
from embedtrain.recipes.drafting import draft
from embedtrain.recipes.loading import load_config, shipped_names

NAMES = ["user_id", "shop", "price", "qty", "tags", "note", "fixed", "clicked"]


def rows(count: int = 400) -> list[list[Any]]:
    generator = random.Random(1)
    return [
        [
            generator.randrange(40) + 1000,
            f"shop {generator.randrange(9)}",
            round(generator.random() * 50, 2),
            generator.randrange(6),
            "|".join(generator.sample("abcd", 2)),
            f"note {number}",
            "x",
            int(generator.random() < 0.2),
        ]
        for number in range(count)
    ]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_csv(path: str, found: Sequence[Sequence[Any]], names: Sequence[str] | None = NAMES, comma: str = ",") -> None:
    lines = [] if names is None else [comma.join(names)]
    Path(path).write_text("\n".join([*lines, *(comma.join(map(str, row)) for row in found)]) + "\n")


def data_of(text: str) -> dict[str, Any]:
    Path("my.yaml").write_text(text)
    data: dict[str, Any] = settings_of(load_config("my.yaml", []))["data"]
    return data


@pytest.mark.parametrize("kind", ["csv", "semicolons", "tsv", "jsonl", "parquet"])
def test_columns_are_what_they_look_like_in_every_format(kind: str) -> None:
    path = {"semicolons": "train.csv"}.get(kind, f"train.{kind}")
    if kind in ("csv", "semicolons", "tsv"):
        write_csv(path, rows(), comma={"csv": ",", "semicolons": ";", "tsv": "\t"}[kind])
    elif kind == "jsonl":
        Path(path).write_text("\n".join(json.dumps(dict(zip(NAMES, row, strict=True))) for row in rows()) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([dict(zip(NAMES, row, strict=True)) for row in rows()]), path)
    data = data_of(draft(path))
    assert (data["path"], data["label"], data["positive"]) == (path, "clicked", None)
    assert data["dense"] == ["price"]
    assert data["categorical"] == ["user_id", "shop", "qty", "tags"]
    if kind == "parquet":  # It has lists for that, and its texts are not parted.
        assert not data["features"]
    else:
        assert data["features"]["tags"]["bag"] and data["features"]["tags"]["separator"] == "|"
    assert data["delimiter"] == (";" if kind == "semicolons" else None)


def test_what_was_guessed_is_said() -> None:
    write_csv("train.csv", rows())
    text = draft("train.csv")
    for part in (
        "from all 400 rows of train.csv",
        "guessed: it has two values, 0 (",
        "# 40 values, such as 10",
        "# numbers from 0.",
        "# left out: note, whose values are nearly all distinct: 400 values, such as note 0",
        "# left out: fixed, which has the same value in every row",
    ):
        assert part in text


def test_a_file_without_names_gets_some_and_a_label_of_texts_its_positive() -> None:
    # With spaces after the commas, which are no part of the values.
    write_csv("train.csv", [[*row[:-1], [" >50K", " <=50K: no"][row[-1] == 0]] for row in rows()], names=None)
    text = draft("train.csv")
    assert "The first line holds values, not names of columns" in text
    data = data_of(text)
    assert data["columns"] == [f"c{place}" for place in range(1, 9)]
    assert (data["label"], data["positive"]) == ("c8", ">50K")


def test_the_label_can_be_named(capfd: pytest.CaptureFixture[str]) -> None:
    write_csv("train.csv", [[*row, row[0] % 2] for row in rows()], names=[*NAMES, "odd"])
    assert data_of(draft("train.csv", label="odd"))["label"] == "odd"
    assert data_of(draft("train.csv"))["label"] == "clicked"
    for label, said in (
        ("shop", "two values, got 9"),
        ("tags", "two values, got one of bags"),
        ("none", "there is no such column"),
    ):
        assert main(["init", "--from", "train.csv", "--label", label]) == 2
        assert said in capfd.readouterr().err


def test_names_and_values_of_any_characters_are_quoted() -> None:
    names = ["a: b", "on", "null", "c #d", "ä'\"", "é", "f,g", "yes"]
    write_csv("train.csv", rows(), names=[])
    lines = Path("train.csv").read_text().splitlines()[1:]
    Path("train.csv").write_text("\n".join([",".join(f'"{n.replace(chr(34), chr(34) * 2)}"' for n in names), *lines]))
    data = data_of(draft("train.csv"))
    assert data["categorical"] == ["a: b", "on", "c #d", "ä'\""]
    assert data["dense"] == ["null"] and data["label"] == "yes"


def test_users_and_items_are_found_by_their_names(capfd: pytest.CaptureFixture[str]) -> None:
    found = [[f"m{row[0]}", row[1], row[3]] for row in rows()]
    write_csv("ratings.csv", found, names=["movie", "customer_no", "stars"])
    assert main(["init", "--from", "ratings.csv"]) == 0
    text = capfd.readouterr().out
    data = data_of(text)
    assert (data["user_column"], data["item_column"]) == ("customer_no", "movie")
    assert "model: retrieval" in text and "# not used: stars" in text


@pytest.mark.parametrize(
    ("name", "times", "is_time"),
    [
        ("timestamp", ["881250949", "891717742"], True),
        ("created_at", ["2024-05-31T12:00:00", "2024-05-30"], True),
        ("watchTime", ["1.5", "2.5"], False),
        ("viewedAt", ["1700000001.5", "1700000002"], True),
        ("date", ["yesterday", "today"], False),
        ("date", ["2024-05-31", ""], False),
        ("times_bought", ["1", "2"], False),
        ("lat", ["30.2", "31.5"], False),
        ("runtime", ["90", "120"], False),
    ],
)
def test_a_column_of_times_orders_the_interactions(name: str, times: list[str], is_time: bool) -> None:
    found = [[row[0], row[1], times[at % 2]] for at, row in enumerate(rows())]
    write_csv("train.csv", found, names=["user", "item", name])
    for model in ("retrieval", "sasrec"):
        data = data_of(draft("train.csv", model))
        assert data["time_column"] == (name if is_time else None)
        assert data["split"] == "leave_one_out"


def test_events_are_told_from_attributes_of_users_and_items() -> None:
    found = [[row[0], row[1], "1999-01-01", 881250949] for row in rows()]
    write_csv("train.csv", found, names=["user", "item", "release_date", "timestamp"])
    assert data_of(draft("train.csv", "sasrec"))["time_column"] == "timestamp"
    write_csv(
        "train.csv", [[1, *row[:2], row[0]] for row in found], names=["user_agent", "user_id", "item_type", "item_id"]
    )
    data = data_of(draft("train.csv", "sasrec"))
    assert (data["user_column"], data["item_column"]) == ("user_id", "item_id")
    write_csv("train.csv", [["05/1/2024", *row[:2]] for row in found], names=["date", "a", "b"])
    text = draft("train.csv", "sasrec")
    data = data_of(text)
    assert (data["user_column"], data["item_column"], data["time_column"]) == ("a", "b", None)
    assert "date does not hold a time of the interaction in every row: the order of the lines counts" in text
    write_csv("train.csv", [[at, row[1]] for at, row in enumerate(found)], names=["user", "item"])
    assert data_of(draft("train.csv", "retrieval"))["split"] == "none"
    table = pa.table({"user": [1, 1, 2], "item": [1, 2, 1], "seen": pa.array([3, 4, 5], pa.timestamp("ms"))})
    pq.write_table(table, "train.parquet")
    assert data_of(draft("train.parquet", "sasrec"))["time_column"] == "seen"


@pytest.mark.parametrize("model", ["ranking", "retrieval", "sasrec"])
def test_what_is_drafted_trains(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    write_csv("train.csv", rows(), comma=";")
    assert main(["init", model, "--from", "train.csv"]) == 0
    Path("my.yaml").write_text(capfd.readouterr().out)
    assert main(["train", "my.yaml", "--dry-run", "data.cache_path=cache", "run.path=run"]) == 0
    assert ("step 1" if model == "sasrec" else "step 2") in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected --from FILE, or the name of a configuration: quickstart, ranking"),
        (["nothing"], "embedtrain has no configuration 'nothing'; there are quickstart"),
        (["--from", "none.csv"], "none.csv: no such file"),
        (["--from", "text.txt"], "lines of `user item item ...` have no columns with names"),
        (["--from", "numbers.csv"], "no column has two values, as a label has; its columns are a (3 values), b (3"),
        (["--from", "empty.csv"], "has no usable rows"),
        (
            ["word2vec", "--from", "numbers.csv"],
            "--from drafts configurations of ranking, retrieval and sasrec, not of",
        ),
        (["retrieval", "--from", "numbers.csv", "--label", "a"], "--label needs a model that predicts a column"),
        (["ranking", "--label", "a"], "--label names a column of the file in --from"),
        (["retrieval", "--from", "numbers.csv"], "expected a column of users and one of items, got the columns a, b"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("a b c\n")
    Path("numbers.csv").write_text("a,b\n1.5,1.25\n2.5,2.25\n3.5,3.25\n")
    Path("empty.csv").write_text("a,b\n")
    assert main(["init", *arguments]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("name", shipped_names())
def test_a_configuration_is_found_by_its_name_and_printed_as_it_is(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    by_name = to_yaml(load_config(name, ["data.path=x"]))
    assert main(["init", name]) == 0
    Path("copy.yaml").write_text(capfd.readouterr().out)
    assert to_yaml(load_config("copy.yaml", ["data.path=x"])) == by_name
    Path(name).write_text("seed: 7\n")
    assert load_config(name, ["data.path=x"]).seed == 7, "a file of the user's own comes first"


def test_a_name_that_is_none_says_which_there_are(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "word2vek", "data.path=x"]) == 2
    said = capfd.readouterr().err
    assert "there is no configuration file word2vek; embedtrain's own configurations are quickstart, ranking" in said


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("style", [{"color": "red"}, [{"color": "red"}, {"color": "blue"}], [["a"], ["b"]]])
def test_columns_of_objects_are_left_out_and_all_rows_are_counted(kind: str, style: Any) -> None:
    found = [dict(zip(NAMES, row, strict=True), style=style if at % 2 else None) for at, row in enumerate(rows())]
    if kind == "jsonl":
        Path("train.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(found), "train.parquet")
    text = draft(f"train.{kind}")
    assert "from all 400 rows" in text and "# left out: style, which holds objects" in text
    data = data_of(text)
    assert (data["label"], data["dense"]) == ("clicked", ["price"])
    assert data["categorical"] == ["user_id", "shop", "qty", "tags"]
    if isinstance(style, dict):
        assert main(["train", "my.yaml", "--dry-run", "data.cache_path=cache", "run.path=run"]) == 0


def test_lines_that_cannot_be_read_are_counted_and_the_first_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    write_csv("train.csv", rows())
    lines = Path("train.csv").read_text().splitlines()
    Path("train.csv").write_text("\n".join([*lines[:5], "1,2", *lines[5:], "3"]) + "\n")
    text = draft("train.csv")
    assert "from all 400 rows" in text
    assert "# left out: 2 lines that cannot be read; " in text
    assert "/train.csv:6: expected 8 fields, got 2" in text
    assert "max_bad_lines: 0" in text and "2 leaves them out" in text
    assert data_of(text)["max_bad_lines"] == 0
    Path("bad.jsonl").write_text("{\n" * 3 + '{"a": {}}\n')
    assert main(["init", "--from", "bad.jsonl"]) == 2
    assert "has no usable rows; left out: a, which holds objects" in capfd.readouterr().err


@pytest.mark.parametrize("extra", ["", "2019"])
def test_a_header_with_an_empty_name_or_a_number_names_the_columns(extra: str) -> None:
    # As pandas writes a table with its index.
    write_csv("train.csv", [[number, *row] for number, row in enumerate(rows())], names=[extra, *NAMES])
    text = draft("train.csv")
    data = data_of(text)
    assert data["columns"] is None and data["label"] == "clicked"
    assert data["dense"] == [*([extra] if extra else []), "price"]
    assert ("# left out: column 1, which has no name" in text) == (not extra)
    assert "from all 400 rows" in text
    if not extra:
        assert main(["train", "my.yaml", "--dry-run", "data.cache_path=cache", "run.path=run"]) == 0


def test_a_header_that_repeats_a_name_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    write_csv("train.csv", rows(), names=[*NAMES[:3], "price", *NAMES[4:]])
    assert main(["init", "--from", "train.csv"]) == 2
    assert "train.csv: the file names 'price' more than once" in capfd.readouterr().err


@pytest.mark.parametrize(
    "first", [["1001", "shop 1", "?", "1", "a|b", "", "x", "0"], ["", "NA", "", "", "a|b", "", "x", "1"]]
)
def test_a_first_line_of_values_some_of_which_are_missing_is_no_header(first: list[str]) -> None:
    write_csv("train.csv", [first, *rows()], names=None)
    assert data_of(draft("train.csv"))["columns"] == [f"c{place}" for place in range(1, 9)]


def test_a_name_that_no_table_may_have_is_left_out_and_refused(capfd: pytest.CaptureFixture[str]) -> None:
    write_csv("train.csv", rows(), names=["user/id", *NAMES[1:]])
    text = draft("train.csv")
    assert "# left out: user/id, whose name holds '/', which names of tables must not: rename it to use it" in text
    assert data_of(text)["categorical"] == ["shop", "qty", "tags"]
    assert main(["train", "my.yaml", "data.categorical=[shop,user/id]", "run.path=run"]) == 2
    assert "'user/id' cannot name a table: the name of a column in a table" in capfd.readouterr().err
    write_csv("one.csv", [[row[0], row[-1]] for row in rows()], names=["user/id", "clicked"])
    assert main(["init", "ranking", "--from", "one.csv"]) == 2
    assert "; user/id, whose name holds '/'" in capfd.readouterr().err


def test_why_a_model_was_passed_over_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    found = [[row[0], row[1], ["0", "1", "maybe"][at % 3]] for at, row in enumerate(rows())]
    write_csv("train.csv", found, names=["user", "item", "label"])
    text = draft("train.csv")
    assert "model: retrieval" in text
    said = "no column has two values, as a label has; label has 3 values: 0, 1, maybe"
    assert f"# no configuration of ranking: {said}\n" in text
    assert main(["init", "ranking", "--from", "train.csv"]) == 2
    assert f"train.csv: {said}" in capfd.readouterr().err
    write_csv("train.csv", [[row[0], "", row[2]] for row in found], names=["user", "item", "label"])
    assert main(["init", "--from", "train.csv"]) == 2
    assert "; no configuration of retrieval and sasrec: the column item, which should hold items, has no value" in (
        capfd.readouterr().err
    )


def test_missing_labels_and_numbers_with_a_few_texts_are_told() -> None:
    found = rows()
    found[3][-1] = found[7][-1] = ""
    found[5][2] = "NA"
    write_csv("train.csv", found)
    text = draft("train.csv")
    assert "; 2 rows have none" in text and "have no label; 2 leaves them out" in text
    assert "values look like numbers except NA (1 row)" in text
    assert data_of(text)["label"] == "clicked"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_values_of_bags_are_counted_and_empty_ones_are_not_missing(kind: str) -> None:
    generator = random.Random(2)
    found = [[generator.sample("abcdef", at % 4), at % 7 == 0] for at in range(100)]
    if kind == "csv":
        write_csv("train.csv", [["|".join(bag), int(label)] for bag, label in found], names=["interests", "label"])
    else:
        records = [{"interests": bag, "label": int(label)} for bag, label in found]
        Path("train.jsonl").write_text("\n".join(map(json.dumps, records)))
        pq.write_table(pa.Table.from_pylist(records), "train.parquet")
    text = draft(f"train.{kind}")
    assert "# 6 values, such as " in text and ", 25 empty" in text and "missing" not in text


def test_types_of_parquet_that_no_model_can_use_are_left_out() -> None:
    odd = {"image": b"\xff\xfe", "day": date(2024, 1, 1), "vector": [0.5, 1.0], "cost": Decimal(3)}
    found = [{**dict(zip(NAMES, row, strict=True)), **odd, "cost": Decimal(at % 9)} for at, row in enumerate(rows())]
    pq.write_table(pa.Table.from_pylist(found), "train.parquet")
    text = draft("train.parquet")
    for said in (
        "image, which holds values of type binary",
        "day, which holds times",
        "vector, which holds lists of numbers with fractions",
    ):
        assert f"# left out: {said}" in text
    data = data_of(text)
    assert (data["dense"], data["categorical"]) == (["price", "cost"], ["user_id", "shop", "qty", "tags"])
    assert main(["train", "my.yaml", "--dry-run", "data.cache_path=cache", "run.path=run"]) == 0
