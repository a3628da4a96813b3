"""A run measures itself on its validation part while it is trained, and `evaluate` measures it on the test part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedtrain.cli import main
from embedtrain.data.bags import Bags
from embedtrain.data.interactions import Interactions
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.retrieval import recipe
from embedtrain.recipes.retrieval.config import RetrievalConfig
from embedtrain.recipes.retrieval.model import Retrieval

PATIENCE = 2
CPU = torch.device("cpu")
TRAIN = [
    "train",
    "retrieval",
    "data.path=events.csv",
    "data.cache_path=cache",
    "data.split=leave_one_out",
    "data.validation=auto",
    "data.time_column=time",
    "table.dim=4",
    f"train={{epochs: 30, global_batch_size: 8, early_stop: {{patience: {PATIENCE}}}}}",
    "checkpoint={best_metric: 'ndcg@3', every_steps: 1000}",
    "evaluate.k=[3]",
    "log={tensorboard: false, rows_every_steps: null}",
    "run.path=run",
]


def parts_of_run() -> dict[str, dict[str, list[str]]]:
    """Returns the items of each user by part, from the files for other programs."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in ("train", "validation", "test"):
        rows = [line.split("\t") for line in Path(f"run/split/{name}.tsv").read_text().splitlines()]
        assert rows[0] == ["user", "item", "time"]
        found[name] = {}
        for user, item, _ in rows[1:]:
            found[name].setdefault(user, []).append(item)
    return found


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    events = [(f"u{user}", item, time) for user in range(12) for time, item in enumerate(generator.permutation(9)[:6])]
    # The last event of u0 repeats an earlier one, and so does the validation event of u1.
    events = [(u, events[0][1] if (u, t) == ("u0", 5) else i, t) for u, i, t in events]
    events = [(u, events[6][1] if (u, t) == ("u1", 4) else i, t) for u, i, t in events]
    rows = [f"{user},i{item},{time}" for user, item, time in events]
    Path("events.csv").write_text("\n".join(["user,item,time", *rows]) + "\n")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Bags, Bags]]:
    """Records what is left out of the lists, and what is to be found, whenever a model is measured."""
    asked: list[tuple[Bags, Bags]] = []
    measure = recipe.evaluate_retrieval

    def record(
        model: Retrieval, known: Bags, held_out: Bags, ks: Sequence[int], alive: Callable[[], None]
    ) -> dict[str, float]:
        asked.append((known, held_out))
        return measure(model, known, held_out, ks, alive)

    monkeypatch.setattr(recipe, "evaluate_retrieval", record)
    return asked


def test_training_measures_the_validation_part_and_the_report_the_test_part(
    asked: list[tuple[Bags, Bags]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, runtime = load_config(None, ["model=retrieval", *TRAIN[2:]]), Runtime(ONE_PROCESS, 0, CPU)
    assert isinstance(config, RetrievalConfig)
    interactions, _ = recipe.prepare(config, runtime)
    model = recipe._build_model(config, runtime, interactions)
    evaluation = recipe.build(config, runtime, interactions).task.evaluation
    assert evaluation is not None
    evaluation.measure(lambda: None)
    events: dict[str, list[str]] = {}
    for line in Path("events.csv").read_text().splitlines()[1:]:
        user, item, _ = line.split(",")
        events.setdefault(user, []).append(item)
    ((known, held_out),) = asked
    words = interactions.items.words
    for row, user in enumerate(interactions.users.words):
        *trained, validation, _ = events[user]
        assert {words[item] for item in known.of(np.array([row]))[0]} == set(trained)
        found = [words[item] if item >= 0 else None for item in held_out.of(np.array([row]))[0]]
        assert found == ([] if user == "u1" else [validation if validation in words else None])

    @contextmanager
    def restored(*_: object) -> Iterator[tuple[Retrieval, Interactions, int]]:
        yield model, interactions, 0

    monkeypatch.setattr(recipe, "restored", restored)
    (section,) = recipe.report(config, runtime, "")
    assert "All 11 users with held-out items" in str(section)  # the last event of u0 is a repetition


@pytest.mark.slow
def test_training_looks_at_the_validation_part_and_evaluate_at_the_test_part(
    asked: list[tuple[Bags, Bags]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(TRAIN) == 0
    users, items = (
        [line.split("\t")[0] for line in Path(f"run/{name}.tsv").read_text().splitlines()]
        for name in ("users", "items")
    )

    def named(bags: Bags) -> dict[str, set[str]]:
        return {user: {items[item] for item in bags.of(np.array([row]))[0]} for row, user in enumerate(users)}

    parts: dict[str, Any] = {
        name: {user: set(found.get(user, [])) for user in users} for name, found in parts_of_run().items()
    }
    repeated = {"test": "u0", "validation": "u1"}
    for known, held_out in asked:
        assert named(known) == parts["train"]
        assert named(held_out) == {**parts["validation"], repeated["validation"]: set()}
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    measured = [record["ndcg@3"] for record in records if "ndcg@3" in record]
    assert len(measured) == len(asked)
    assert measured.index(max(measured)) == len(measured) - 1 - PATIENCE  # early stopping went by these
    asked.clear()
    assert main(["evaluate", "run"]) == 0
    ((known, held_out),) = asked
    assert named(known) == {user: parts["train"][user] | parts["validation"][user] for user in users}
    assert named(held_out) == {**parts["test"], repeated["test"]: set()}
    answers = []
    for more in ([], ["--include-known"]):
        capfd.readouterr()
        assert main(["recommend", "run", "u3", "--top", "9", *more]) == 0
        words = capfd.readouterr().out.split()
        answers.append({item for item in items if item in words})
    before = parts["train"]["u3"] | parts["validation"]["u3"]
    assert answers == [set(items) - before, set(items)]


@pytest.mark.parametrize(
    ("settings", "is_warned"),
    [
        ([], False),
        (["data.validation=none"], True),
        (["data.validation=none", "train.early_stop.patience=null"], False),
    ],
)
def test_who_chooses_by_the_test_part_is_warned(
    settings: list[str], is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config, runtime = load_config(None, ["model=retrieval", *TRAIN[2:], *settings]), Runtime(ONE_PROCESS, 0, CPU)
    assert isinstance(config, RetrievalConfig)
    recipe.prepare(config, runtime)
    assert ("choose by the test part" in caplog.text) == is_warned


@pytest.mark.slow
def test_a_run_without_a_test_part_is_not_evaluated(capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["data.split=none", "data.validation=leave_one_out", "train={epochs: 1, early_stop: {patience: null}}"]
    assert main([*TRAIN, *settings]) == 0
    assert not Path("run/split/test.tsv").exists()
    capfd.readouterr()
    assert main(["evaluate", "run"]) == 2
    assert "was trained without evaluate.path: there are no held-out data to measure on" in capfd.readouterr().err
