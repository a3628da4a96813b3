"""Weights & Biases and MLflow get the numbers of a run, and never stop it."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from embedtrain import cli
from embedtrain.metrics.sinks import MetricSink, RunEnd
from embedtrain.metrics.trackers import MlflowSink, WandbSink
from embedtrain.train.run_folder import RunFolder

SETTINGS = {"optimizer": {"lr": 0.5, "max_norm": None}, "train": {"epochs": 2}}


def log(sink: MetricSink, *steps: int, end: RunEnd = "finished") -> None:
    for step in steps:
        sink.log({"step": step, "loss": 1.0 / step, "recall@20": 0.5, "phase": "train"})
    sink.flush()
    sink.close(end)


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[Any] = []
        self.ends: list[object] = []

    def log(self, values: dict[str, float], step: int) -> None:
        if step == 13:
            raise OSError("the server is\naway")
        self.logged.append((step, values))

    def mark_preempting(self) -> None:
        self.ends.append("preempting")

    def finish(self, exit_code: int) -> None:
        self.ends.append(exit_code)


def test_a_tracker_that_fails_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs: dict[str, FakeRun] = {}
    fake = ModuleType("wandb")
    fake.Settings = SimpleNamespace  # type: ignore[attr-defined]
    fake.init = lambda **given: runs.setdefault(given["id"], FakeRun())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WandbSink("words", "/runs/x", "x1", SETTINGS)
    log(sink, 1, 13, 2)
    assert caplog.messages == ["Weights & Biases gets no more records of this run: OSError: the server is away"]
    (run,) = runs.values()
    assert run.logged == [(1, {"loss": 1.0, "recall@20": 0.5})] and run.ends == [1]
    # A run that is resumed is the same run, and another one in a folder of the same path is not.
    log(WandbSink("words", "/runs/x", "x1", SETTINGS), 2, end="preempted")
    log(WandbSink("words", "/runs/x", "x1", SETTINGS), 3)
    assert [step for step, _ in run.logged] == [1, 2, 3] and len(runs) == 1
    assert run.ends == [1, "preempting", 1, 0]
    log(WandbSink("words", "/runs/x", "x2", SETTINGS), 1, end="failed")
    assert runs["x2"].ends == [1]

    def refuse(**_: object) -> None:
        raise RuntimeError("No API key configured.")

    fake.init = refuse  # type: ignore[attr-defined]
    log(WandbSink("words", "/runs/y", "y1", SETTINGS), 1)
    assert caplog.messages[1:] == [
        "Weights & Biases gets no more records of this run: RuntimeError: No API key configured."
    ]


class FakeMlflow:
    """Stands for a server of MLflow and for its client."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, SimpleNamespace] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tracking, entities = ModuleType("mlflow.tracking"), ModuleType("mlflow.entities")
        tracking.MlflowClient = lambda: self  # type: ignore[attr-defined]
        entities.Metric = lambda *values: values  # type: ignore[attr-defined]
        entities.Param = lambda *values: values  # type: ignore[attr-defined]
        for module in (ModuleType("mlflow"), tracking, entities):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return self.experiments.get(name)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = SimpleNamespace(experiment_id=f"of {name}")
        return f"of {name}"

    def search_runs(self, experiments: list[str], asked: str, max_results: int) -> list[SimpleNamespace]:
        key, value = asked.removeprefix("tags.").split(" = ")
        found = [
            SimpleNamespace(info=SimpleNamespace(run_id=run_id))
            for run_id, run in self.runs.items()
            if run["experiment"] in experiments and run["tags"].get(key.strip("`")) == value.strip("'")
        ]
        return found[:max_results]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> SimpleNamespace:
        run_id = str(len(self.runs))
        self.runs[run_id] = dict(experiment=experiment, name=run_name, tags=tags, states=[], metrics=[], params=[])
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id]["states"].append(status)

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id]["states"].append(status)

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        if any(step == 13 for *_, step in metrics):
            raise OSError("the server is away")
        self.runs[run_id]["metrics"] += [(name, value, step) for name, value, _, step in metrics]
        self.runs[run_id]["params"] += params


def test_mlflow_gets_numbers_settings_and_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeMlflow()
    fake.install(monkeypatch)
    log(MlflowSink("words", "/runs/x", "x1", SETTINGS), 1, end="preempted")
    log(MlflowSink("words", "/runs/x", "x1", SETTINGS), 2)
    log(MlflowSink("words", "/runs/x", "x2", SETTINGS), 1, 13, 2, end="finished")
    log(MlflowSink("words", "/runs/x", "x3", SETTINGS), end="failed")
    assert [run["states"] for run in fake.runs.values()] == [["KILLED", "RUNNING", "FINISHED"], ["FAILED"], ["FAILED"]]
    first, second, _ = fake.runs.values()
    assert first["name"] == "x" and first["params"] == [("optimizer.lr", "0.5"), ("train.epochs", "2")]
    assert first["metrics"] == [
        (name, value, step) for step in (1, 2) for name, value in (("loss", 1 / step), ("recall_at_20", 0.5))
    ]
    assert len(second["metrics"]) == 2
    assert caplog.messages == ["MLflow gets no more records of this run: OSError: the server is away"]


def test_a_folder_that_is_begun_anew_is_another_run(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    begun = RunFolder(path).run_id(is_new=True)
    assert len(begun) == 16 and RunFolder(path).run_id(is_new=False) == begun
    RunFolder(path).require_writable_names()
    again = RunFolder(path).run_id(is_new=True)
    assert again != begun and RunFolder(path).run_id(is_new=False) == again
    shutil.rmtree(path)
    # A run that began without trackers gets an id when it is resumed with one.
    late = RunFolder(path).run_id(is_new=False)
    assert late not in (begun, again) and RunFolder(path).run_id(is_new=False) == late


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    (tmp_path / "corpus.txt").write_text("a b a b")
    settings = [f"data.path={tmp_path}/corpus.txt", f"run.path={tmp_path}/run", f"log.{name}=words"]
    assert cli.main(["train", "word2vec", *settings]) == 2
    assert f"log.{name} needs the package {name}: pip install 'embedtrain[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def stored(content: bytes) -> Iterator[bytes]:
    """Yields the records of a file of Weights & Biases, which is a log as LevelDB writes it after seven bytes."""
    at, held = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        held += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its end
            yield held
            held = b""


@pytest.mark.slow
def test_weights_and_biases_has_a_resumed_run_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'embedtrain[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    log(WandbSink("words", "/runs/x", "x1", SETTINGS), 1, 2)
    log(WandbSink("words", "/runs/x", "x1", SETTINGS), 3)
    wandb.teardown()
    found: dict[int, dict[str, Any]] = {}
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1, "one run"
    for path in files:
        for data in stored(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if items:
                found[items["_step"]] = {name: items[name] for name in ("loss", "recall@20")}
    assert found == {step: {"loss": 1.0 / step, "recall@20": 0.5} for step in (1, 2, 3)}


@pytest.mark.slow
def test_mlflow_has_a_resumed_run_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'embedtrain[mlflow]'")
    from mlflow.tracking import MlflowClient

    # Its newest versions want a data base, which takes more packages.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    log(MlflowSink("words", "/runs/it's", "i1", SETTINGS), 1, 2)
    log(MlflowSink("words", "/runs/it's", "i1", SETTINGS), 3)
    log(MlflowSink("words", "/runs/other", "o1", SETTINGS), 1)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("words")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    run = runs["it's"]
    assert len(runs) == 2 and run.info.status == "FINISHED"
    assert run.data.params == {"optimizer.lr": "0.5", "train.epochs": "2"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.data.metrics["recall_at_20"] == 0.5
