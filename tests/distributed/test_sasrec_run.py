"""A run of SASRec from raw files to answers, through the command line and through its parts."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from embedtrain.cli import main
from embedtrain.data.bags import Bags
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.recipes.base import BASE, Wanted
from embedtrain.recipes.building import build_parts
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.sasrec.histories import encoded, evaluate_next, next_items
from embedtrain.recipes.sasrec.recipe import _options, prepare, restored
from embedtrain.testing.ranks import run_ranks
from embedtrain.train.run import build_run, check_run_folder

NUM_ITEMS = 12


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Users go through the items in a circle; the files have them in no order of time."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    rows = [
        f"u{user},i{(user + step) % NUM_ITEMS},{1000 * user + step}"
        for user in range(20)
        for step in range(int(generator.integers(3, 15)))
    ]
    Path("events.csv").write_text("\n".join(["user,item,time", *generator.permutation(rows)]) + "\n")
    return tmp_path


def settings(run: str, *more: str) -> list[str]:
    return [
        "data={path: events.csv, time_column: time, cache_path: cache}",
        "table.dim=8",
        "sasrec.max_length=6",
        "train={epochs: 4, global_batch_size: 30}",
        "optimizer.lr=0.3",
        "dense_optimizer.lr=0.01",
        "evaluate={every_epochs: 2, k: [1, 3]}",
        "log={every_steps: 2, tensorboard: false}",
        "checkpoint={every_steps: 3, mode: sync}",
        "run.device=cpu",
        f"run.path={run}",
        *more,
    ]


def ask(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    capfd.readouterr()
    status = main(list(arguments))
    captured = capfd.readouterr()
    assert status == 0, captured.err
    return captured.out


def next_items_of(package: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports the program of a package as another program would."""
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.delitem(sys.modules, "scorer", raising=False)
    spec = importlib.util.spec_from_file_location("next_items", package / "next_items.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "scorer")
    return module


@pytest.mark.slow  # answers are compared with scores of the table below
def test_a_run_answers_from_its_folder_alone(capfd: pytest.CaptureFixture[str]) -> None:
    ask(capfd, "train", "sasrec", *settings("run", "train.epochs=12"))
    assert {path.name for path in Path("run/split").iterdir()} == {"train.tsv", "validation.tsv", "test.tsv"}
    shutil.rmtree("cache")
    shutil.move("events.csv", "new.csv")
    measures = dict(reversed(line.split()) for line in ask(capfd, "evaluate", "run").splitlines())
    assert float(measures["masked_hit@3"]) > 0.5, "the circle is learned"
    assert float(measures["hit@3"]) <= float(measures["masked_hit@3"])
    by_user = ask(capfd, "recommend", "run", "u3", "--top", "3", "--include-known")
    last = max(int(row.split(",")[2]) for row in Path("new.csv").read_text().splitlines() if row.startswith("u3,"))
    # The newest item is held out: it follows what the model knows.
    history = [f"i{(3 + step) % NUM_ITEMS}" for step in range(last - 3000)][-6:]
    assert len(set(history)) == len(history)
    of_history = ask(capfd, "recommend", "run", "--items", ",".join(history), "--top", "3", "--include-known")
    assert by_user.splitlines()[1:] == of_history.splitlines()[1:]
    backwards = ask(capfd, "recommend", "run", "--items", ",".join(history[::-1]), "--top", "3", "--include-known")
    assert backwards.splitlines()[1:] != of_history.splitlines()[1:], "the order counts"
    from_file = ask(capfd, "recommend", "run", "--history", "new.csv", "--top", "3")
    assert len(re.findall(r"^u\d+$", from_file, re.MULTILINE)) == 20
    assert len(ask(capfd, "neighbors", "run", "i4").splitlines()) == NUM_ITEMS - 1
    for arguments, message in (
        (["u3", "nobody"], "unknown user 'nobody'"),
        (["--items", "i3,i99"], "unknown item 'i99'"),
        (["--items", "i3", "--index", "x"], "model=sasrec does not support --index: it predicts"),
        (["--features", "x.csv"], "model=sasrec does not support --features: it predicts"),
    ):
        assert main(["recommend", "run", *arguments]) == 2
        assert message in capfd.readouterr().err


@pytest.mark.slow
def test_a_package_answers_as_the_run(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(capfd, "train", "sasrec", *settings("run"))
    history = ["i3", "i4", "i7", "i3"]
    of_history = ask(capfd, "recommend", "run", "--items", "i7,i3", "--top", "3", "--include-known")
    ask(capfd, "export", "run", "--format", "package", "--output", "package")
    program = next_items_of(folder / "package", monkeypatch)
    found = program.NextItems("package").after([["i7", "i3"], history], k=3, leaves_out_known=False)
    told = [(item, float(score)) for score, item in (line.split() for line in of_history.splitlines()[1:])]
    assert [item for item, _ in found[0]] == [item for item, _ in told]
    assert [score for _, score in found[0]] == pytest.approx([score for _, score in told], abs=1e-3)
    assert not {item for item, _ in program.NextItems("package").after([history])[0]} & set(history)
    assert program.main(["--package", "package", "--items", "i1,nothing"]) == 2
    assert "item 'nothing' is not in the training data" in capfd.readouterr().err


def trained(ranks: object, arguments: list[str], kill_at: int | None) -> dict[str, torch.Tensor]:
    """Trains as the command does, up to a step; returns all that was trained, whole."""
    torch.set_num_threads(1)
    config = load_config(None, ["model=sasrec", *arguments])
    runtime = Runtime(ranks, ranks.rank, torch.device("cpu"))  # type: ignore[arg-type, attr-defined]
    run = build_run(config, runtime, check_run_folder(config), build_parts(config, runtime))

    def strike() -> None:
        if run.trainer.state.step == kill_at:
            raise InterruptedError

    try:
        run.trainer.run(run.sinks, config.log.every_steps, on_step=strike)
    except InterruptedError:
        assert kill_at is not None
    for sink in run.sinks:
        sink.close()
    task = run.trainer._task
    assert task.dense is not None
    tables = {kind: task.tables.gather_table("item", kind) for kind in ("weight", "accumulator")}
    return {**tables, **task.dense.tensors()}


@pytest.mark.parametrize(
    ("loss", "num_ranks"),
    [
        ("full_softmax", 1),
        pytest.param("sampled_softmax", 1, marks=pytest.mark.slow),
        pytest.param("full_softmax", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_last_bit(loss: str, num_ranks: int) -> None:
    def train(run: str, kill_at: int | None) -> dict[str, torch.Tensor]:
        negatives = ["sasrec.negatives=5"] if loss == "sampled_softmax" else []
        arguments = settings(run, f"sasrec.loss={loss}", *negatives)
        if num_ranks == 1:
            return trained(ONE_PROCESS, arguments, kill_at)
        return run_ranks(num_ranks, trained, arguments, kill_at)[0]

    whole = train("whole", None)
    train("killed", 5)
    resumed = train("killed", None)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_run_from_another_learns_from_new_users(folder: Path) -> None:
    arguments = ["model=sasrec", *settings("run")]
    runtime = Runtime(ONE_PROCESS, 0, torch.device("cpu"))
    first, _ = prepare(load_config(None, arguments), runtime)  # type: ignore[arg-type]
    Path("run").mkdir()
    shutil.copy(f"{first.path}/items.tsv", f"run/{BASE}items.tsv")
    header, *rows = Path("events.csv").read_text().splitlines()
    new = [row.replace("u", "new", 1) for row in rows if row.startswith("u1,")]
    Path("events.csv").write_text("\n".join([header, *new, "new1,unknown,0"]) + "\n")
    interactions, sizes = prepare(load_config(None, [*arguments, "start_from=other"]), runtime)  # type: ignore[arg-type]
    assert interactions.users.words == ["new1"]
    assert sizes.num_rows == {"item": len(first.items)}
    assert len(interactions.sequences.values) == len(new) - 2, "two are held out, and the unknown item has no row"


def test_measures_are_the_places_among_all_items() -> None:
    trained(ONE_PROCESS, settings("run"), None)
    config = load_config(None, ["model=sasrec", *settings("run")])
    runtime = Runtime(ONE_PROCESS, 0, torch.device("cpu"))
    checkpoint = str(max(Path("run/checkpoints").iterdir()))
    with restored(config, runtime, checkpoint) as (model, interactions, _):
        histories, held_out = interactions.sequences, interactions.validation
        found = evaluate_next(model, histories, held_out, [3], alive=lambda: None)
        users = np.flatnonzero(np.diff(held_out.starts))
        scores = encoded(model, histories, users) @ model.tables.gather_table("item").T
        targets = held_out.of(users)[0]
        for begin in ("", "masked_"):
            places = []
            for row, user, target in zip(scores, users, targets, strict=True):
                others = set(histories.of(np.array([user]))[0].tolist()) - {int(target)} if begin else set()
                better = [item for item in range(NUM_ITEMS) if row[item] > row[target] and item not in others]
                places.append(len(better))
            hits = np.array(places) < 3
            assert found[f"{begin}hit@3"] == pytest.approx(hits.mean())
            assert found[f"{begin}ndcg@3"] == pytest.approx((hits / np.log2(np.array(places) + 2)).mean())
        wanted = Wanted(None, 3, leaves_out_known=True, items=["i3", "i4"])
        ((name, best, _),) = next(next_items(model, interactions, _options(config), wanted))
        given = interactions.items.rows_of(["i3", "i4"])
        (own,) = encoded(model, Bags(np.array([0, 2]), given), np.array([0])) @ model.tables.gather_table("item").T
        own[given] = -torch.inf
        assert (name, best) == ("i3,i4", [interactions.items.words[item] for item in own.topk(3).indices])
        nobody = Bags(np.zeros_like(histories.starts), histories.values[:0])
        assert evaluate_next(model, nobody, held_out, [3], alive=lambda: None)["hit@3"] == 0, "nothing to go by"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sasrec.heads=3", "sasrec.heads=3 must divide table.dim=8"),
        ("sasrec.dropout=1.0", "sasrec.dropout must be at least 0 and below 1, got 1.0"),
        ("sasrec.max_length=31", "train.global_batch_size=30 must be at least sasrec.max_length=31"),
        ("data.split=ratio", "data.split=ratio draws items at random, but model=sasrec predicts the next item"),
        ("evaluate.path=x.csv", "evaluate.path=x.csv gives the test part, but data.split=leave_one_out"),
        ("data.min_item_count=21", "nothing is left of 179 interactions with data.min_item_count=21"),
        ("data.held_out_events=7", "no user has two items or more to train on"),
        ("data.path=-", "data.path=- cannot be used: "),
    ],
)
def test_what_cannot_be_trained_is_refused(setting: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sasrec", *settings("run", setting)]) == 2
    assert message in capfd.readouterr().err
