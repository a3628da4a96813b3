"""Two hosts with a link between them: network namespaces joined by a veth pair."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Job

TIMEOUT_SECONDS = 12
"""run.timeout_seconds: how long a rank waits for one that it cannot reach."""


@dataclass(frozen=True)
class Host:
    """A network namespace with one end of the link."""

    namespace: str
    device: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *arguments]


@dataclass(frozen=True)
class Link:
    """The hosts and what joins them."""

    first: Host
    second: Host

    def set(self, state: str) -> None:
        for host in (self.first, self.second):
            run(*host.command("ip", "link", "set", host.device, state))


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def link() -> Iterator[Link]:
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip, of iproute2")
    tag = f"et{os.getpid() % 10**5}"
    hosts = [Host(f"{tag}{end}", f"{tag}{end}", f"10.213.7.{number}") for number, end in ((1, "a"), (2, "b"))]
    made: list[str] = []
    try:
        for host in hosts:
            try:
                run("ip", "netns", "add", host.namespace)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
            made.append(host.namespace)
        run(*hosts[0].command("ip", "link", "add", hosts[0].device, "type", "veth", "peer", "name", hosts[1].device))
        run(*hosts[0].command("ip", "link", "set", hosts[1].device, "netns", hosts[1].namespace))
        for host in hosts:
            run(*host.command("ip", "addr", "add", f"{host.address}/24", "dev", host.device))
            run(*host.command("ip", "link", "set", "lo", "up"))
        link = Link(hosts[0], hosts[1])
        link.set("up")
        yield link
    finally:
        for namespace in made:
            run("ip", "netns", "delete", namespace)


def start(job: Job, host: Host, endpoint: Host, *overrides: str) -> subprocess.Popen[str]:
    """Starts a host's part of the job, as docs/launching.md says, with one rank."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{endpoint.address}:29431", "--rdzv-id", "two-hosts"]
    torchrun += ["--local-addr", host.address, "--rdzv-conf", f"is_host={int(host is endpoint)},join_timeout=60"]
    torchrun += ["-m", "embedtrain", *job.train_arguments("run", *overrides)]
    return subprocess.Popen(
        host.command(*torchrun),
        cwd=job.folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": host.device,
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        stdout=subprocess.DEVNULL,
        stderr=log_of(job, host).open("w"),
        start_new_session=True,
        text=True,
    )


def log_of(job: Job, host: Host) -> Path:
    return job.folder / f"{host.namespace}.log"


def wait_for(condition: Callable[[], bool], within_seconds: float, said: Callable[[], str]) -> None:
    deadline = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {within_seconds:g} seconds:\n{said()}"
        time.sleep(0.05)


@pytest.mark.serial
@pytest.mark.slow
def test_a_cut_link_stops_every_rank_with_a_reason_and_the_run_resumes_once_it_is_back(job: Job, link: Link) -> None:
    expected = job.run(*job.train_arguments("whole"), ranks=2)
    assert expected.returncode == 0, expected.stderr
    hosts = (link.first, link.second)
    settings = [f"run.timeout_seconds={TIMEOUT_SECONDS}", "checkpoint.every_steps=40"]
    checkpoints = job.folder / "run" / "checkpoints"

    def logs() -> list[str]:
        return [log_of(job, host).read_text() for host in hosts]

    launchers = [start(job, host, link.first, *settings) for host in hosts]
    try:
        wait_for(lambda: bool(list(checkpoints.glob("step-*/manifest.json"))), 60, lambda: "\n".join(logs()))
        link.set("down")
        reasons = [f"rank {other} did not take part in step" for other in (1, 0)]
        wait_for(
            lambda: all(reason in log for reason, log in zip(reasons, logs(), strict=True)),
            TIMEOUT_SECONDS * 3,
            lambda: "\n".join(logs()),
        )
        # The ranks are gone. The second host's launcher waits for the first's, as torchrun does, until it can ask it.
        link.set("up")
        for launcher in launchers:
            assert launcher.wait(60) != 0

        launchers = [start(job, host, link.first, *settings) for host in hosts]
        assert [launcher.wait(120) for launcher in launchers] == [0, 0], logs()
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
    assert "resuming at step" in "".join(logs())
    assert np.array_equal(job.vectors("run"), job.vectors("whole"))
