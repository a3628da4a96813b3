"""The script by which a shell completes commands, options and settings."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from embedtrain.cli import main


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", "bash"]) == 0
    path = tmp_path / "completion.bash"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("in", {"inspect"}),
        ("train --pro", {"--profile"}),
        ("train config.yaml optimizer.initial", {"optimizer.initial_accumulator_value"}),
        ("export run --format word2vec-", {"word2vec-binary"}),
        ("config s", {"show"}),
        ("inspect ru", {"runs"}),
    ],
)
def test_bash_completes(script: Path, tmp_path: Path, typed: str, expected: set[str]) -> None:
    if (bash := shutil.which("bash")) is None:
        pytest.skip("needs bash")
    (tmp_path / "runs").mkdir()
    words = f"COMP_WORDS=(embedtrain {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))"
    program = f'source {script}; {words}; _shtab_embedtrain; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run([bash, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


def test_the_script_for_zsh_knows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#compdef embedtrain")
    assert "recommend" in printed and "optimizer.lr" in printed
