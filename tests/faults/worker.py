"""A rank that is `python -m embedtrain` but for the fault that strikes it: `python -m tests.faults.worker ...`.

The environment names a file with the faults, one for each attempt of the launcher, and a file for what happens.
"""

from __future__ import annotations

import collections
import errno
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import psutil

from embedtrain import cli
from embedtrain.checkpoint import find_checkpoints, verify
from embedtrain.distributed.launcher import leave
from tests.faults.points import PHASES, patch

PLAN, LOG = "TEST_FAULTS_PLAN", "TEST_FAULTS_LOG"


class Rank:
    """Counts the moments of this rank and strikes at the one that the plan names."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        with open(os.environ[PLAN]) as file:
            faults = json.load(file)
        fault = faults[self.attempt] if self.attempt < len(faults) else None
        self.fault: dict[str, Any] | None = fault if fault and fault["rank"] == self.rank else None
        self.calls: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()

    def tick(self, point: str) -> None:
        """Counts a moment of `point`; at the planned one the fault strikes, and a failing disk goes on failing."""
        with self.lock:
            self.calls[point] += 1
            number = self.calls[point]
        if self.fault is None or self.fault["point"] != point or number < self.fault["call"]:
            return
        action, victim = self.fault["action"], self.fault["victim"]
        if number == self.fault["call"]:
            log(
                kind="struck", attempt=self.attempt, calls=self.fault["call"], point=point, action=action, victim=victim
            )
        if hasattr(errno, action):
            code = getattr(errno, action)
            raise OSError(code, os.strerror(code))
        if number == self.fault["call"]:
            for pid in victims(victim, self.rank):
                os.kill(pid, getattr(signal, action))
            if action == "SIGKILL" and victim == "launcher":
                # The kernel kills this rank with its launcher; nothing of the run may follow in between.
                time.sleep(30)


def victims(victim: str, own_rank: int) -> list[int]:
    """Returns the process ids of "self", "peer", "both" (this rank last) or "launcher"."""
    if victim == "launcher":
        return [os.getppid()]
    peers = []
    for process in psutil.Process(os.getppid()).children():
        # Ranks lead sessions of their own, what else torchrun may have started does not.
        if process.pid != os.getpid() and os.getsid(process.pid) == process.pid:
            peers.append(process.pid)
    return {"self": [os.getpid()], "peer": peers, "both": [*peers, os.getpid()]}[victim]


def log(**event: object) -> None:
    """Appends an event in one write, so that ranks do not mix and nothing is lost with a killed rank."""
    descriptor = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, json.dumps({**event, "at": time.time()}).encode() + b"\n")
    os.close(descriptor)


def survey(arguments: list[str], attempt: int) -> None:
    """Notes which complete checkpoints a reader finds before the run goes on, each verified."""
    run_path = next(each.partition("=")[2] for each in arguments if each.startswith("run.path="))
    found = find_checkpoints(f"{run_path}/checkpoints")
    for checkpoint in found:
        verify(checkpoint.path)
    log(kind="found", attempt=attempt, steps=[checkpoint.step for checkpoint in found])


def main() -> int:
    """Runs the command line with faults."""
    rank = Rank()
    if rank.rank == 0:
        survey(sys.argv[1:], rank.attempt)
    for points in PHASES.values():
        for point in points:
            patch(point, rank.tick)
    try:
        return cli.main(sys.argv[1:])
    finally:
        log(kind="calls", rank=rank.rank, calls=rank.calls)


if __name__ == "__main__":
    leave(main())
