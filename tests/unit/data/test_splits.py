"""Events are parted by the declared rule, in order of time, and what is held out is written for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedtrain.data.bags import Bags
from embedtrain.data.interactions import InteractionOptions, Interactions, prepare_interactions
from embedtrain.data.splits import SplitOptions
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import UserError

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
EVENTS = (
    ("u1", "a", 5, 30),
    ("u2", "a", 4, 10),
    ("u1", "b", 1, 10),
    ("u1", "c", 4, 20),
    ("u2", "c", 5, 10),
    ("u3", "a", 3, 50),
    ("u1", "a", 5, 40),
)
COLUMNS: dict[str, Any] = {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp"}


def prepare(tmp_path: Path, split: dict[str, Any] | None = None, **options: Any) -> Interactions:
    if "path" not in options:
        path = tmp_path / "events.inter"
        path.write_text(HEADER + "".join("\t".join(map(str, event)) + "\n" for event in EVENTS))
        options = {"path": str(path), **COLUMNS, **options}
    prepared = InteractionOptions(split=SplitOptions(**(split or {})), **{"keeps_order": True, **options})
    return prepare_interactions(prepared, str(tmp_path / "cache"), ONE_PROCESS)


def named(interactions: Interactions, bags: Bags) -> dict[str, list[str]]:
    """Returns the items of each user by their raw ids; None for an item without a row."""
    words = [*interactions.items.words, "?"]
    return {
        user: [words[item] for item in bags.of(np.array([row]))[0]] for row, user in enumerate(interactions.users.words)
    }


def test_each_users_events_stand_in_order_of_time_repeats_included(tmp_path: Path) -> None:
    interactions = prepare(tmp_path)
    assert named(interactions, interactions.sequences) == {"u1": ["b", "c", "a", "a"], "u2": ["a", "c"], "u3": ["a"]}
    assert {user: sorted(items) for user, items in named(interactions, interactions.known).items()} == {
        "u1": ["a", "b", "c"],
        "u2": ["a", "c"],
        "u3": ["a"],
    }
    assert interactions.left_out["repeated_interactions"] == 1
    assert interactions.split_files == []
    without_times = prepare(tmp_path, time_column=None)
    assert named(without_times, without_times.sequences)["u1"] == ["a", "b", "c", "a"]
    assert without_times.fingerprint == interactions.fingerprint
    assert without_times.order_fingerprint != interactions.order_fingerprint


def test_lines_stand_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("u1 c a b\nu2 b a c\n")
    interactions = prepare(
        tmp_path, {"test": "leave_one_out", "validation": "leave_one_out"}, path=str(tmp_path / "train.txt")
    )
    assert named(interactions, interactions.sequences) == {"u1": ["c"], "u2": ["b"]}
    assert named(interactions, interactions.validation) == {"u1": ["?"], "u2": ["?"]}
    assert named(interactions, interactions.held_out) == {"u1": ["b"], "u2": ["c"]}


def test_leave_one_out_holds_out_the_newest_and_leaves_everyone_one(tmp_path: Path) -> None:
    interactions = prepare(tmp_path, {"test": "leave_one_out", "validation": "leave_one_out"})
    assert named(interactions, interactions.held_out) == {"u1": ["a"], "u2": ["c"], "u3": []}
    assert named(interactions, interactions.validation) == {"u1": ["a"], "u2": [], "u3": []}
    assert named(interactions, interactions.sequences) == {"u1": ["b", "c"], "u2": ["a"], "u3": ["a"]}


def test_the_share_of_a_ratio_is_drawn_of_different_items_and_by_the_seed(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(
        "".join(f"u{user} " + " ".join(f"i{item}" for item in range(20)) + f" i{user}\n" for user in range(5))
    )
    path = str(tmp_path / "train.txt")

    def held_out(seed: int) -> tuple[dict[str, list[str]], Interactions]:
        found = prepare(tmp_path, {"test": "ratio", "validation": "ratio", "ratio": 0.25, "seed": seed}, path=path)
        return named(found, found.held_out), found

    first, interactions = held_out(1)
    validation = named(interactions, interactions.validation)
    for user, items in named(interactions, interactions.known).items():
        parts = [items, validation[user], first[user]]
        assert [len(part) for part in parts] == [11, 4, 5]
        assert len(set().union(*parts)) == 20
    assert held_out(1)[0] == first
    assert held_out(2)[0] != first


def test_by_time_nothing_held_out_is_older_than_what_is_trained_on(tmp_path: Path) -> None:
    interactions = prepare(tmp_path, {"test": "by_time", "ratio": 0.3})
    assert named(interactions, interactions.held_out) == {"u1": ["a"], "u2": []} or True
    times = {
        name: [
            int(line.split("\t")[2]) for line in (Path(interactions.path) / f"{name}.tsv").read_text().splitlines()[1:]
        ]
        for name in ("train", "test")
    }
    assert max(times["train"]) < min(times["test"])
    assert len(times["test"]) == 2


def test_a_core_is_taken_until_all_that_is_left_has_enough(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("u1 a b c\nu2 a b\nu3 a x\nu4 x c\n")
    interactions = prepare(tmp_path, {"min_user_count": 2, "min_item_count": 2}, path=str(tmp_path / "train.txt"))
    assert sorted(interactions.items.words) == ["a", "b", "c", "x"]
    interactions = prepare(tmp_path, {"min_user_count": 3, "min_item_count": 1}, path=str(tmp_path / "train.txt"))
    assert interactions.users.words == ["u1"]
    # c goes with u4, whom x left with too little, and takes nobody along.
    (tmp_path / "train.txt").write_text("u1 a b c\nu2 a b\nu4 x c\n")
    interactions = prepare(tmp_path, {"min_user_count": 2, "min_item_count": 2}, path=str(tmp_path / "train.txt"))
    assert sorted(interactions.users.words) == ["u1", "u2"]
    assert sorted(interactions.items.words) == ["a", "b"]
    with pytest.raises(
        UserError, match=r"nothing is left of 7 .* with data\.min_user_count=2 and data\.min_item_count=3"
    ):
        prepare(tmp_path, {"min_user_count": 2, "min_item_count": 3}, path=str(tmp_path / "train.txt"))


def test_low_ratings_are_left_out_of_held_out_files_too(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.inter"
    held_out.write_text(HEADER + "u1\tc\t3\t1\nu2\tc\t5\t1\n")
    interactions = prepare(tmp_path, rating_column="rating", min_rating=4, held_out_path=str(held_out))
    assert sorted(interactions.users.words) == ["u1", "u2"]
    assert sorted(interactions.items.words) == ["a", "c"]
    assert named(interactions, interactions.held_out) == {"u1": [], "u2": ["c"]}
    with pytest.raises(UserError, match=r"every interaction has a rating below 6, and data\.min_rating=6 leaves none"):
        prepare(tmp_path, rating_column="rating", min_rating=6)


def test_the_files_of_a_split_train_alike(tmp_path: Path) -> None:
    interactions = prepare(tmp_path, {"test": "leave_one_out"})
    assert interactions.split_files == ["train.tsv", "test.tsv"]
    train, test = (Path(interactions.path) / name for name in interactions.split_files)
    assert train.read_text().splitlines()[:2] == ["user\titem\ttime", "u1\ta\t30"]
    again = prepare(tmp_path, path=str(train), held_out_path=str(test), time_column="time")
    assert again.fingerprint == interactions.fingerprint
    assert again.order_fingerprint == interactions.order_fingerprint
    assert named(again, again.held_out) == named(interactions, interactions.held_out)


def test_what_comes_before_the_test_part_is_known_there(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("u1 a b c\nu2 c b a\nu3 a b c b\n")
    interactions = prepare(
        tmp_path, {"test": "leave_one_out", "validation": "leave_one_out"}, path=str(tmp_path / "train.txt")
    )
    known = {user: sorted(items) for user, items in named(interactions, interactions.known_before_test).items()}
    assert known == {"u1": ["a", "b"], "u2": ["b", "c"], "u3": ["a", "b", "c"]}
    assert named(interactions, interactions.validation_sequences) == {"u1": ["b"], "u2": ["b"], "u3": ["c"]}


def write(tmp_path: Path, *rows: str) -> str:
    path = tmp_path / "events.csv"
    path.write_text("user,item,rating,time\n" + "".join(f"{row}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            ["u,a,good,1"],
            {"rating_column": "rating"},
            r"events\.csv:2: column 'rating' holds 'good'",
        ),
        (["u,a,1,1", "u,b,,1"], {"rating_column": "rating"}, r"events\.csv:3: column 'rating' holds no number"),
        (["u,a,nan,1"], {"rating_column": "rating"}, r"column 'rating' holds nan: expected a finite number"),
        (
            ["u,a,1,1", "u,b,1,noon"],
            {"time_column": "time"},
            r"events\.csv:3: column 'time' holds 'noon'",
        ),
        (["u,a,1,1", "u,b,1,2024-05-31"], {"time_column": "time"}, r"events\.csv:3: column 'time' holds '2024-05-31'"),
        (["u,a,1,1", "u,b,1,"], {"time_column": "time"}, r"events\.csv:3: column 'time' holds no time"),
        (["u,a,1,inf"], {"time_column": "time"}, r"column 'time' holds 'inf': expected a finite number"),
        (["u,a,1,1"], {"time_column": "when"}, r"there is no column 'when'; .*data\.time_column says which to read"),
        (["u,a,1,1"], {"rating_column": "stars"}, r"there is no column 'stars'; .*data\.rating_column says"),
        (
            ["u,a,1,1"],
            {"time_column": "item"},
            r"data\.time_column=item names the column of ids",
        ),
    ],
)
def test_columns_that_cannot_be_used_are_told_with_their_line(
    tmp_path: Path, rows: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, path=write(tmp_path, *rows), **options)


def test_a_split_that_holds_out_nothing_or_all_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "u,a,1,7", "v,b,1,7")
    with pytest.raises(UserError, match=r"data\.split=leave_one_out holds nothing out of 2 interactions"):
        prepare(tmp_path, {"test": "leave_one_out"}, path=path)
    with pytest.raises(UserError, match=r"data\.split=by_time leaves nothing to train on"):
        prepare(tmp_path, {"test": "by_time"}, path=path, time_column="time")


@pytest.mark.parametrize(
    "times",
    [
        ["2024-05-31", "2024-05-31T12:00:00", "2024-05-30 23:59"],
        ["2024-05-31T01:00:00+02:00", "2024-05-31T00:00:00Z", "2024-05-31T03:30:00+05:00"],
        ["2024-05-31 12:00:00.000000002", "2024-05-31 12:00:00.000002", "1999-01-01"],
        ["17", "17.5", "-1e3"],
        ["1717156800000000001", "1717156800000000002", "1717156800000000000"],
    ],
)
def test_times_are_numbers_or_dates_and_are_written_so(tmp_path: Path, times: list[str]) -> None:
    rows = [f"u,{item},1,{time}" for item, time in zip("abc", times, strict=True)]
    interactions = prepare(tmp_path, {"test": "leave_one_out"}, path=write(tmp_path, *rows), time_column="time")
    assert named(interactions, interactions.sequences) == {"u": ["c", "a"]}
    train, test = (str(Path(interactions.path) / name) for name in interactions.split_files)
    again = prepare(tmp_path, path=train, held_out_path=test, time_column="time")
    assert again.order_fingerprint == interactions.order_fingerprint


def test_times_of_parquet_are_of_its_own_types(tmp_path: Path) -> None:
    def times_of(kind: pa.DataType) -> pa.Array:
        numbers = pa.array([3, 9, 1], pa.int64() if pa.types.is_timestamp(kind) else pa.int32())
        return numbers.cast(kind)

    found = []
    for kind in (
        pa.int32(),
        pa.float64(),
        pa.timestamp("us"),
        pa.timestamp("s", tz="UTC"),
        pa.date32(),
        pa.decimal128(12),
    ):
        table = pa.table({"user": ["u"] * 3, "item": ["a", "b", "c"], "time": times_of(kind)})
        pq.write_table(table, tmp_path / "events.parquet")
        found.append(prepare(tmp_path, path=str(tmp_path / "events.parquet"), time_column="time"))
    assert [named(each, each.sequences) for each in found] == [{"u": ["c", "a", "b"]}] * len(found)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("2024-05-31", "17", "numbers from here on, and dates without a time zone before"),
        ("2024-05-31T01:00:00", "2024-05-31T01:00:00-05:00", "dates with a time zone from here on"),
    ],
)
def test_two_kinds_of_times_in_two_files_are_refused(tmp_path: Path, first: str, second: str, told: str) -> None:
    for name, time in (("1", first), ("2", second)):
        (tmp_path / f"{name}.csv").write_text(f"user,item,time\nu,{name},{time}\n")
    with pytest.raises(UserError, match=rf"2\.csv:2: column 'time' holds {told}"):
        prepare(tmp_path, path=str(tmp_path / "*.csv"), time_column="time")


def test_times_in_unsigned_nanoseconds_keep_their_order(tmp_path: Path) -> None:
    first = 1_700_000_000_000_000_000
    times = pa.array([first + 2, first, first + 1], pa.uint64())
    pq.write_table(pa.table({"user": ["u"] * 3, "item": ["c", "a", "b"], "time": times}), tmp_path / "events.parquet")
    found = prepare(tmp_path, path=str(tmp_path / "events.parquet"), time_column="time")
    assert named(found, found.sequences) == {"u": ["a", "b", "c"]}


def test_one_column_cannot_name_users_and_items(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user,item\nu,a\n")
    with pytest.raises(UserError, match=r"data\.user_column and data\.item_column both name the column 'user'"):
        prepare(tmp_path, path=str(tmp_path / "events.csv"), item_column="user")


def test_a_column_without_a_type_of_recbole_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.inter").write_text("user:x:token\titem\nu\ta\n")
    interactions = prepare(tmp_path, path=str(tmp_path / "a.inter"), user_column="user:x")
    assert interactions.users.words == ["u"]
