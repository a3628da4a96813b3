"""A run of retrieval from raw files to recommendations, through the command line and through its parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from embedtrain import cli
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.recipes.building import build_parts
from embedtrain.recipes.loading import load_config
from embedtrain.testing.ranks import run_ranks
from embedtrain.train.run import build_run, check_run_folder
from tests.records import without_costs

NUM_GROUPS, USERS_PER_GROUP, ITEMS_PER_GROUP = 4, 15, 12
OFFSET = 2**63  # ids of users are hashes past the signed 64 bits


def write_data(folder: Path) -> None:
    """Users of a group turn to items of the group: some of each user's are held out."""
    generator = np.random.default_rng(0)
    train, test, items = ["user,item"], ["user,item"], ["id,genres,shelf"]
    for group in range(NUM_GROUPS):
        for user in range(USERS_PER_GROUP):
            chosen = generator.permutation(ITEMS_PER_GROUP)[:8]
            rows = [f"{OFFSET + 1000 * group + user},g{group}-i{item}" for item in chosen]
            train += rows[:6]
            test += rows[6:]
        items += [f"g{group}-i{item},genre{group}|common,shelf{item % 3}" for item in range(ITEMS_PER_GROUP)]
    for name, lines in (("train", train), ("test", test), ("items", items)):
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


def overrides(folder: Path, run: str, *more: str) -> list[str]:
    return [
        "model=retrieval",
        f"data.path={folder}/train.csv",
        f"data.cache_path={folder}/cache",
        f"evaluate.path={folder}/test.csv",
        f"run.path={folder}/{run}",
        "run.device=cpu",
        "evaluate.k=[5,10]",
        "table.dim=16",
        "train={epochs: 6, global_batch_size: 12, items_per_example: 2}",
        "retrieval={negatives: 16, in_batch: false}",
        "log={every_steps: 10, tensorboard: false}",
        "checkpoint={every_steps: 25, mode: sync}",
        *more,
    ]


TOWERS = (
    "items={path: FOLDER/items.csv, features: {genres: {separator: '|'}, shelf: {}}, hidden: [8]}",
    "retrieval.in_batch=true",
)


def towers(folder: Path) -> list[str]:
    return [part.replace("FOLDER", str(folder)) for part in TOWERS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def write_baskets(path: Path) -> None:
    """Baskets of items of one shelf each, a row an item, the baskets' rows among each other."""
    generator = np.random.default_rng(1)
    rows = [
        f"{basket},shelf{basket % 3}-{item}" for basket in range(600) for item in generator.choice(12, 6, replace=False)
    ]
    path.write_text("\n".join(["order,product", *generator.permutation(rows)]) + "\n")


class KilledError(Exception):
    pass


def run_parts(ranks: Ranks, arguments: list[str], kill_at: int | None) -> dict[str, torch.Tensor]:
    """Trains as the command does; returns all that was trained, whole."""
    torch.set_num_threads(1)
    config = load_config(None, arguments)
    runtime = Runtime(ranks, ranks.rank, torch.device("cpu"))
    run = build_run(config, runtime, check_run_folder(config), build_parts(config, runtime))

    def strike() -> None:
        if run.trainer.state.step == kill_at:
            raise KilledError

    try:
        run.trainer.run(run.sinks, config.log.every_steps, on_step=strike)
    except KilledError:
        assert kill_at is not None
    for sink in run.sinks:
        sink.close()
    task = run.trainer._task
    tables = {
        f"{name}/{kind}": task.tables.gather_table(name, kind)
        for name in task.tables.shards
        for kind in ("weight", *task.tables.shards[name].state)
    }
    return {**tables, **(task.dense.tensors() if task.dense is not None else {})}


@pytest.mark.parametrize(
    "more",
    [
        TOWERS,
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in (
                (),
                ("retrieval.loss=alignment_uniformity", "retrieval.in_batch=true"),
                ("retrieval.loss=cosine_contrastive", "retrieval.hard_negatives=4", "retrieval.popularity_share=0.5"),
            )
        ),
    ],
    ids=["towers", "factorisation", "alignment_uniformity", "cosine_contrastive"],
)
def test_a_killed_run_goes_on_to_the_last_bit_and_on_another_number_of_ranks(
    folder: Path, more: tuple[str, ...]
) -> None:
    more = tuple(part.replace("FOLDER", str(folder)) for part in more)
    whole = run_ranks(2, run_parts, overrides(folder, "whole", *more), None)[0]
    killed = overrides(folder, "killed", *more)
    run_ranks(2, run_parts, killed, 60)
    resumed = run_ranks(2, run_parts, killed, None)[0]
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name

    moved = overrides(folder, "moved", *more)
    run_ranks(2, run_parts, moved, 60)
    for name, tensor in run_parts(ONE_PROCESS, moved, None).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0.05, atol=0.02)
    lines = [[json.loads(line) for line in (folder / run / "metrics.jsonl").open()] for run in ("whole", "killed")]
    for first, second in zip(*lines, strict=True):
        if first["step"] != 60:  # of the first record after the resumption, some steps were counted before it
            assert without_costs(first) == without_costs(second)


ON_HOST = ("table.placement=host", "table.cache_bytes=500")
"""Then a step is prepared while the one before runs."""


class ProductOperands(TorchDispatchMode):
    """Notes each operand of each matrix product: its shape, and how its address is aligned to a cache line.

    A BLAS may add up in another order if an operand is aligned otherwise. Where results are promised to the last bit,
    the operands must not only be equal: they must be aligned alike, which shows on every processor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Size, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.seen += [(operand.shape, operand.data_ptr() % 64) for operand in args if isinstance(operand, Tensor)]
        return func(*args, **(kwargs or {}))


def test_where_rows_live_changes_no_result(folder: Path) -> None:
    with ProductOperands() as on_device:
        expected = run_parts(ONE_PROCESS, overrides(folder, "device"), None)
    with ProductOperands() as on_host:
        found = run_parts(ONE_PROCESS, overrides(folder, "host", *ON_HOST), None)
    assert on_device.seen == on_host.seen != []
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_where_rows_of_bags_live_changes_the_rounding_of_sums_alone(folder: Path, world_size: int) -> None:
    expected, found = (
        run_ranks(world_size, run_parts, overrides(folder, name, *towers(folder), *more), None)[0]
        for name, more in (("device", ()), ("host", ON_HOST))
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # In a table an update adds up a row's gradients on its way over it; of copied rows they are added up before.
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_rows_travel_as_they_are_told(folder: Path) -> None:
    exact, rounded = (
        run_ranks(2, run_parts, overrides(folder, wire, f"table.wire_dtype={wire}"), None)[0]
        for wire in ("float32", "bfloat16")
    )
    for name in ("user/weight", "item/weight"):
        assert not torch.equal(rounded[name], exact[name])
        # Rounding by up to 2^-9 at each of the steps.
        torch.testing.assert_close(rounded[name], exact[name], rtol=0.1, atol=0.05)


def command(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    printed = capfd.readouterr()
    return status, printed.out, printed.err


OWN_OPTIMIZERS = (
    "optimizer.tables.user={name: adam, lr: 0.01}",
    "optimizer.tables.item.shelf.lr=0.3",  # a table's name may hold a dot
)


@pytest.mark.slow  # the ranking model holds it in the ordinary run
def test_tables_have_optimizers_of_their_own_through_a_resume(folder: Path) -> None:
    more = [*towers(folder), *OWN_OPTIMIZERS]
    whole = run_ranks(2, run_parts, overrides(folder, "whole", *more), None)[0]
    assert {name for name in whole if name.startswith("user/")} == {"user/weight", "user/exp_avg", "user/exp_avg_sq"}
    assert {"item/accumulator", "item.shelf/accumulator"} <= whole.keys()
    killed = overrides(folder, "killed", *more)
    run_ranks(2, run_parts, killed, 60)
    resumed = run_ranks(2, run_parts, killed, None)[0]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    same = run_ranks(2, run_parts, overrides(folder, "same", *towers(folder)), None)[0]
    assert not torch.equal(same["item.shelf/weight"], whole["item.shelf/weight"])


@pytest.mark.parametrize("has_towers", [False, True])
def test_from_raw_files_to_recommendations(folder: Path, capfd: pytest.CaptureFixture[str], has_towers: bool) -> None:
    (folder / "config.yaml").write_text("model: retrieval\n")
    arguments = overrides(folder, "run", *(towers(folder) if has_towers else []))
    status, _, errors = command(capfd, "train", str(folder / "config.yaml"), *arguments)
    assert status == 0, errors
    run = str(folder / "run")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    measured = [record for record in records if "recall@5" in record]
    assert [record["epoch"] for record in measured] == [1, 2, 3, 4, 5, 6]
    # Of the 6 items of the group that the user has not, 2 are to be found: chance gives 5 of 42 and less.
    assert measured[-1]["recall@5"] > 0.6
    assert measured[-1]["recall@5"] > measured[0]["recall@5"] or measured[0]["recall@5"] > 0.8
    assert set(measured[0]) >= {"ndcg@10", "hit@10", "mrr@10", "item_coverage@10"}

    user = str(OFFSET + 2003)
    status, printed, errors = command(capfd, "recommend", run, user, "--top", "5")
    assert status == 0, errors
    first, *listed = printed.splitlines()
    assert first == user
    assert len(listed) == 5
    known = {line.split(",")[1] for line in (folder / "train.csv").read_text().splitlines() if line.startswith(user)}
    items = [line.split()[1] for line in listed]
    assert not known & set(items)
    assert sum(item.startswith("g2-") for item in items) >= 3

    status, printed, _ = command(capfd, "neighbors", run, "g1-i3", "--top", "4")
    assert status == 0
    assert sum("g1-" in line for line in printed.splitlines()[1:]) >= 3
    status, printed, _ = command(capfd, "neighbors", run, user, "--table", "user", "--top", "4")
    assert sum(line.split()[1].startswith(str(OFFSET + 2000)[:-3]) for line in printed.splitlines()[1:]) >= 3

    output = str(folder / "top.parquet")
    status, _, errors = command(capfd, "recommend", run, "--all", "--top", "3", "--output", output)
    assert status == 0, errors
    table = pq.read_table(output)
    assert table.num_rows == NUM_GROUPS * USERS_PER_GROUP
    row = table.column("user").to_pylist().index(user)
    assert table.column("items")[row].as_py() == items[:3]

    status, printed, _ = command(capfd, "evaluate", run)
    assert f"{measured[-1]['recall@5']:.4f}  recall@5" in printed
    status, _, errors = command(capfd, "export", run, "--format", "parquet", "--output", str(folder / "v.parquet"))
    assert status == 0, errors
    assert set(pq.read_table(folder / "v.parquet").column("word").to_pylist()) == {
        f"g{g}-i{i}" for g in range(NUM_GROUPS) for i in range(ITEMS_PER_GROUP)
    }
    assert command(capfd, "inspect", run)[0] == 0


def test_a_report_shows_items_near_items_under_their_raw_ids(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "config.yaml").write_text("model: retrieval\n")
    arguments = overrides(folder, "run", *towers(folder), "train.epochs=1")
    assert command(capfd, "train", str(folder / "config.yaml"), *arguments)[0] == 0
    run = str(folder / "run")
    assert command(capfd, "report", run, "--word", "g1-i3")[0] == 0
    page = (folder / "run" / "report.html").read_text()
    for part in (
        "Nearest items",
        ">g1-i3</th>",
        "Map of the items",
        "Recommendations for held-out users",
        "by popularity",
    ):
        assert part in page

    # Without what it keeps of its data a run has no vectors of towers: the rest is still told.
    (folder / "run" / "kept_data").rename(folder / "kept")
    (folder / "train.csv").rename(folder / "away.csv")
    assert command(capfd, "report", run)[0] == 0
    page = (folder / "run" / "report.html").read_text()
    assert "Nearest" not in page and "done at step" in page
    assert "run/kept_data is missing" in refused(capfd, "report", run, "--word", "g1-i3")


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    status, _, errors = command(capfd, *arguments)
    assert status == 2, errors
    return errors.splitlines()[-1]


def test_mistakes_are_one_clear_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "config.yaml").write_text("model: retrieval\n")
    train = ["train", str(folder / "config.yaml"), *overrides(folder, "run", "train.epochs=1")]
    line = refused(capfd, *train, "data.item_column=thing")
    assert "there is no column 'thing'; its columns are 'user', 'item'" in line
    assert "did you mean train.global_batch_size" in refused(capfd, *train, "train.batch_size=3")
    assert "word2vec.window for model retrieval (it is one of model word2vec)" in refused(
        capfd, *train, "word2vec.window=3"
    )
    assert "items.features needs items.path" in refused(capfd, *train, "items.features={genre: {}}")
    assert "items.features" in refused(capfd, *train, "items.features.genre.sep=x")
    assert "leaves no negatives" in refused(capfd, *train, "retrieval.negatives=0")
    assert command(capfd, *train)[0] == 0
    run = str(folder / "run")
    line = refused(capfd, "recommend", run, "42")
    assert f"unknown user '42': it is not among the {NUM_GROUPS * USERS_PER_GROUP} users" in line
    assert "unknown item 'g1-i99'" in refused(capfd, "neighbors", run, "g1-i99")
    assert "has no table 'word'" in refused(capfd, "neighbors", run, "x", "--table", "word")
    assert "expected the ids of users" in refused(capfd, "recommend", run)
    assert "--all needs --output" in refused(capfd, "recommend", run, "--all")
    assert "no run folder" in refused(capfd, "recommend", str(folder / "nowhere"), "1")


def test_a_file_that_changes_is_noticed_when_the_run_goes_on(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "config.yaml").write_text("model: retrieval\n")
    train = ["train", str(folder / "config.yaml"), *overrides(folder, "run", "train.epochs=1")]
    assert command(capfd, *train)[0] == 0
    with (folder / "train.csv").open("a") as file:
        file.write(f"{OFFSET},g3-i0\n")
    assert "was trained on other data than data.path holds now" in refused(capfd, *train)
    assert command(capfd, "recommend", str(folder / "run"), str(OFFSET))[0] == 0, "the run has its data itself"


def test_a_file_that_changes_between_epochs_ends_the_run(folder: Path) -> None:
    config = load_config(None, overrides(folder, "run", "train.epochs=2"))
    runtime = Runtime(ONE_PROCESS, 0, torch.device("cpu"))
    run = build_run(config, runtime, check_run_folder(config), build_parts(config, runtime))

    def change() -> None:
        (folder / "train.csv").write_text("user,item\n1,2\n")

    with pytest.raises(UserError, match=r"train.csv: changed while the run trained on it"):
        run.trainer.run([], config.log.every_steps, on_step=change)
    assert run.trainer.state.epoch == 1


def test_items_of_baskets_have_vectors_by_word2vec(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_baskets(tmp_path / "orders.csv")
    (tmp_path / "config.yaml").write_text("model: word2vec\n")
    settings = [
        f"data={{path: {tmp_path}/orders.csv, format: csv, basket_column: order, item_column: product, min_count: 1}}",
        f"data.cache_path={tmp_path}/cache",
        f"run={{path: {tmp_path}/run, device: cpu}}",
        "table.dim=16",
        "word2vec={window: 6, sample: 0}",
        "train={epochs: 20, words_per_step: 256, block_words: 128}",
        "log.tensorboard=false",
    ]
    status, _, errors = command(capfd, "train", str(tmp_path / "config.yaml"), *settings)
    assert status == 0, errors
    status, printed, errors = command(capfd, "neighbors", str(tmp_path / "run"), "shelf1-3", "--top", "8")
    assert status == 0, errors
    assert sum("shelf1-" in line for line in printed.splitlines()[1:]) >= 7
