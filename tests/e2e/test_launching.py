"""The commands of the launch files are ones that torchrun and embedtrain understand."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from embedtrain.recipes.loading import load_config

ROOT = Path(__file__).parents[2]


def commands_of_compose() -> list[list[str]]:
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    program, script, path = services.pop("text")["command"]
    assert program == "python"
    assert (ROOT / script).exists()
    assert len(services) == 2
    for node in services.values():
        assert node["depends_on"]["text"]["condition"] == "service_completed_successfully"
        assert load_config("configs/quickstart.yaml", []).data.path == path
    return [node["command"] for node in services.values()]


def commands_of_kubernetes() -> list[list[str]]:
    service, job = yaml.safe_load_all((ROOT / "scripts/launch/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29500" in command
    assert f"--nnodes={job['spec']['completions']}" in command
    return [command]


def commands_of_docs() -> list[list[str]]:
    text = (ROOT / "docs/launching.md").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^torchrun .*$", text, re.MULTILINE)]


@pytest.mark.parametrize("read", [commands_of_compose, commands_of_kubernetes, commands_of_docs])
def test_the_commands_are_understood(read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = read()
    assert commands
    for torchrun, *arguments in commands:
        assert torchrun == "torchrun"
        parsed = get_args_parser().parse_args(arguments)
        assert parsed.module
        assert parsed.training_script == "embedtrain"
        verb, config, *overrides = parsed.training_script_args
        assert verb == "train"
        assert load_config(config, overrides).run.path


@pytest.mark.parametrize("state", ["preempted", "failed"])
def test_a_slurm_job_whose_time_is_over_is_queued_again(tmp_path: Path, state: str) -> None:
    """Runs the script with programs of Slurm that write down how they were called."""
    calls, run = tmp_path / "calls", tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text(f'{{"state": "{state}", "exit_status": 75}}\n')
    programs = {
        "scontrol": f'echo "scontrol $*" >>{calls}; [[ $1 != show ]] || printf "node7\\nnode8\\n"',
        "srun": f'echo "srun $*" >>{calls}; echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >{tmp_path}/timeout; exit 1',
    }
    for name, body in programs.items():
        program = tmp_path / name
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/launch/slurm.sbatch"), str(run), "word2vec", "data.path=x.txt"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
        },
        check=False,
    )
    assert done.returncode == 1
    shown, started, *requeued = calls.read_text().splitlines()
    assert shown == "scontrol show hostnames node[7-8]"
    parsed = get_args_parser().parse_args(shlex.split(started)[2:])
    assert (parsed.nnodes, parsed.rdzv_endpoint, parsed.rdzv_id) == ("2", "node7:29500", "42")
    assert "SIGUSR1" in parsed.signals_to_handle
    assert 30 < int((tmp_path / "timeout").read_text()) < 120, "time to save, and less than the warning's"
    assert parsed.training_script_args == ["train", "word2vec", "data.path=x.txt", f"run.path={run}"]
    assert requeued == (["scontrol requeue 42"] if state == "preempted" else [])
