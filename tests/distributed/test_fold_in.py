"""Users who were not in the training: recommended to and measured, folded in from their items."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from embedtrain.cli import main
from embedtrain.data.bags import Bags
from embedtrain.data.histories import Histories, split_histories
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.errors import UserError
from embedtrain.recipes.retrieval.folding import FoldIn
from embedtrain.recipes.retrieval.model import ITEM, USER, Normalize, Retrieval, Scoring, Side
from embedtrain.testing.threads import run_threads

NUM_GROUPS, GROUP_ITEMS = 4, 6


def items_of(user: int, count: int) -> list[str]:
    """Items of the user's group, which no other group has."""
    chosen = np.random.default_rng(user).permutation(GROUP_ITEMS)[:count]
    return [f"i{user % NUM_GROUPS}{item}" for item in chosen]


def lines(users: range, count: int = 4) -> str:
    return "".join(f"u{user} {' '.join(items_of(user, count))}\n" for user in users)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fold")
    every = " ".join(f"i{group}{item}" for group in range(NUM_GROUPS) for item in range(GROUP_ITEMS))
    (folder / "train.txt").write_text(f"{lines(range(60))}all {every}\n")
    (folder / "new.txt").write_text(lines(range(100, 120), 5))
    (folder / "odd.txt").write_text("n1 i00 i01 nobodys\nn2 nobodys\n")
    (folder / "unknown.txt").write_text("n2 nobodys\n")
    (folder / "run.yaml").write_text("model: retrieval\n")
    settings = [
        f"data={{path: {folder}/train.txt, cache_path: {folder}/cache}}",
        "table.dim=8",
        "log.tensorboard=false",
    ]
    settings += ["train={epochs: 15, global_batch_size: 16}", "retrieval.negatives=8", f"run.path={folder}/run"]
    assert main(["train", str(folder / "run.yaml"), *settings]) == 0
    yield folder


def printed(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capfd.readouterr()
    assert main(list(arguments)) == 0
    return capfd.readouterr().out.splitlines()


def test_a_new_user_gets_what_goes_with_their_items(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    user, *found = printed(capfd, "recommend", f"{run}/run", "--items", "i10,i12,i13", "--top", "3")
    assert user == "i10,i12,i13"
    assert {line.split()[1] for line in found} == {"i11", "i14", "i15"}, "theirs are left out"
    known = printed(capfd, "recommend", f"{run}/run", "--items", "i10,i12,i13", "--top", "6", "--include-known")
    assert {line.split()[1] for line in known[1:]} == {f"i1{item}" for item in range(6)}


def test_users_of_a_file_are_answered_in_its_order(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = printed(capfd, "recommend", f"{run}/run", "--history", f"{run}/new.txt", "--top", "1")
    assert found[::2] == [f"u{user}" for user in range(100, 120)]
    for user, line in zip(range(100, 120), found[1::2], strict=True):
        (left,) = {f"i{user % NUM_GROUPS}{item}" for item in range(GROUP_ITEMS)} - set(items_of(user, 5))
        assert line.split()[1] == left
    assert printed(capfd, "recommend", f"{run}/run", "--history", f"{run}/odd.txt", "--top", "1")[0] == "n1"


def test_users_of_the_training_keep_their_vector_and_get_nothing_they_have(
    run: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # Items that nobody has and that are listed twice are one each; u1 and u2 are of the training, u2 with an item more.
    (left,) = set(items_of(2, 5)) - set(items_of(2, 4))
    (run / "mixed.txt").write_text(f"n1 i00 i01 nobodys nobodys\nu1 nobodys\nn2 others\nu2 {left}\n")
    found = printed(capfd, "recommend", f"{run}/run", "--history", f"{run}/mixed.txt", "--top", "2")
    assert found[::3] == ["n1", "u1", "u2"]
    alone = printed(capfd, "recommend", f"{run}/run", "u1", "u2", "--top", "3")
    assert found[4:6] == alone[1:3]
    assert found[7:9] == [line for line in alone[5:8] if line.split()[1] != left][:2]
    assert "mixed.txt: 3 interactions left out, with items not in the training data" in caplog.text
    assert "mixed.txt: 1 user left out, without an item of the training data" in caplog.text
    assert "mixed.txt: 2 users of the training data: their trained vectors are taken" in caplog.text


def test_a_user_who_has_every_item_is_told_so(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = printed(capfd, "recommend", f"{run}/run", "all")
    assert said == [
        "all",
        "  no items: the user already has every item (--include-known shows them)",
    ]


def test_strong_generalisation_is_measured(
    run: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="embedtrain")
    (run / "both.txt").write_text(lines(range(100, 120), 5) + lines(range(3)) + "single i00\n")
    found = printed(
        capfd, "evaluate", f"{run}/run", "--data", f"{run}/both.txt", "--fold-in", "0.8", "--step", "newest"
    )
    measures = {name: float(value) for value, name in map(str.split, found)}
    # One of five items is to find; the user's group has two that they are not known by.
    assert measures["recall@20"] == 1.0
    assert measures["mrr@20"] >= 0.5
    assert "both.txt: 20 users folded in, 4 left out" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["recommend", "RUN", "--items", "i00,x9"],
            "unknown item 'x9': it is not among the 24 items of the training",
        ),
        (
            ["recommend", "nowhere", "--items", "i00,,i01"],
            "--items i00,,i01: expected names, separated by commas",
        ),
        (["recommend", "RUN", "--history", "unknown.txt"], "none of its items is among the 24 items of the training"),
        (["recommend", "RUN", "u1", "--items", "i00"], "or one of --items, --history, --features, got --items and u1"),
        (
            ["recommend", "RUN", "--features", "x.csv"],
            "the users of this run have no features: give --items or --history",
        ),
        (["recommend", "RUN"], "expected the ids of users, --items IDS, --history FILE, or --all with --output FILE"),
        (["evaluate", "RUN", "--fold-in", "0.5"], "--fold-in measures a retrieval run on the new users of other data"),
        (["evaluate", "RUN", "--data", "train.txt", "--fold-in", "0.5"], "no user can be folded in"),
        *(
            (
                ["evaluate", "RUN", "--data", "train.txt", "--fold-in", share],
                f"--fold-in must be more than 0 and less than 1, got {share}",
            )
            for share in ("0", "1", "nan", "inf")
        ),
        (["evaluate", "RUN", "--data", "empty.txt"], "empty.txt: there are no interactions"),
        (["evaluate", "RUN", "--data", "empty.txt", "--fold-in", "0.5"], "empty.txt: there are no interactions"),
        (
            ["recommend", "RUN", "--history", "given.parquet", "--output", "./given.parquet", "--overwrite"],
            "--output ./given.parquet is one of the input files of --history: give another name",
        ),
        (["recommend", "RUN", "--items", ","], "--items ,: expected at least one item"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    arguments: list[str], told: str, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    (run / "empty.txt").write_text("")
    (run / "given.parquet").write_text("")
    capfd.readouterr()
    assert main([each.replace("RUN", "run") for each in arguments]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("embedtrain: error")]
    assert told in line


def folded(ranks: Ranks, normalize: Normalize) -> torch.Tensor:
    known = Bags.from_rows(np.repeat(np.arange(30), 3), np.random.default_rng(1).integers(0, 20, 90), 30)
    model = Retrieval(Side(30), Side(20, hidden=[4]), 4, Scoring(normalize=normalize), ranks=ranks, seed=3)
    new = Bags.from_rows(np.repeat(np.arange(5), 2), np.arange(10), 5)
    return FoldIn(model, known).vectors(np.arange(5), new)


@pytest.mark.parametrize("normalize", ["none", "users", "items", "both"])
def test_the_vectors_are_the_same_on_any_number_of_ranks(normalize: Normalize) -> None:
    expected = folded(ONE_PROCESS, normalize)
    assert expected.isfinite().all()
    if normalize in ("users", "both"):
        torch.testing.assert_close(expected.norm(dim=1), torch.ones(5))
    for size in (2, 3, 8):
        for found in run_threads(size, folded, normalize):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_map_that_exists_is_found_and_users_fewer_than_dims_get_a_multiple_of_the_sum() -> None:
    model = Retrieval(Side(200), Side(50), 6, Scoring(normalize="none"), seed=1)
    generator = np.random.default_rng(0)
    known = Bags.from_rows(np.repeat(np.arange(200), 4), generator.integers(0, 50, 800), 200)
    items = model.encode({ITEM: torch.arange(50)})[ITEM].detach()
    sums = items[torch.from_numpy(known.values)].view(200, 4, 6).sum(dim=1) / 2
    matrix = torch.from_numpy(generator.normal(size=(6, 6))).float()
    model.tables.shards[USER].weight[model.tables.shards[USER].layout.slot_of(torch.arange(200))] = sums @ matrix
    new = Bags.from_rows(np.repeat(np.arange(9), 9), generator.integers(0, 50, 81), 9)
    wanted = items[torch.from_numpy(new.values)].view(9, 9, 6).sum(dim=1) / 3 @ matrix
    found = FoldIn(model, known).vectors(np.arange(9), new)
    assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.999
    one = Bags(known.starts.clip(max=4), known.values[:4])
    alone = FoldIn(model, one).vectors(np.arange(9), new)
    assert alone.isfinite().all()


def test_each_new_user_is_split_once_and_the_same_way() -> None:
    found = Histories(["a", "seen", "b", "c"], Bags.from_rows(np.repeat([0, 1, 2, 3], [10, 5, 2, 1]), np.arange(18), 4))
    users = Vocabulary(["seen"], np.array([1]))
    known, wanted = split_histories(found, 0.8, users, seed=7, where="x")
    assert known.lengths(np.arange(2)).tolist() == [8, 1]
    assert wanted.lengths(np.arange(2)).tolist() == [2, 1]
    for user, items in enumerate(([*range(10)], [15, 16])):
        both = [*known.of(np.array([user]))[0], *wanted.of(np.array([user]))[0]]
        assert sorted(both) == items
        assert known.of(np.array([user]))[0].tolist() == sorted(known.of(np.array([user]))[0])
    again, _ = split_histories(found, 0.8, users, seed=7, where="x")
    assert again.fingerprint == known.fingerprint
    with pytest.raises(UserError, match=re.escape("x: no user can be folded in")):
        split_histories(found, 0.8, Vocabulary(["a", "seen", "b", "c"], np.ones(4, np.int64)), seed=7, where="x")


def test_users_are_answered_from_their_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text(lines(range(60)))
    Path("users.csv").write_text("id,team,note\n" + "".join(f"u{u},t{u % NUM_GROUPS},x\n" for u in range(60)))
    Path("new.csv").write_text("note,team,id\nx,t2,first\nx,t0|nobodys,second\nx,,third\n")
    Path("run.yaml").write_text("model: retrieval\nusers: {path: users.csv, features: {team: {separator: '|'}}}\n")
    settings = ["data={path: train.txt, cache_path: cache}", "table.dim=8", "log.tensorboard=false", "run.path=run"]
    assert main(["train", "run.yaml", *settings, "train={epochs: 15, global_batch_size: 16}"]) == 0
    found = printed(capfd, "recommend", "run", "--features", "new.csv", "--top", "3")
    assert found[::4] == ["first", "second", "third"]
    assert all(line.split()[1].startswith("i2") for line in found[1:4])
    assert all(line.split()[1].startswith("i0") for line in found[5:8])
