"""A run begins with the rows, the state and the dense part of another, and goes on with other data."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from embedtrain.checkpoint import CheckpointReader, find_checkpoints
from embedtrain.cli import main
from embedtrain.data.row_names import read_row_names
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.distributed.runtime import Runtime
from embedtrain.recipes.growing import begin_from, grow_run
from embedtrain.recipes.loading import load_config
from embedtrain.sharding.layout import read_layout
from embedtrain.testing.threads import run_threads
from embedtrain.train.run_folder import RunFolder

MODELS = ["word2vec", "retrieval", "ranking"]
SETTINGS = {
    "word2vec": [
        "data={min_count: 1, tokenizer: whitespace}",
        "train={epochs: 1, words_per_step: 64, block_words: 32}",
        "word2vec.sample=0",
    ],
    "retrieval": [
        "evaluate={path: test.csv, k: [3]}",
        "items={path: items.csv, features: {kind: {}}, hidden: [4]}",
        "train={epochs: 1, global_batch_size: 4}",
    ],
    "ranking": [
        "data={valid_path: test.csv, categorical: [user, item, place, code], dense: [price]}",
        "data.features={item: {min_count: 2}, place: {num_rows: 8}, code: {num_rows: 50, encoding: id}}",
        "train={epochs: 1, global_batch_size: 32}",
    ],
}
Rows = dict[str, dict[str, Tensor]]


def write_rows(name: str, users: range, items: range, price: float) -> None:
    generator = np.random.default_rng(users.start)
    lines = ["user,item,label,price,place,code"]
    for n in range(64):
        user, item = users[n % len(users)], items[int(generator.integers(len(items)))]
        lines.append(f"u{user},i{item},{(user + item) % 2},{price * (n % 7)},{n % 5},{n % 50}")
    Path(name).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps a run of each model: the first test that needs one trains it."""
    return tmp_path_factory.mktemp("trained")


def begin(model: str, trained: Path) -> None:
    """Trains on the first day, or takes what another test has trained."""
    command(model, "day1")
    if not (trained / model).exists():
        assert main(command(model, "day1")) == 0
        shutil.copytree("day1", trained / model)
    shutil.copytree(trained / model, "day1", dirs_exist_ok=True)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows("day1.csv", range(12), range(20), 1.0)
    write_rows("day2.csv", range(6, 16), range(10, 26), 5.0)
    write_rows("test.csv", range(12), range(20), 1.0)
    Path("day1.txt").write_text("".join(f"w{i % 3} w{i % 5 + 3} w{i % 3}\n" for i in range(100)))
    Path("day2.txt").write_text("".join(f"w{i % 4} w{i % 7 + 4} new{i % 2}\n" for i in range(100)))


def command(model: str, day: str, *more: str) -> list[str]:
    Path("config.yaml").write_text(f"model: {model}\ntable: {{dim: 4}}\nlog: {{tensorboard: false}}\n")
    # Items of day 2 have a kind that day 1 does not know.
    num_items = {"day1": 20, "day2": 26}[day]
    Path("items.csv").write_text("id,kind\n" + "".join(f"i{item},k{item // 8}\n" for item in range(num_items)))
    data = f"data.path={day}.{'txt' if model == 'word2vec' else 'csv'}"
    return ["train", "config.yaml", *SETTINGS[model], data, "data.cache_path=cache", f"run.path={day}", *more]


def rows_of(run: str, step: int | None = None) -> tuple[Rows, dict[str, Tensor]]:
    """By table and name, weight and state one after the other; and the dense part."""
    found: Rows = {}
    chosen = next(info for info in reversed(find_checkpoints(f"{run}/checkpoints")) if step in (None, info.step))
    with CheckpointReader(chosen.path) as reader:
        for table in sorted({name.split("/")[0] for name in reader.tensors}):
            info = reader.table(table)
            slots = read_layout(info.layout, info.shape[0], table).slot_of(torch.arange(info.shape[0]))
            kinds = sorted(name for name in reader.tensors if name.startswith(f"{table}/"))
            joined = torch.cat([reader.gather(name, slots).view(len(slots), -1) for name in kinds], dim=1)
            names = read_row_names(run, reader.state, table, info.shape[0])
            words = [*names.words[: len(joined)], *map(str, range(len(names.words), len(joined)))]
            found[table] = dict(zip(words, joined, strict=True))
        return found, {name: tensor.clone() for name, tensor in reader.replicated().items()}


NEW = {
    "word2vec": {"input": {"w8", "w9", "w10", "new0", "new1"}},
    "retrieval": {"user": {"u12", "u13", "u14", "u15"}, "user.x": set(), "item.kind": {"k3"}},
    "ranking": {"user": {"u12", "u13", "u14", "u15"}, "place": set(), "code": set()},
}


@pytest.mark.parametrize(
    ("model", "grows"),
    [
        ("word2vec", False),
        ("retrieval", True),
        ("ranking", True),
        pytest.param("word2vec", True, marks=pytest.mark.slow),
        pytest.param("retrieval", False, marks=pytest.mark.slow),
        pytest.param("ranking", False, marks=pytest.mark.slow),
    ],
)
def test_old_rows_states_and_dense_part_are_those_of_the_other_run(model: str, grows: bool, trained: Path) -> None:
    begin(model, trained)
    before, dense = rows_of("day1")
    shutil.copytree("day1", "kept")
    more = ["start_from=day1", *(["start_from_grow=true"] if grows else [])]
    assert main(command(model, "day2", *more, "checkpoint.keep_last=9", "optimizer.lr=0.02")) == 0
    after, dense_after = rows_of("day2", step=0)
    assert dense_after.keys() == dense.keys()
    for name, tensor in dense.items():
        assert torch.equal(dense_after[name], tensor), name
    assert after.keys() == before.keys()
    for table, rows in before.items():
        for name, row in rows.items():
            assert torch.equal(after[table][name], row), (table, name)
        new = after[table].keys() - rows.keys()
        assert new == (NEW[model].get(table, new) if grows else set()), table
    trained, dense_trained = rows_of("day2")
    assert any(not torch.equal(trained[table][name], row) for table in after for name, row in after[table].items())
    assert any(not torch.equal(dense_trained[name], tensor) for name, tensor in dense.items()) or not dense
    # Given again, the command goes on without the other run.
    shutil.rmtree("day1")
    assert main(command(model, "day2", *more, "checkpoint.keep_last=9", "optimizer.lr=0.02", "train.epochs=2")) == 0
    assert Path("kept/config.yaml").exists()
    assert main(["evaluate", "day2"]) == (2 if model == "word2vec" else 0)


def begun(ranks: Ranks, settings: list[str]) -> list[tuple[str, int, int]]:
    runtime = Runtime(ranks, ranks.rank, torch.device("cpu"))
    grown = begin_from(load_config("config.yaml", settings), runtime).tables
    return [(table.name, table.num_kept, table.num_new) for table in grown]


@pytest.mark.parametrize("model", ["ranking", *(pytest.param(model, marks=pytest.mark.slow) for model in MODELS[:2])])
def test_any_number_of_ranks_begins_with_the_same_rows(model: str, trained: Path) -> None:
    begin(model, trained)
    whole: tuple[Rows, dict[str, Tensor]] | None = None
    for size in (1, 2, 3):
        settings = [*command(model, "day2", "start_from=day1", "start_from_grow=true")[2:], f"run.path=on{size}"]
        counts = run_threads(size, begun, settings)
        assert all(count == counts[0] for count in counts)
        rows, dense = rows_of(f"on{size}", step=0)
        if whole is None:
            whole = rows, dense
        assert rows.keys() == whole[0].keys()
        for table, expected in whole[0].items():
            assert rows[table].keys() == expected.keys()
            assert all(torch.equal(rows[table][name], row) for name, row in expected.items()), (size, table)


def dense_of(run: str) -> dict[str, object]:
    """What a checkpoint says of the columns of numbers."""
    with CheckpointReader(find_checkpoints(f"{run}/checkpoints")[-1].path) as reader:
        return dict(reader.state["dense"])


def test_a_ranking_run_keeps_the_means_that_its_network_was_trained_with(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin("ranking", trained)
    caplog.clear()
    caplog.set_level(logging.INFO, logger="embedtrain")
    assert main(command("ranking", "day2", "start_from=day1", "start_from_grow=true")) == 0
    logs = [record.message for record in caplog.records if record.message.startswith("click log:")]
    assert len(logs) == 2, "the log and the held-out one are prepared once each"
    assert dense_of("day1") == dense_of("day2")
    assert main(["predict", "day2", "--data", "day2.csv", "--output", "scores.csv"]) == 0


def test_a_stream_goes_on_from_a_run_of_logs(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hashed = ["data.num_rows=16", "data.valid_path=null"]
    assert main(command("ranking", "day1", *hashed)) == 0
    before, dense = rows_of("day1")
    Path("day2.csv").write_text(Path("day2.csv").read_text().partition("\n")[2])
    streamed = ["data.stream=true", "data.columns=[user,item,label,price,place,code]", "schedule.name=constant"]
    assert main(command("ranking", "day2", "start_from=day1", *hashed, *streamed, "checkpoint.keep_last=9")) == 0
    assert dense_of("day1") == dense_of("day2")
    after, dense_after = rows_of("day2", step=0)
    assert all(torch.equal(after[table][name], row) for table, rows in before.items() for name, row in rows.items())
    assert all(torch.equal(dense_after[name], tensor) for name, tensor in dense.items())
    shutil.rmtree("day1")
    shutil.rmtree("day2")
    begin("ranking", trained)
    assert main(command("ranking", "day2", "start_from=day1", *hashed, *streamed)) == 2
    told = "table user of day1 has 13 rows with a name each, but would have 16 rows for hashes of values"
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("ranking", "table user: 13 rows kept, 4 new"),
        pytest.param("retrieval", "table item.kind: 3 rows kept, 1 new", marks=pytest.mark.slow),
    ],
)
def test_grow_takes_ranking_runs_and_towers_with_features(
    model: str, told: str, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begin(model, trained)
    capfd.readouterr()
    command(model, "day2")
    assert main(["grow", "day1", "grown", "data.path=day2.csv"]) == 0
    assert told in capfd.readouterr().out.splitlines()
    shutil.rmtree("day1")
    assert main(["train", "grown/config.yaml"]) == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["start_from=nowhere"], "'nowhere' has no complete checkpoint yet"),
        (["start_from=day2"], "start_from=day2 must be the folder of another run"),
        (
            ["start_from=nowhere", "run.path=nowhere/inner"],
            "and run.path a new one outside it, got run.path=nowhere/inner",
        ),
        (["start_from=./day2/"], "start_from=./day2/ must be the folder of another run"),
        (["start_from_grow=true"], "start_from_grow=true needs start_from, the run whose tables grow: give start_from"),
        (["start_from=day1", "table.dim=8"], "start_from=day1: these settings cannot change: table.dim (was 4, is 8)"),
        (["start_from=day1", "items.hidden=[5]"], "these settings cannot change: items.hidden"),
        (["start_from=day1", "optimizer.name=adam"], "optimizer.name (was rowwise_adagrad, is adam)"),
        (["start_from=day1", "items.init_from=x.txt"], "items.init_from: start_from=day1 gives the tables their names"),
        (["start_from=other"], "start_from=other: these settings cannot change: model (was ranking, is retrieval)"),
        (
            ["start_from=rank", "data.features.place.encoding=id"],
            "table place of rank has 8 rows for hashes of values, but would have 8 rows for ids in this run",
        ),
        (
            ["start_from=rank", "data.features.item={num_rows: 9, encoding: vocabulary}"],
            "column 'item' has num_rows=9, and the run that this one starts from has 18 rows of it, which are all kept",
        ),
        (
            ["start_from=rank", "data.categorical=[item,user,place,code]"],
            "data.categorical (was ['user', 'item', 'place', 'code'], is ['item', 'user', 'place', 'code'])",
        ),
        (["start_from=rank", "data.dense=[]"], "these settings cannot change: data.dense (was ['price'], is [])"),
        (["start_from=rank", "data.features.item.dim=8"], "data.features.item.dim (was 4, is 8)"),
        (["start_from=rank", "data.dense_transform=none"], "data.dense_transform (was log1p, is none)"),
        (
            ["start_from=day1", "checkpoint.best_metric=nope"],
            "checkpoint.best_metric=nope: this run has no such metric",
        ),
    ],
)
def test_what_cannot_be_gone_on_with_is_one_sentence(
    settings: list[str], told: str, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = "ranking" if "start_from=rank" in settings else "retrieval"
    if model == "ranking":
        begin("ranking", trained)
        shutil.move("day1", "rank")
    elif "start_from=other" in settings:
        begin("ranking", trained)
        shutil.move("day1", "other")
    elif "start_from=day1" in settings:
        begin("retrieval", trained)
    capfd.readouterr()
    Path("day2").mkdir()
    Path("day2/notes.txt").write_text("mine")
    assert main(command(model, "day2", *settings)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("embedtrain: error")]
    assert told in line
    assert list(Path("day2").rglob("*")) == [Path("day2/notes.txt")], "the folder is as it was"


def test_a_grown_run_that_cannot_be_completed_leaves_no_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin("ranking", trained)
    command("ranking", "day2")

    def fail(folder: RunFolder, text: str) -> None:
        assert find_checkpoints(folder.checkpoints_path), "the checkpoint is written before the configuration"
        raise OSError("the disk is full")

    monkeypatch.setattr(RunFolder, "write_config", fail)
    with pytest.raises(OSError, match="the disk is full"):
        grow_run("day1", "grown", ["data.path=day2.csv"], Runtime(ONE_PROCESS, 0, torch.device("cpu")))
    assert not Path("grown").exists()


def test_data_without_anything_known_are_refused(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begin("retrieval", trained)
    write_rows("day2.csv", range(100, 110), range(100, 110), 1.0)
    assert main(command("retrieval", "day2", "start_from=day1")) == 2
    assert "no interaction is of a user and an item that have rows already" in capfd.readouterr().err
