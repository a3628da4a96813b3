"""Every fault, counted: `python -m tests.faults --all`; one kind of them: `python -m tests.faults --only kill-self`.

It takes an hour and more. With `--results FILE` each part of it is noted there as it is done, and not done again by the
same command: so it can be done bit by bit, and go on after it was cut off.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from embedtrain.checkpoint import latest_checkpoint
from tests.e2e.conftest import Job
from tests.faults.damage import count_noticed
from tests.faults.harness import Fault, Range
from tests.faults.points import DISK_PHASES, PHASES
from tests.launching import ROOT

NUM_POINTS = 40
BATCH = 10
"""Faults that strike one run, one after another, each after a restart."""

ACTIONS: dict[str, list[tuple[str, str]]] = {
    "kill-self": [("SIGKILL", "self")],
    "kill-peer": [("SIGKILL", "peer")],
    "kill-both": [("SIGKILL", "both")],
    "kill-launcher": [("SIGKILL", "launcher")],
    "sigterm": [("SIGTERM", victim) for victim in ("self", "peer", "launcher")],
    "sigint": [("SIGINT", victim) for victim in ("self", "peer", "launcher")],
    "sigusr1": [("SIGUSR1", victim) for victim in ("self", "peer", "launcher")],
    "disk": [(name, "self") for name in ("ENOSPC", "EACCES", "EIO")],
}
"""Kinds of faults that strike at drawn points: what is done to whom, in turn."""

STEP = "embedtrain.train.trainer:train_step"

Part = Callable[[Range], Counter[str]]
"""Does a part of a kind; returns how many faults of which sort were detected or survived, or raises."""


def strike(runs: Range, kind: str, numbers: range, seed: int) -> Counter[str]:
    """Has faults strike a run at drawn points, a run of deltas in every other part."""
    phases = DISK_PHASES if kind == "disk" else PHASES
    faults = list(runs.draw(numbers, f"{seed} {kind}", ACTIONS[kind], phases))
    with_deltas = ("checkpoint.full_every=4",) if numbers.start // BATCH % 2 else ()
    struck = runs.survive(f"{kind}-{numbers.start}", faults, *with_deltas)
    assert struck.num_struck == len(faults), (kind, struck.num_struck, len(faults))
    phase_of = {point: phase for phase, points in PHASES.items() for point in points}
    return Counter(f"{fault.action} of {fault.victim} while {phase_of[fault.point]}" for fault in faults)


def full(runs: Range) -> Counter[str]:
    """Trains on a disk that is really full, then on one that is not; as root only."""
    folder = runs.folder / "small"
    folder.mkdir()
    with mounted(folder) as is_mounted:
        if not is_mounted:
            print("full: left out, a tmpfs cannot be mounted here")
            return Counter()
        (folder / "filler").write_bytes(bytes(160 * 1024))
        failed = runs.launch("small/run", [], "checkpoint.keep_last=null")
        assert failed.returncode != 0
        # What is known before it is written to is told before: a full disk may be either.
        assert any(said in failed.stderr for said in ("No space left on device", "but the disk has")), failed.stderr
        (folder / "filler").unlink()
        done = runs.launch("small/run", [], "checkpoint.keep_last=1")
        assert done.returncode == 0, done.stderr
        runs.compare("small/run")
    return Counter({"disk of 512 KiB": 1})


def still(runs: Range) -> Counter[str]:
    """Stops a rank for good; torchrun waits 30 seconds before it kills it."""
    faults = [Fault(STEP, 59, 1, "SIGSTOP"), Fault(STEP, 30, 0, "SIGSTOP")]
    struck = runs.survive("still", faults, "run.timeout_seconds=5")
    for rank in (1, 0):
        assert f"rank {rank} did not take part in step" in "".join(struck.errors)
    return Counter({"SIGSTOP": struck.num_struck})


def restart(runs: Range) -> Counter[str]:
    """Has torchrun restart a run twenty times in one launch."""
    struck = runs.survive("restart", [Fault(STEP, 5, attempt % 2) for attempt in range(20)])
    assert (struck.num_struck, struck.num_launches) == (20, 1), struck
    return Counter({"restart in one launch of torchrun": struck.num_struck})


def damage(runs: Range, seed: int) -> Counter[str]:
    """Damages the files of a checkpoint, with those of a second run at hand."""
    done = runs.launch("other", [], "seed=2")
    assert done.returncode == 0, done.stderr
    return count_noticed(Path(runs.latest("whole")), Path(runs.latest("other")), seed)


def object_store(runs: Range) -> Counter[str]:
    """Has the requests to an object store fail, by the tests of that."""
    report = runs.folder / "object_store.xml"
    tests = [str(ROOT / "tests/faults/test_object_store.py"), "-q", f"--junitxml={report}"]
    subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, check=True)
    cases = [case for case in xml.etree.ElementTree.parse(report).iter("testcase") if not list(case)]
    return Counter(f"S3: {case.attrib['name']}" for case in cases)


def elastic(runs: Range) -> Counter[str]:
    """Loses one of two hosts: the other goes on with half the ranks from the newest checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    # The first to come holds the rendezvous; a job whose rendezvous host dies is started again from outside.
    hosts = [start_host(runs, endpoint)]
    wait_for_server(endpoint, hosts[0])
    hosts.append(start_host(runs, endpoint))
    checkpoints = runs.folder / "elastic" / "checkpoints"
    while latest_checkpoint(str(checkpoints)) is None:
        assert hosts[0].poll() is None, hosts[0].communicate()
        time.sleep(0.02)
    hosts[1].kill()
    ends = [host.communicate(timeout=300)[1] for host in hosts]
    assert hosts[0].returncode == 0, ends[0]
    assert any("2 ranks" in errors for errors in ends)
    assert "1 rank," in ends[0] and "resuming at step" in ends[0], ends[0]
    assert '"done"' in (runs.folder / "elastic" / "status.json").read_text()
    return Counter({"host lost": 1})


def wait_for_server(endpoint: str, process: subprocess.Popen[str]) -> None:
    """Waits until a process listens."""
    host, _, port = endpoint.partition(":")
    while True:
        assert process.poll() is None, process.communicate()
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return


def start_host(runs: Range, endpoint: str) -> subprocess.Popen[str]:
    """Starts torchrun as one of at most two hosts, each with one rank."""
    windows = "timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "elastic"]
    launcher += ["--rdzv-conf", windows, "--max-restarts", "3", "-m", "embedtrain"]
    job = Job(runs.folder)
    return subprocess.Popen(
        [*launcher, *job.train_arguments("elastic", "train.epochs=20", "checkpoint.every_steps=20")],
        cwd=runs.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def parts(num_points: int, seed: int) -> dict[str, dict[str, Part]]:
    """Returns the parts of each kind, by name."""
    drawn = {
        kind: {
            f"{first} of {num_points}, seed {seed}": functools.partial(
                strike, kind=kind, numbers=range(first, min(first + BATCH, num_points)), seed=seed
            )
            for first in range(0, num_points, BATCH)
        }
        for kind in ACTIONS
    }
    others: dict[str, Part] = {
        "full": full,
        "still": still,
        "restart": restart,
        "elastic": elastic,
        "damage": functools.partial(damage, seed=seed),
        "object-store": object_store,
    }
    return {**drawn, **{kind: {"all": part} for kind, part in others.items()}}


@contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """Has a disk of 512 KiB stand at `folder` meanwhile, where this machine lets us."""
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=True)


def main() -> int:
    """Does the kinds of faults that were asked for, as far as they are not done."""
    kinds = list(parts(NUM_POINTS, 0))
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every kind")
    parser.add_argument("--only", action="append", choices=kinds, default=[], metavar="KIND", help=", ".join(kinds))
    parser.add_argument("--points", type=int, default=NUM_POINTS, help=f"points of a kind that draws ({NUM_POINTS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="file of JSON lines; what it has is not done again")
    options = parser.parse_args()
    chosen = {
        kind: found
        for kind, found in parts(options.points, options.seed).items()
        if options.all or kind in options.only
    }
    if not chosen:
        parser.error("expected --all or --only KIND")
    with tempfile.TemporaryDirectory(prefix="embedtrain-faults-") as folder:
        results = options.results or Path(folder) / "results"
        counts = do(chosen, Path(folder), results)
    for kind, count in counts.items():
        print(f"{kind}: {count.total()} detected or survived")
        for sort, number in sorted(count.items()):
            print(f"    {number:>5} {sort}")
    print(f"{sum(count.total() for count in counts.values())} faults, 100 % detected or survived")
    return 0


def do(chosen: Mapping[str, Mapping[str, Part]], folder: Path, results: Path) -> dict[str, Counter[str]]:
    """Does the parts that the results do not have; returns the counts of all, by kind."""
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    counts = {(line["kind"], line["part"]): Counter(line["counts"]) for line in lines}
    todo = [(kind, part) for kind, found in chosen.items() for part in found if (kind, part) not in counts]
    runs = Range(folder) if todo else None
    for kind, part in todo:
        assert runs is not None
        began = time.monotonic()
        count = counts[kind, part] = chosen[kind][part](runs)
        line = {"kind": kind, "part": part, "counts": count, "seconds": round(time.monotonic() - began)}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{kind}, {part}: {count.total()} detected or survived, {line['seconds']} s", flush=True)
    found = {kind: [counts[kind, part] for part in chosen[kind]] for kind in chosen}
    return {kind: sum(each, Counter()) for kind, each in found.items()}


if __name__ == "__main__":
    sys.exit(main())
