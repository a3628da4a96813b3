"""The plan command, in this process: no GPU, no ranks."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from embedtrain.cli import main
from embedtrain.planning import probe
from embedtrain.planning.sizes import format_bytes, parse_bandwidth, parse_bytes, parse_count

CONFIG = str(Path(__file__).resolve().parents[3] / "configs" / "word2vec.yaml")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    return [CONFIG, f"run.path={tmp_path}/run"]


def test_ten_billion_rows_on_1024_ranks_take_seconds(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    started_at = time.perf_counter()
    sizes = ["--rows", "10e9", "--world-size", "1024", "--hosts", "128", "--memory", "80GiB"]
    assert main(["plan", *settings, "train.words_per_step=1048576", *sizes]) == 0
    assert time.perf_counter() - started_at < 10
    out = capsys.readouterr().out
    for part in (
        "1,024 ranks on 128 hosts",
        "10,000,000,000   100      9,765,625    3.64 GiB   37.25 MiB",
        "fits into 80.00 GiB",
        # 404 bytes a row of two tables.
        "7.35 GiB per rank, 7.35 TiB in all",
    ):
        assert part in out


def test_what_does_not_fit_is_said_with_what_would(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["table.dim=128", "train.words_per_step=16384", "checkpoint.mode=sync"]
    sizes = ["--rows", "input=1e8", "--rows", "output=1e8", "--world-size", "4", "--memory", "20GiB"]
    assert main(["plan", *settings, *overrides, *sizes]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT into 20.00 GiB" in out
    assert "rows in bfloat16: 12." in out
    assert "5 ranks: 19." in out
    assert "dim 106" in out


def test_each_feature_of_a_ranking_model_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(CONFIG).parent / "ranking_criteo.yaml")
    sizes = ["--rows", "2e6", "--rows", "C3=5e6", "--world-size", "8"]
    overrides = [f"run.path={tmp_path}/run", "data.num_rows=null", "data.features.C1.dim=4"]
    assert main(["plan", config, *overrides, *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    tables = [line.split()[:4] for line in lines if line[:2] in {f"C{i}" for i in range(1, 10)}]
    assert len(tables) == 26
    assert tables[0] == ["C1", "2,000,000", "4", "250,000"]
    assert tables[2][:2] == ["C3", "5,000,000"]
    assert any("dense gradients" in line for line in lines)
    assert main(["plan", config, *overrides, *sizes, "--rows", "C6=5"]) == 2
    assert "the configuration gives 'C6' 1,000 rows, not 5" in capsys.readouterr().err


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
    assert "the number of ids in a bag of 'country' comes from the data: give --bag-length L" in capsys.readouterr().err
    assert main([*given, "--bag-length", "50"]) == 0
    assert "pooled by the owners of their rows: country" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the rows of table 'input' come from the data: give --rows input=N (or --rows N for all tables)"),
        (
            ["--rows", "input=5", "--rows", "output=5", "--rows", "5"],
            "--rows 5 has no effect, because the rows of every table are known",
        ),
        (["--rows", "=5"], "expected --rows TABLE=N, got '=5'"),
        (["--rows", "items=5"], "there is no table items; the tables are input, output"),
        (["--rows", "many"], "expected a number such as"),
        (["--rows", "5", "--rows", "6"], "--rows without a table name must be given only once, got 2"),
        (["--rows", "input=5", "--rows", "output=6"], "equal numbers of rows, got 5 for input and 6 for output"),
        (["--rows", "5", "--memory", "much"], "a size such as 80GiB"),
        (["--rows", "5", "--world-size", "3", "--hosts", "2"], "a multiple of --hosts"),
        (["--rows", "5", "--memory-bandwidth", "20GB"], "expected a bandwidth such as 20GB/s, got '20GB'"),
        (["--rows", "5", "--exchange-bandwidth", "1GB/s"], "--exchange-bandwidth needs more than one rank"),
        (["--rows", "5", "--probe", "--memory-bandwidth", "1GB/s"], "--probe measures the bandwidths"),
        (["--rows", "5", "--skew", "-1"], "--skew must be between"),
        (["--rows", "5", "--bag-length", "0"], "--bag-length must be more than 0"),
        (["--rows", "5", "--bag-length", "3"], "because no table of this model has bags"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], message: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *settings, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bandwidths_bound_the_time_of_a_step(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", *settings, "--rows", "1000", "--world-size", "2"]
    assert main(given) == 0
    assert "at least" not in capsys.readouterr().out
    assert main([*given, "--memory-bandwidth", "1GiB/s", "--exchange-bandwidth", "512MiB/s"]) == 0
    bound, rows, exchange, left_out = capsys.readouterr().out.splitlines()[-4:]
    milliseconds = [float(re.findall(r"([0-9.]+) ms", line)[0]) for line in (bound, rows, exchange)]
    assert milliseconds[0] == pytest.approx(milliseconds[1] + milliseconds[2], abs=0.011)
    assert min(milliseconds) > 0
    assert rows.endswith("read and written at 1.00 GiB/s")
    assert exchange.endswith("sent at 512.00 MiB/s")
    assert "unknown" not in left_out
    assert "the model's arithmetic" in left_out
    assert main([*given, "--memory-bandwidth", "1GiB/s"]) == 0
    assert "left out: exchange (bandwidth unknown), " in capsys.readouterr().out
    assert main([*given[:-2], "--memory-bandwidth", "1GiB/s"]) == 0
    assert "unknown" not in capsys.readouterr().out


@pytest.mark.parametrize("world_size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_bandwidths_are_probed_here(
    world_size: int, settings: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(probe, "COPY_BYTES", 1 << 16)
    given = [*settings, "run.device=cpu", "--rows", "1000", "--world-size", str(world_size)]
    assert main(["plan", *given, "--probe"]) == 0
    out = capfd.readouterr().out
    assert re.search(r"rows [0-9.]+ ms: .* read and written at [0-9.]+ .iB/s", out)
    # Four ranks are planned for, and two are started.
    assert (re.search(r"exchange [0-9.]+ ms: .* sent at [0-9.]+ .iB/s", out) is None) == (world_size == 1)
    assert "unknown" not in out


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 << 30), ("1.5 kb", 1500), ("12", 12), ("2TB", 2 * 10**12), ("1MiB", 1 << 20)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_counts_sizes_and_bandwidths_as_people_write_them() -> None:
    assert [parse_count(text) for text in ("10e9", "1_000", "2,000")] == [10**10, 1000, 2000]
    assert [parse_count(text) for text in ("5M", "1.5B", "2k", "3g", "1T")] == [5e6, 1.5e9, 2000, 3e9, 1e12]
    assert [format_bytes(size) for size in (12, 1536, 80 << 30)] == ["12 B", "1.50 KiB", "80.00 GiB"]
    assert [parse_bandwidth(text) for text in ("20GB/s", "1.5 KiB/s")] == [2e10, 1536.0]
