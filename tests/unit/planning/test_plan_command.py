"""The plan command, in this process: no GPU, no ranks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from embedtrain.cli import main
from embedtrain.planning.sizes import format_bytes, parse_bytes, parse_count
from embedtrain.sharding.machine import Machine

CONFIG = str(Path(__file__).resolve().parents[3] / "configs" / "word2vec.yaml")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    return [CONFIG, f"run.path={tmp_path}/run"]


@pytest.fixture
def machine_path(tmp_path: Path) -> str:
    rates = {name: 1e9 for name in Machine.rates() if name != "network_bytes_per_second"}
    rates.update(seconds_per_predicted_second=1.0, collective_seconds=1e-4, step_seconds=1e-3, feature_seconds=1e-5)
    rates["op_seconds"] = 1e-5
    path = tmp_path / "machine.json"
    path.write_text(Machine(name="made up", num_ranks=2, **rates).to_json())
    return str(path)


def test_ten_billion_rows_on_1024_ranks_take_seconds(
    settings: list[str], machine_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    started_at = time.perf_counter()
    sizes = ["--rows", "10e9", "--world-size", "1024", "--hosts", "128", "--memory", "80GiB"]
    assert main(["plan", *settings, "train.words_per_step=1048576", *sizes, "--machine", machine_path]) == 0
    assert time.perf_counter() - started_at < 10
    out = capsys.readouterr().out
    for part in (
        "1,024 ranks on 128 hosts",
        "10,000,000,000   100      9,765,625    3.64 GiB   37.25 MiB",
        "fits into 80.00 GiB",
        # 404 bytes a row of two tables.
        "7.35 GiB a rank, 7.35 TiB in all",
        "by the rates of made up",
        "give network_bytes_per_second",
    ):
        assert part in out


def test_what_does_not_fit_is_said_with_what_would(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["table.dim=128", "checkpoint.mode=sync"]
    sizes = ["--rows", "input=1e8", "--rows", "output=1e8", "--world-size", "4", "--memory", "20GiB"]
    assert main(["plan", *settings, *overrides, *sizes]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT into 20.00 GiB" in out
    assert "rows in bfloat16: 12." in out
    assert "5 ranks: 19." in out
    assert "dim 106" in out


def test_each_feature_of_a_ranking_model_is_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], machine_path: str
) -> None:
    config = str(Path(CONFIG).parent / "ranking_criteo.yaml")
    sizes = ["--rows", "2e6", "--rows", "C3=5e6", "--world-size", "8", "--machine", machine_path]
    overrides = [f"run.path={tmp_path}/run", "data.num_rows=null", "data.features.C1.dim=4"]
    assert main(["plan", config, *overrides, *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    tables = [line.split()[:4] for line in lines if line[:2] in {f"C{i}" for i in range(1, 10)}]
    assert len(tables) == 26
    assert tables[0] == ["C1", "2,000,000", "4", "250,000"]
    assert tables[2][:2] == ["C3", "5,000,000"]
    assert any("dense gradients" in line for line in lines)
    assert main(["plan", config, *overrides, *sizes, "--rows", "C6=5"]) == 2
    assert "the configuration gives 'C6' 1,000 rows" in capsys.readouterr().err


def test_users_items_and_their_features_are_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(CONFIG).parent / "retrieval.yaml")
    overrides = [f"run.path={tmp_path}/run", "items.path=x", "items.features.maker.separator=null", "items.hidden=[8]"]
    overrides += ["retrieval.negatives=2048", "retrieval.in_batch=false"]
    given = ["plan", config, *overrides, "--rows", "user=1e6", "--rows", "item=2e5", "--world-size", "4"]
    assert main(given) == 2
    assert "the rows of table 'item.maker' come from the data" in capsys.readouterr().err
    assert main([*given, "--rows", "item.maker=500"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[2:5]] == [["user", "1,000,000"], ["item", "200,000"], ["item.maker", "500"]]
    # The candidates of a step, 2,048 of dim 64, and a perceptron of 128 x 8 + 8 + 8 x 64 + 64 go out and come back.
    dense = 2 * 3 / 4 * 4 * (2048 * 64 + 128 * 8 + 8 + 8 * 64 + 64)
    assert " ".join(next(line for line in lines if line[0] == "exchange")).endswith(
        f"dense gradients {format_bytes(dense)}"
    )


def test_bags_need_their_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(CONFIG).parent / "ranking.yaml")
    settings = [f"run.path={tmp_path}/run", "data.features.country.bag=true", "train.global_batch_size=4096"]
    given = ["plan", config, *settings, "--rows", "1e6", "--world-size", "2", "--skew", "0"]
    assert main(given) == 2
    assert "a bag of 'country' holds comes from the data" in capsys.readouterr().err
    assert main([*given, "--bag-length", "50"]) == 0
    assert "pooled at the owners of their rows: country" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the rows of table 'input' come from the data"),
        (["--rows", "items=5"], "--rows names items; the tables are input, output"),
        (["--rows", "many"], "expected a number such as"),
        (["--rows", "5", "--rows", "6"], "without a table's name"),
        (["--rows", "input=5", "--rows", "output=6"], "the same --rows for both"),
        (["--rows", "5", "--memory", "much"], "a size such as 80GiB"),
        (["--rows", "5", "--world-size", "3", "--hosts", "2"], "a multiple of --hosts"),
        (["--rows", "5", "--machine", "absent.json"], "absent.json cannot be read"),
        (["--rows", "5", "--rate", "step_seconds=1"], "give --machine FILE too"),
        (["--rows", "5", "--skew", "-1"], "expected --skew between"),
        (["--rows", "5", "--bag-length", "0"], "expected --bag-length above 0"),
        (["--rows", "5", "--measure", "x.json"], "--measure measures this machine and nothing else"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], message: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *settings, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_rate_can_be_replaced(settings: list[str], machine_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", *settings, "--rows", "1000", "--machine", machine_path]
    assert main([*given, "--rate", "step_seconds=0.5"]) == 0
    assert "rest 500.0" in capsys.readouterr().out
    assert main([*given, "--rate", "bandwidth=1"]) == 2
    assert "there is no rate 'bandwidth'" in capsys.readouterr().err
    assert main(["plan"]) == 2


def test_rates_of_one_rank_are_said_to_know_no_exchange(
    settings: list[str], machine_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(machine_path)
    path.write_text(path.read_text().replace('"num_ranks": 2', '"num_ranks": 1'))
    given = ["plan", *settings, "--rows", "1000", "--machine", machine_path]
    assert main(given) == 0
    assert "rates of one rank" not in capsys.readouterr().out
    assert main([*given, "--world-size", "2"]) == 0
    assert "rates of one rank, to which exchanging costs nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 << 30), ("1.5 kb", 1500), ("12", 12), ("2TB", 2 * 10**12), ("1MiB", 1 << 20)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_counts_and_sizes_as_people_write_them() -> None:
    assert [parse_count(text) for text in ("10e9", "1_000", "2,000")] == [10**10, 1000, 2000]
    assert [format_bytes(size) for size in (12, 1536, 80 << 30)] == ["12 B", "1.50 KiB", "80.00 GiB"]
