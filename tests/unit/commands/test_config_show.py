"""`embedtrain config show`."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedtrain.cli import main
from embedtrain.config.resolved import to_yaml
from embedtrain.recipes.loading import load_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_what_is_shown_is_the_configuration_itself(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data.path=[one.txt,'two: three.txt']", "run.path=a # no remark", "optimizer.lr=0.25"]
    assert main(["config", "show", str(ROOT / "configs" / name), *overrides]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert to_yaml(load_config(str(shown), [])) == to_yaml(load_config(str(ROOT / "configs" / name), overrides))


def test_each_value_says_where_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("table: {dim: 8}\noptimizer: {lr: 0.5}\n")
    assert main(["config", "show", str(path), "optimizer.lr=0.25"]) == 0
    remarks = {
        line.split(":")[0].strip(): line.partition("#")[2].strip() for line in capsys.readouterr().out.split("\n")
    }
    assert remarks["dim"] == str(path)
    assert remarks["lr"] == "command line"
    assert remarks["epochs"] == ""
    assert remarks["path"] == "must be given"


def test_the_defaults_of_a_model_need_no_file_and_mistakes_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "model=ranking"]) == 0
    assert "architecture: dcn_v2" in capsys.readouterr().out
    assert main(["config", "show", "optimizer.learning_rate=1"]) == 2
    assert "did you mean optimizer.lr?" in capsys.readouterr().err
    assert main(["config", "show", "train.epochs=0"]) == 2
    assert "train.epochs must be at least 1" in capsys.readouterr().err
