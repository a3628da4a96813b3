"""Runs that are struck by faults and started again, and the comparison with the run that was left alone."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from tests import launching
from tests.e2e.conftest import make_job
from tests.faults.points import PHASES
from tests.faults.worker import LOG, PLAN
from tests.launching import Process

SETTINGS = ("train.epochs=2", "checkpoint.every_steps=20", "checkpoint.keep_last=2", "run.timeout_seconds=60")
TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class Fault:
    """What strikes whom, and when: at the n-th moment of a function in one rank.

    Attributes:
        point: "module:function", of `PHASES`.
        call: which of its moments, from 1 on.
        rank: the rank whose moments count.
        action: a signal, or the name of the OSError that every further call then raises.
        victim: whom the signal goes to: "self", "peer", "both", "launcher".
    """

    point: str
    call: int
    rank: int
    action: str = "SIGKILL"
    victim: str = "self"


@dataclass
class Struck:
    """A run under faults.

    Attributes:
        num_struck: faults that took place.
        num_launches: how often the launcher was started.
        errors: what the launches wrote to standard error.
    """

    num_struck: int = 0
    num_launches: int = 0
    errors: list[str] = field(default_factory=list)


class Range:
    """A folder with a text, one undisturbed run and runs that are struck.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_job(folder)
        done = self.launch("whole", [])
        assert done.returncode == 0, done.stderr
        self.calls = {event["rank"]: event["calls"] for event in self.events("whole") if event["kind"] == "calls"}

    def command(self, run: str, max_restarts: int, *overrides: str) -> list[str]:
        """Returns the command of a training on 2 ranks."""
        options = ["--max-restarts", str(max_restarts), "--monitor-interval", "0.05"]
        options += ["--shutdown-timeout", "5", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
        paths = [f"data.path={self.folder}/corpus.txt", f"data.cache_path={self.folder}/cache"]
        worker = ["-m", "tests.faults.worker", "train", "config.yaml", f"run.path={self.folder / run}"]
        return [*launching.torchrun(2, *options), *worker, *paths, *SETTINGS, *overrides]

    def start(self, run: str, faults: Sequence[Fault], *overrides: str) -> Process:
        """Starts a training that restarts by itself, each attempt with the next fault, the last with none."""
        plan = self.folder / f"{run}.plan.json"
        plan.write_text(json.dumps([asdict(fault) for fault in faults]))
        environment = {PLAN: str(plan), LOG: str(self.folder / f"{run}.log")}
        return launching.start(self.command(run, len(faults), *overrides), cwd=self.folder, environment=environment)

    def launch(self, run: str, faults: Sequence[Fault], *overrides: str) -> subprocess.CompletedProcess[str]:
        """Starts a training and waits for its end."""
        try:
            return launching.finish(self.start(run, faults, *overrides), TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as slow:
            raise AssertionError(f"{run} did not end within {TIMEOUT_SECONDS} s: {slow.stderr}") from None

    def events(self, run: str) -> list[dict]:
        """Returns what the ranks noted of themselves."""
        log = self.folder / f"{run}.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def survive(self, run: str, faults: Sequence[Fault], *overrides: str) -> Struck:
        """Has every fault strike a run, started again each time, until it is complete; then compares it.

        A launcher that dies is started again by us, ranks that die by the launcher. Where a run is complete
        before all faults struck, the rest strikes another one.

        Raises:
            AssertionError: a run ended other than the undisturbed one, or a checkpoint was lost.
        """
        struck = Struck()
        pending = list(faults)
        num_idle = 0
        for part in itertools.count():
            name = f"{run}-{part}"
            left = self._until_complete(name, pending, struck, overrides)
            self.compare(name)
            if not left:
                return struck
            # How often rows are copied on write depends on how fast the disk is: a moment may not come in each run.
            num_idle = num_idle + 1 if len(left) == len(pending) else 0
            assert num_idle < 3, f"{left[0]} never struck"
            pending = left
        raise AssertionError("counting does not end")

    def _until_complete(self, name: str, pending: list[Fault], struck: Struck, overrides: Sequence[str]) -> list[Fault]:
        """Launches a run until it ends well; returns the faults that did not strike by then."""
        for _ in range(len(pending) + 2):
            seen = sum(event["kind"] == "struck" for event in self.events(name))
            # A launcher that is to die has its launch to itself: what follows strikes the next one.
            launchers = [index for index, fault in enumerate(pending) if fault.victim == "launcher"]
            batch = pending[: launchers[0] + 1] if launchers else pending
            done = self.launch(name, batch, *overrides)
            struck.num_launches += 1
            struck.errors.append(done.stderr)
            num_new = sum(event["kind"] == "struck" for event in self.events(name)) - seen
            struck.num_struck += num_new
            pending = pending[num_new:]
            if done.returncode == 0:
                return pending
            assert num_new or not batch, f"{name} failed without a fault: {done.stderr}"
        raise AssertionError(f"{name} does not come to its end: {struck.errors[-1]}")

    def compare(self, run: str) -> None:
        """Asserts that a run ended as the undisturbed one, and that no checkpoint was lost on the way.

        Raises:
            AssertionError: a row or an accumulator differs in a bit, or an older checkpoint came back.
        """
        with CheckpointReader(self.latest("whole")) as whole, CheckpointReader(self.latest(run)) as other:
            assert other.step == whole.step
            assert other.tensors.keys() == whole.tensors.keys()
            assert {name.rpartition("/")[2] for name in whole.tensors} == {"weight", "accumulator"}
            for name, info in whole.tensors.items():
                expected, found = (each.read(name, 0, info.shape[0]) for each in (whole, other))
                assert torch.equal(expected.view(torch.uint8), found.view(torch.uint8)), f"{run}: {name} differs"
        newest = [max(event["steps"], default=0) for event in self.events(run) if event["kind"] == "found"]
        assert newest == sorted(newest), f"{run}: a checkpoint was lost: {newest}"

    def latest(self, run: str) -> str:
        """Returns the newest checkpoint of a run."""
        found = latest_checkpoint(f"{self.folder / run}/checkpoints")
        assert found is not None, f"{run} has no checkpoint"
        return found

    def draw(
        self,
        numbers: range,
        seed: str,
        actions: Sequence[tuple[str, str]],
        phases: Mapping[str, tuple[str, ...]] = PHASES,
    ) -> Iterator[Fault]:
        """Draws faults spread over the phases, and within each over its functions, ranks and moments.

        Args:
            numbers: of the faults; each is a function of its own and of the seed.
            seed: of the draws.
            actions: action and victim of each fault, taken in turn.
            phases: from which the points are taken, in turn.
        """
        for number in numbers:
            generator = random.Random(f"{seed} {number}")
            phase = list(phases)[number % len(phases)]
            choices = [
                (point, rank)
                for point in phases[phase]
                for rank, calls in sorted(self.calls.items())
                if calls.get(point)
            ]
            point, rank = generator.choice(choices)
            # Within the first third: an attempt that resumes late has fewer moments than the whole run.
            call = generator.randint(1, max(1, self.calls[rank][point] // 3))
            action, victim = actions[number // len(phases) % len(actions)]
            yield Fault(point, call, rank, action, victim)
