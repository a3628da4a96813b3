"""Raw ids become rows once, and what was given is kept: pairs, held-out pairs, features."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from embedtrain.data import sources
from embedtrain.data.baskets import write_baskets
from embedtrain.data.interactions import InteractionOptions, Interactions, prepare_interactions
from embedtrain.data.side_features import SideOptions
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import UserError

TRAIN = "u1 a b c\nu2 b\nu3 b c\nu2 b\n"


def prepare(tmp_path: Path, train: str = TRAIN, **options: object) -> Interactions:
    (tmp_path / "train.txt").write_text(train)
    options = {"path": str(tmp_path / "train.txt"), **options}
    return prepare_interactions(InteractionOptions(**options), str(tmp_path / "cache"), ONE_PROCESS)


def test_rows_go_by_the_number_of_interactions(tmp_path: Path) -> None:
    interactions = prepare(tmp_path)
    assert interactions.users.words == ["u1", "u2", "u3"]
    assert interactions.items.words == ["b", "c", "a"]
    assert interactions.items.counts.tolist() == [3, 2, 1]
    assert interactions.num_interactions == 6
    assert interactions.left_out["repeated_interactions"] == 1
    values, lengths = interactions.known.of(np.array([2, 0]))
    assert values.tolist() == [0, 1, 0, 1, 2]
    assert lengths.tolist() == [2, 3]


def test_the_busiest_ids_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prepare(tmp_path)
    assert "read 7 interactions: 3 ids of user (u1 has the most: 3), 3 ids of item (b has the most: 4)" in caplog.text


def test_held_out_items_of_no_row_are_missed_and_users_of_none_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("u3 a a new other\nnobody b\n")
    interactions = prepare(tmp_path, held_out_path=str(tmp_path / "test.txt"))
    values, lengths = interactions.held_out.of(np.arange(3))
    assert lengths.tolist() == [0, 0, 3]
    assert sorted(values.tolist()) == [-1, -1, 2]
    assert interactions.left_out["held_out_interactions_of_unknown_users"] == 1
    assert interactions.left_out["held_out_interactions_with_unknown_items"] == 2


def test_features_are_bags_of_categories(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("name,genre,maker\na,x|y,m\nunknown,z,m\nb,y,\n")
    options = SideOptions(path=str(tmp_path / "items.csv"), id_column="name", separators={"genre": "|", "maker": None})
    interactions = prepare(tmp_path, items=options)
    (genres, num_genres), (makers, num_makers) = interactions.features("items").values()
    assert (num_genres, num_makers) == (3, 1)
    assert genres.lengths(np.arange(3)).tolist() == [1, 0, 2]  # b, c, a
    y = genres.of(np.array([0]))[0][0]
    assert y in genres.of(np.array([2]))[0]
    assert makers.lengths(np.arange(3)).tolist() == [0, 0, 1]
    assert interactions.left_out["items_without_features"] == 1
    assert interactions.features("users") == {}


def test_the_cache_is_used_until_a_file_changes(tmp_path: Path) -> None:
    first = prepare(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in Path(first.path).iterdir()}
    same = prepare_interactions(
        InteractionOptions(path=str(tmp_path / "train.txt")), str(tmp_path / "cache"), ONE_PROCESS
    )
    assert {path: path.stat().st_mtime_ns for path in Path(same.path).iterdir()} == before
    changed = prepare(tmp_path, TRAIN + "u9 z\n")
    assert changed.path != first.path
    assert changed.fingerprint != first.fingerprint
    moved = tmp_path / "moved.txt"
    moved.write_text(TRAIN)
    assert prepare(tmp_path, path=str(moved)).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("train", "part"),
    [("", "there are no interactions"), ("u1\nu2\n", "there are no interactions")],
)
def test_nothing_to_train_on_is_one_clear_line(tmp_path: Path, train: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        prepare(tmp_path, train)


def test_a_row_without_an_id_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item\n1,2\n,4\n")
    with pytest.raises(UserError, match=r"a\.csv:3: column 'user' holds no id"):
        prepare(tmp_path, path=str(tmp_path / "a.csv"))


@pytest.mark.parametrize("side", ["users", "items"])
def test_features_without_rows_are_refused(tmp_path: Path, side: str) -> None:
    (tmp_path / "a.csv").write_text("id,age\n")
    options = SideOptions(path=str(tmp_path / "a.csv"), separators={"age": None})
    with pytest.raises(UserError, match=rf"a\.csv: there are no rows: .* leave out {side}\.path"):
        prepare(tmp_path, **{side: options})


def test_a_feature_of_which_no_value_is_given_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,age,tags\nu1,,\n")
    options = SideOptions(path=str(tmp_path / "a.csv"), separators={"age": None, "tags": "|"})
    with pytest.raises(UserError, match=r"a\.csv: no row has a value in column 'age': leave out users\.features\.age"):
        prepare(tmp_path, users=options)


def test_without_a_separator_a_line_break_belongs_to_the_category(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,genre\na,"one\nline"\nb,"one\nline"\nc,one\n')
    options = SideOptions(path=str(tmp_path / "a.csv"), separators={"genre": None})
    ((genres, number),) = prepare(tmp_path, items=options).features("items").values()
    assert number == 2
    assert genres.lengths(np.arange(3)).tolist() == [1, 1, 1]


def test_a_path_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[object] = []
    find = sources._find

    def count(path: str, suffixes: tuple[str, ...]) -> object:
        listed.append(path)
        return find(path, suffixes)

    monkeypatch.setattr(sources, "_find", count)
    prepare(tmp_path)
    assert listed == [str(tmp_path / "train.txt")]
    write_baskets(str(tmp_path / "train.txt"), ("user", "item"), str(tmp_path / "cache"), ONE_PROCESS, format="lines")
    assert listed == [str(tmp_path / "train.txt")] * 2


def test_an_id_with_two_rows_of_features_is_refused(tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text("id,age\nu1,3\nu1,4\n")
    options = SideOptions(path=str(tmp_path / "users.csv"), separators={"age": None})
    with pytest.raises(UserError, match="the id 'u1' of users has 2 rows"):
        prepare(tmp_path, users=options)
