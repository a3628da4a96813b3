"""Shells complete commands, options, settings, files and folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from embedtrain.cli import main
from embedtrain.commands import completion
from embedtrain.commands.completion import SettingsInBash, SettingsInFish, SettingsInZsh
from embedtrain.commands.console import Setting
from embedtrain.recipes.loading import setting_keys
from tests.unit.commands.parsing import parse

PROGRAMS = Path(sys.executable).parent
CASES = [
    ("ins", {"inspect"}),
    ("train --pro", {"--profile"}),
    ("train con", {"config.yaml"}),
    ("train config.yaml optimizer.initial", {"optimizer.initial_accumulator_value="}),
    ("train optimizer.initial", {"optimizer.initial_accumulator_value="}),
    ("train schedule.name=inv", {"schedule.name=inverse_sqrt"}),
    ("train --dry-run config.yaml schedule.name=inv", {"schedule.name=inverse_sqrt"}),
    ("train config.yaml data.path=cor", {"data.path=corpus.txt"}),
    ("export run --format word2vec-", {"word2vec-binary"}),
    ("config s", {"show"}),
    ("inspect ru", {"runs/"}),
]


@pytest.fixture
def script(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    if not (PROGRAMS / "embedtrain").exists():
        pytest.skip("the shell calls the installed program")
    if shutil.which(request.param) is None:
        pytest.skip(f"needs {request.param}")
    assert main(["completion", request.param]) == 0
    path = tmp_path / "completion"
    path.write_text(capsys.readouterr().out)
    (tmp_path / "runs").mkdir()
    (tmp_path / "config.yaml").touch()
    (tmp_path / "corpus.txt").touch()
    return path


def run(command: list[str], folder: Path) -> list[str]:
    environment = {**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def quick(*in_the_ordinary_run: int) -> list[object]:
    """Returns the cases, but for those numbers as slow tests: each starts a process, and most import torch."""
    return [
        case if number in in_the_ordinary_run else pytest.param(*case, marks=pytest.mark.slow)
        for number, case in enumerate(CASES)
    ]


@pytest.mark.parametrize("script", ["bash"], indirect=True)
@pytest.mark.parametrize(("typed", "expected"), quick(0, 4))
def test_bash_completes(script: Path, tmp_path: Path, typed: str, expected: set[str]) -> None:
    words = typed.replace("=", " = ") if "=" in typed.split()[-1] else typed  # as bash parts them
    # compopt works within a completion only; what it is told shows what bash would do by itself.
    program = f"""
source {script}
compopt() {{ printf "compopt %s %s\\n" "$1" "$2"; }}
COMP_WORDS=(embedtrain {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_embedtrain_completion embedtrain
printf "%s\\n" "${{COMPREPLY[@]}}"
"""
    shown = {line for line in run(["bash", "-c", program], tmp_path) if line}
    (completed,) = expected
    if completed in ("config.yaml", "data.path=corpus.txt"):
        assert shown == {"compopt -o default"}
    elif completed == "runs/":
        assert shown == {"compopt -o dirnames"}
    elif completed.endswith("="):
        assert shown == {"compopt -o nospace", completed}
    else:
        assert shown == {completed.rpartition("=")[2]}


# What is completed is shared by the shells: one case of a setting and one of an option show that fish asks for it.
@pytest.mark.parametrize("script", ["fish"], indirect=True)
@pytest.mark.parametrize(("typed", "expected"), quick(1, 5))
def test_fish_completes(script: Path, tmp_path: Path, typed: str, expected: set[str]) -> None:
    program = f"source {script}; complete -C 'embedtrain {typed}'"
    shown = run(["fish", "--no-config", "-c", program], tmp_path)
    assert {line.partition("\t")[0] for line in shown} == expected


@pytest.mark.parametrize("script", ["zsh"], indirect=True)
def test_zsh_reads_the_script(script: Path, tmp_path: Path) -> None:
    run(["zsh", "-n", str(script)], tmp_path)
    asked = (
        "COMP_WORDS='embedtrain train c optimizer.initial' COMP_CWORD=3 _EMBEDTRAIN_COMPLETE=zsh_complete embedtrain"
    )
    shown = run(["zsh", "-fc", f"env {asked}"], tmp_path)
    assert shown == ["plain", "optimizer.initial_accumulator_value=", "_"]


def test_what_we_add_to_clicks_scripts_is_in_them() -> None:
    for own in (SettingsInBash, SettingsInFish, SettingsInZsh):
        assert own.source_template != own.__base__.source_template  # type: ignore[union-attr]
    assert "compset -P" in SettingsInZsh.source_template and "-S ''" in SettingsInZsh.source_template


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("table.wire_dtype=", ["float32", "bfloat16", "null"]),
        ("log.tensorboard=", ["true", "false"]),
        ("optimizer.name=rowwise_ad", ["rowwise_adagrad", "rowwise_adam"]),
        ("model=r", ["retrieval", "ranking"]),
    ],
)
def test_values_complete_if_they_are_few(typed: str, expected: list[str]) -> None:
    context = parse(["train", "config.yaml"])
    param = next(each for each in context.command.params if isinstance(each.type, Setting))
    key = typed.partition("=")[0]
    assert [each.value for each in Setting().shell_complete(context, param, typed)] == [f"{key}={v}" for v in expected]
    assert isinstance(param, click.Argument)


@pytest.mark.parametrize("typed", ["con", "config.y", "./config.y", "data", "runs/a=b.c"])
def test_a_file_completes_where_no_setting_is_meant(typed: str) -> None:
    context = parse(["train", "config.yaml"])
    param = context.command.params[0]
    assert [each.type for each in param.type.shell_complete(context, param, typed)] == ["file"]


def test_a_script_that_click_has_changed_is_noticed() -> None:
    with pytest.raises(AssertionError, match="expected 'old' in click's script"):
        completion._edited("something else", ("old", "new"))


def test_every_key_completes() -> None:
    context = parse(["train", "config.yaml"])
    found = [each.value for each in Setting().shell_complete(context, context.command.params[1], "")]
    assert found == [f"{key}=" for key in setting_keys()]
