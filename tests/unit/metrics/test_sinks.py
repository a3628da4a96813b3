from __future__ import annotations

import io
import json
import math
import re
import resource
import signal
from pathlib import Path

import fsspec
import pytest

from embedtrain.errors import UserError
from embedtrain.metrics import ConsoleSink, JsonlSink, MetricSink, TensorBoardSink
from embedtrain.metrics import sinks as sinks_module
from embedtrain.metrics.sinks import board_tag


@pytest.fixture
def clock(monkeypatch):
    """A list whose only element is the time that the sinks see."""
    now = [1000.0]
    monkeypatch.setattr(sinks_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(params=["local", "memory"])
def jsonl_path(request, tmp_path):
    """A path in a folder that does not exist yet."""
    if request.param == "local":
        yield str(tmp_path / "run" / "metrics.jsonl")
        return
    yield "memory://sinks-test/run/metrics.jsonl"
    memory = fsspec.filesystem("memory")
    if memory.exists("/sinks-test"):
        memory.rm("/sinks-test", recursive=True)


def content(path: str) -> str:
    with fsspec.open(path, "r") as file:
        return file.read()


def steps(path: str) -> list[int]:
    return [json.loads(line)["step"] for line in content(path).splitlines()]


def test_jsonl_appends_one_object_a_line(jsonl_path):
    sink: MetricSink = JsonlSink(jsonl_path)
    sink.log({"step": 1, "loss": 0.5, "phase": "train"})
    sink.log({"step": 2, "loss": math.nan})
    sink.close()
    again = JsonlSink(jsonl_path)
    again.log({"step": 3})
    again.close()
    records = [json.loads(line) for line in content(jsonl_path).splitlines()]
    assert records == [{"step": 1, "loss": 0.5, "phase": "train"}, {"step": 2, "loss": None}, {"step": 3}]


def test_a_local_line_is_there_at_once(tmp_path):
    sink = JsonlSink(str(tmp_path / "metrics.jsonl"))
    sink.log({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_remote_lines_are_written_every_30_seconds_and_on_flush(clock):
    path = "memory://sinks-test/metrics.jsonl"
    sink = JsonlSink(path)
    sink.log({"step": 1})
    assert not fsspec.filesystem("memory").exists(path)
    clock[0] += 31
    sink.log({"step": 2})
    assert steps(path) == [1, 2]
    sink.log({"step": 3})
    assert steps(path) == [1, 2]
    sink.flush()
    assert steps(path) == [1, 2, 3]
    fsspec.filesystem("memory").rm("/sinks-test", recursive=True)


def test_lines_that_cannot_be_written_are_kept_for_the_next_time(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(str(path))
    sink.log({"step": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limit[1]))
    sink.log({"step": 2})
    assert path.read_text() == '{"step": 1}\n'
    assert "cannot write metrics; 1 record kept for the next attempt: [Errno 27]" in caplog.text
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    sink.log({"step": 3})
    assert steps(str(path)) == [1, 2, 3]


def test_truncate_after_drops_later_steps_and_a_half_written_line(jsonl_path):
    lines = ['{"step": 5}\n', '{"note": "no step"}\n', '{"step": 10}\n']
    lines += ['{"step": 15}\n', "garbage\n", '{"step": 1']
    file_system, path = fsspec.core.url_to_fs(jsonl_path)
    file_system.makedirs(file_system._parent(path))
    file_system.pipe_file(path, "".join(lines).encode())
    sink = JsonlSink(jsonl_path)
    sink.truncate_after(10)
    assert content(jsonl_path) == "".join(lines[:3])
    sink.log({"step": 11})
    sink.close()
    assert content(jsonl_path) == "".join([*lines[:3], '{"step": 11}\n'])
    assert file_system.ls(file_system._parent(path), detail=False) == [path]


def test_truncate_after_without_a_file(jsonl_path):
    sink = JsonlSink(jsonl_path)
    sink.truncate_after(0)
    sink.log({"step": 1})
    sink.close()
    assert steps(jsonl_path) == [1]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    sink: MetricSink = TensorBoardSink(str(tmp_path))
    for step in (1, 2, 3):
        sink.log({"step": step, "loss": 1.0 / step, "phase": "train"})
    sink.close()
    resumed = TensorBoardSink(str(tmp_path), purge_step=3)
    resumed.log({"step": 3, "loss": 9.0})
    resumed.close()
    assert scalars(tmp_path) == {"Loss/loss": [(1, 1.0), (2, 0.5), (3, 9.0)]}


def test_losses_and_measures_are_the_first_groups_of_tensorboard():
    record = {"step": 1, "epoch": 0.5, "words": 3, "words_per_second": 2.0, "learning_rate/a": 1.0, "stage/x": 1.0}
    measures = {"loss": 1.0, "valid_log_loss": 1.0, "recall@5": 0.5, "valid_auc": 0.5}
    assert {name: board_tag(name, [*record, *measures]) for name in measures} == {
        "loss": "Loss/loss",
        "valid_log_loss": "Loss/valid_log_loss",
        "recall@5": "Quality/recall@5",
        "valid_auc": "Quality/valid_auc",
    }
    tags = [board_tag(name, record) for name in record if name != "step"]
    assert tags == [
        "progress/epoch",
        "progress/words",
        "progress/words_per_second",
        "progress/learning_rate/a",
        "stage/x",
    ]
    assert max("Loss/", "Quality/") < min(tags)


def test_tensorboard_has_the_settings_of_a_run(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    sink = TensorBoardSink(str(tmp_path))
    settings = {"optimizer": {"lr": 0.5, "max_norm": None}, "paths": ["a", "b"], "quick": True}
    sink.log_settings("my run", settings, ["loss", "auc", "valid_auc"])
    sink.close()
    content = EventAccumulator(str(tmp_path)).Reload().PluginTagToContent("hparams")
    started = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    found = {name: getattr(value, value.WhichOneof("kind")) for name, value in started.hparams.items()}
    assert found == {"optimizer.lr": 0.5, "paths": "['a', 'b']", "quick": "True"}
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["Loss/loss", "Quality/auc", "Quality/valid_auc"]
    assert started.group_name == "my run"
    layout = EventAccumulator(str(tmp_path)).Reload().Tensors("custom_scalars__config__")[0].tensor_proto
    assert b"^Quality/auc$" in layout.string_val[0] and b"^Quality/valid_auc$" in layout.string_val[0]


def test_tensorboard_refuses_a_remote_folder():
    with pytest.raises(UserError, match="needs a local folder, got 'memory://run'"):
        TensorBoardSink("memory://run")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def training(words: int, rate: float = 1000.0) -> dict[str, float | int | str]:
    return {"step": 7, "words": words, "words_per_second": rate, "loss": 2.34567, "learning_rate": 0.0123}


def test_console_prints_a_line_every_so_often(clock):
    stream = io.StringIO()
    sink: MetricSink = ConsoleSink(stream, total=10_000_000)
    for second in range(25):
        clock[0] = 1000.0 + second
        sink.log(training(100_000 * second, 123_456.7))
    sink.close()
    assert stream.getvalue().splitlines() == [
        "  0.0 %  123,457 words/s  loss 2.3457  lr 0.0123  0:01:21 left",
        " 10.0 %  123,457 words/s  loss 2.3457  lr 0.0123  0:01:13 left",
        " 20.0 %  123,457 words/s  loss 2.3457  lr 0.0123  0:01:05 left",
        " 24.0 %  123,457 words/s  loss 2.3457  lr 0.0123  0:01:02 left",
    ]


def shown(stream: io.StringIO) -> list[str]:
    """What stands on a terminal, line by line, after it has followed every carriage return."""
    lines = []
    for written in stream.getvalue().split("\n"):
        line = ""
        for part in written.split("\r"):
            line = part + line[len(part) :]
        lines.append(line.rstrip())
    return lines


def test_console_moves_a_bar_on_a_terminal():
    stream = Terminal()
    sink = ConsoleSink(stream, total=1000)
    sink.log(training(10, rate=0.001))
    sink.log(training(500))
    assert re.fullmatch(
        r" 50\.0 %\|##########[ ]{10}\|  1,000 words/s  loss 2\.3457  lr 0\.0123  0:00:00 left", *shown(stream)
    )
    sink.log({"step": 7, "analogies": 0.15312})
    sink.log(training(1000, rate=0.0))
    sink.close()
    sink.close()
    note, bar, end = shown(stream)
    assert note == "step 7  analogies 0.1531"
    assert bar == f"100.0 %|{'#' * 20}|  0 words/s  loss 2.3457  lr 0.0123  ? left"
    assert end == ""


def test_console_shows_a_stream_whose_end_is_not_known():
    stream = Terminal()
    sink = ConsoleSink(stream, total=None)
    sink.log(training(1500))
    sink.close()
    assert shown(stream) == ["1,500 words  1,000 words/s  loss 2.3457  lr 0.0123", ""]


def test_console_keeps_progress_before_another_record(clock):
    stream = io.StringIO()
    sink = ConsoleSink(stream, total=1000)
    sink.log(training(100))
    sink.log(training(200))
    sink.log({"step": 7, "spearman": 0.5})
    sink.close()
    assert [line[:7] for line in stream.getvalue().splitlines()] == [" 10.0 %", " 20.0 %", "step 7 "]
