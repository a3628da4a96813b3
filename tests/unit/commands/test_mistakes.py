"""What a user reads after a mistake: one line with what was expected, what came, where, and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from embedtrain.cli import main
from embedtrain.errors import UserError
from tests.unit.commands.parsing import parse

TRAIN = ["train", "config.yaml", "data.path=corpus.txt", "data.cache_path=cache", "run.path=run"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("table: {dim: 8}\n")
    (tmp_path / "corpus.txt").write_text("a b c d\n" * 200)
    (tmp_path / "words.txt").write_text("a\nb\nc\n" * 8 + "c rare\n" * 4)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([*TRAIN, "data.path=null"], ["data.path must be given and cannot be null"]),
        ([*TRAIN, "data.path=[]"], ["data.path must be a path or a list of paths, got []"]),
        ([*TRAIN, "data.path=5"], ["5: no such file or folder"]),
        ([*TRAIN, "data.path=words.txt"], ["words.txt: no line has two words of the vocabulary", "data.min_count=5"]),
        ([*TRAIN, "run.path=corpus.txt"], ["corpus.txt is a file, not a folder; give another path"]),
        ([*TRAIN, "run.path=corpus.txt/below"], ["corpus.txt/below lies below a file", "give another path"]),
        ([*TRAIN, "run.path=/proc/none"], ["run.path=/proc/none: the folder cannot be made", "give a path"]),
        ([*TRAIN, "data.cache_path=/proc/none"], ["/proc/none"]),
        ([*TRAIN, "run.path=/"], ["run.path must name a folder, such as runs/x, got '/'"]),
        ([*TRAIN, "run.device=cuda"], ["no GPU", "start fewer ranks per host, or use device=cpu"]),
        ([*TRAIN, "run.timeout_seconds=-1"], ["run.timeout_seconds must be more than 0", "got -1"]),
        ([*TRAIN, "optimizer.lr=.nan"], ["optimizer.lr must be a finite number", "got nan"]),
        ([*TRAIN, "seed=99999999999999999999"], ["seed must be below 2**63"]),
        ([*TRAIN, "optimizer.lr=abc"], ["optimizer.lr: expected a number, got 'abc'"]),
        ([*TRAIN, "optimizer.eps=abc"], ["optimizer.eps: expected a number, got 'abc'"]),
        ([*TRAIN, "optimizer.tables.input.eps=abc"], ["optimizer.tables.input.eps: expected a number, got 'abc'"]),
        ([*TRAIN, "schedule.name=lin"], ["schedule.name: expected one of constant, linear, cosine, inverse_sqrt, got"]),
        ([*TRAIN, "data.min_count=null"], ["data.min_count: expected a value, got null"]),
        ([*TRAIN, "table.dim=2.5"], ["table.dim: expected an integer, got '2.5'"]),
        ([*TRAIN, "table.cache_bytes=x"], ["table.cache_bytes: expected an integer or null, got 'x'"]),
        ([*TRAIN, "log.tensorboard=maybe"], ["log.tensorboard: expected true or false, got 'maybe'"]),
        ([*TRAIN, "seed=010"], ["seed: YAML reads 010 as 8: write the number without a leading 0"]),
        ([*TRAIN, "seed=1:30"], ["seed: YAML reads 1:30 as 90"]),
        ([*TRAIN, "table=8"], ["table is a section: expected keys and values in it, got '8'"]),
        ([*TRAIN, "table=null"], ["table is a section: expected keys and values in it, got null"]),
        ([*TRAIN, "model=retrieval", "evaluate.k=20"], ["evaluate.k: expected a list such as [20], got '20'"]),
        ([*TRAIN, "model=films"], ["there is no model 'films'", "install the package in this environment"]),
        ([*TRAIN, "table.dims=3"], ["there is no key table.dims", "did you mean table.dim?"]),
        ([*TRAIN, "table.dim=1000000000000"], ["GiB", "memory on", "embedtrain plan"]),
        (
            [*TRAIN, "--dryrun"],
            ["No such option '--dryrun'. Did you mean '--dry-run'?", "See embedtrain train --help."],
        ),
        ([*TRAIN, "--nothing=5"], ["No such option '--nothing'. The options are --profile, --dry-run, -h, --help."]),
        ([*TRAIN, "--profile", "--profile"], ["Option '--profile' is given 2 times."]),
        ([*TRAIN, "more.yaml"], ["expected one configuration and settings", "got also 'more.yaml'"]),
        (["train", "seed=3"], ["expected a configuration, such as word2vec"]),
        (["train", "", "seed=3"], ["Invalid value for 'CONFIG': expected a value, got ''"]),
        ([], ["Missing command. See embedtrain --help."]),
        (["trian"], ["No such command 'trian'. Did you mean 'train'?"]),
        (["frobnicate"], ["No such command 'frobnicate'. The commands are init, train,"]),
        (["config", "shwo"], ["No such command 'shwo'. Did you mean 'show'?"]),
        (["export", "run", "--output"], ["Option '--output' requires an argument.", "See embedtrain export --help."]),
        (["export", "run", "--output", "--overwrite"], ["'--output' requires an argument, got the option --overwrite"]),
        (["export", "run", "--output=", "--format=npy"], ["Invalid value for '--output': expected a value, got ''"]),
        (["export", "run", "--format", "wordvec"], ["'wordvec' is not one of 'word2vec', 'word2vec-binary', 'glove'"]),
        (["neighbors", "run"], ["Missing argument 'QUERY...'."]),
        (["neighbors", "run", "king", "-man"], ["No such option '-man'."]),
        (["recommend", "run", "--top", "many", "5"], ["Invalid value for '--top': 'many' is not a valid integer."]),
        (["grow", "run", "seed=3"], ["expected the folder of a run and the folder of the new run, got ['run']"]),
        (["plan", "config.yaml", "--rows", "1e30"], ["expected at most 1,099,511,627,776 rows in table 'input'"]),
        (["plan", "config.yaml", "--rows", "input=1", "--rows", "input=2"], ["--rows input=... is given twice"]),
        (
            ["evaluate", "run", "--table", "input", "--case-sensitive"],
            ["--table, --case-sensitive: only for word tests, so give --analogies FILE or --similarity FILE"],
        ),
        (["evaluate", "run", "--restrict-vocab", "300000"], ["--restrict-vocab: only for word tests"]),
        (
            ["recommend", "run", "4711", "--all", "--output", "top"],
            ["--all, or one of --items, --history, --features, got --all and 4711"],
        ),
        (
            ["recommend", "run", "--all", "--output", "top.CSV"],
            ["top.CSV must end in .parquet: recommendations are written as Parquet"],
        ),
        (["recommend", "run", "7", "--output", "a.parquet.gz"], ["a.parquet.gz ends in the suffix of gzip, but"]),
        (["recommend", "run", "4711", "--overwrite"], ["--overwrite needs a file to replace: give --output"]),
        (["compare", "config.yaml", "--optimizers", "sgd,adam,sgd"], ["--optimizers names sgd twice"]),
        (
            ["compare", "config.yaml", "--optimizers", "sgd", "--rates", "sgd=1", "--rates", "sgd=2"],
            ["--rates sgd=... is given twice"],
        ),
        (
            ["compare", "config.yaml", "--optimizers", "sgd", "--rates", "sgd=1,1.0"],
            ["sgd=1,1.0 contains a rate twice"],
        ),
        (["inspect", ""], ["Invalid value for 'RUN': expected a value, got ''"]),
        (["inspect", "config.yaml"], ["Directory 'config.yaml' is a file."]),
        (["diff", "here", "there"], ["expected a run folder with a complete checkpoint", "got 'here'"]),
        (
            ["diff", "run/checkpoints/step-000000005", "there"],
            ["expected a run folder with a complete checkpoint", "got 'run/checkpoints/step-000000005'"],
        ),
    ],
    ids=lambda value: value[-1][:30] if isinstance(value, list) and value else None,
)
def test_one_line_says_it_all(
    arguments: list[str], parts: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = main(arguments)
    captured = capfd.readouterr()
    assert status == 2, captured.err
    (line,) = captured.err.splitlines()
    assert line.startswith("embedtrain: error: ")
    for part in parts:
        assert part in line
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_debug_shows_where_a_mistake_was_found() -> None:
    with pytest.raises(UserError, match=r"did you mean optimizer\.lr"):
        main(["--debug", *TRAIN, "optimizer.learning_rate=1"])


def test_another_configuration_in_the_run_folder_says_which_keys_differ(capfd: pytest.CaptureFixture[str]) -> None:
    small = ["train.epochs=1", "train.words_per_step=64", "train.block_words=32", "log.tensorboard=false"]
    assert main([*TRAIN, *small]) == 0
    capfd.readouterr()
    assert main([*TRAIN, *small, "table.dim=9", "optimizer.lr=0.125"]) == 2
    said = capfd.readouterr().err
    assert "run holds a run with other settings: optimizer.lr (was 0.7, is 0.125); table.dim (was 8, is 9)" in said
    assert "Give the settings that it began with to resume it, or another run.path to start anew" in said


def test_an_optimizer_that_cannot_damp_is_refused_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    adam = ["word2vec.damping=curvature", "optimizer.tables.output.name=adam"]
    assert main([*TRAIN, *adam]) == 2
    assert "word2vec.damping=curvature: optimizer.tables.output.name=adam cannot damp" in capfd.readouterr().err


def test_settings_may_stand_after_options(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--dry-run", "train.words_per_step=1000"]) == 2
    assert "train.words_per_step must be a multiple" in capfd.readouterr().err


def test_settings_may_stand_before_the_file_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "train.words_per_step=1000", "--dry-run", "config.yaml", *TRAIN[2:]]) == 2
    assert "train.words_per_step must be a multiple" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "query"),
    [
        (["king", "-", "man", "+", "woman", "--top", "3"], ("king", "-", "man", "+", "woman")),
        (["--top", "3", "-5", "-", "-0.5", "+", "-.5e3"], ("-5", "-", "-0.5", "+", "-.5e3")),
        (["--top=3", "--", "-man", "--top", "--"], ("-man", "--top", "--")),
        (["a=b", "--top", "3"], ("a=b",)),
    ],
)
def test_words_of_a_query_may_begin_with_a_dash(words: list[str], query: tuple[str, ...]) -> None:
    params = parse(["neighbors", "run", *words]).params
    assert (params["path"], params["query"], params["top"]) == ("run", query, 3)


def test_a_reader_that_has_seen_enough_is_no_failure() -> None:
    program = f"exec {sys.executable} -m embedtrain config show data.path=x | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_of_a_key_that_is_given_twice_the_last_counts_and_that_is_said(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["config", "show", "data.path=x", "seed=3", "seed=4"]) == 0
    assert "seed: 4" in capfd.readouterr().out
    assert "seed is given 2 times; the last value is used: seed=4" in caplog.text
