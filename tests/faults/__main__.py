"""Every fault, counted: `python -m tests.faults --all`; one kind of them: `python -m tests.faults --only kill`."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from embedtrain.checkpoint import latest_checkpoint
from tests.e2e.conftest import Job
from tests.faults.damage import count_noticed
from tests.faults.harness import ROOT, Fault, Range

NUM_POINTS = 40

KILLS = [("SIGKILL", victim) for victim in ("self", "peer", "both")]
STOPS = [(action, victim) for action in ("SIGTERM", "SIGINT", "SIGUSR1") for victim in ("self", "peer")]
LAUNCHER = [(action, "launcher") for action in ("SIGKILL", "SIGTERM", "SIGKILL", "SIGINT")]
DISK = [(name, "self") for name in ("ENOSPC", "EACCES", "EIO")]
STEP = "embedtrain.train.trainer:train_step"


def kill(runs: Range, num_points: int, seed: int) -> int:
    """Kills either rank and both, at every point."""
    return sum(
        strike(runs, f"{action}-{victim}", list(runs.draw(num_points, seed, [(action, victim)])))
        for action, victim in KILLS
    )


def stop(runs: Range, num_points: int, seed: int) -> int:
    """Asks a rank to stop."""
    return strike(runs, "stop", list(runs.draw(num_points, seed + 1, STOPS)))


def launcher(runs: Range, num_points: int, seed: int) -> int:
    """Kills the launcher, or asks it to stop."""
    return strike(runs, "launcher", list(runs.draw(num_points, seed + 2, LAUNCHER)))


def disk(runs: Range, num_points: int, seed: int) -> int:
    """Has the disk fail under the run."""
    drawn = list(runs.draw(num_points, seed + 3, DISK))
    touching = [fault for fault in drawn if fault.point.startswith(("embedtrain.checkpoint.storage:", "os:"))]
    return strike(runs, "disk", touching)


def full(runs: Range, num_points: int, seed: int) -> int:
    """Trains on a disk that is really full, then on one that is not; as root only."""
    folder = runs.folder / "small"
    folder.mkdir()
    with mounted(folder) as is_mounted:
        if not is_mounted:
            print("full: left out, a tmpfs cannot be mounted here")
            return 0
        (folder / "filler").write_bytes(bytes(160 * 1024))
        failed = runs.launch("small/run", [], "checkpoint.keep_last=null")
        assert failed.returncode != 0
        assert "No space left on device" in failed.stderr
        (folder / "filler").unlink()
        done = runs.launch("small/run", [], "checkpoint.keep_last=1")
        assert done.returncode == 0, done.stderr
        runs.compare("small/run")
    return 1


def still(runs: Range, num_points: int, seed: int) -> int:
    """Stops a rank for good; torchrun waits 30 seconds before it kills it."""
    faults = [Fault(STEP, 59, 1, "SIGSTOP"), Fault(STEP, 30, 0, "SIGSTOP")]
    struck = runs.survive("still", faults, "run.timeout_seconds=5")
    for rank in (1, 0):
        assert f"rank {rank} did not take part in step" in "".join(struck.errors)
    return struck.num_struck


def restart(runs: Range, num_points: int, seed: int) -> int:
    """Has torchrun restart a run twenty times in one launch."""
    struck = runs.survive("restart", [Fault(STEP, 5, attempt % 2) for attempt in range(20)])
    assert (struck.num_struck, struck.num_launches) == (20, 1), struck
    return struck.num_struck


def damage(runs: Range, num_points: int, seed: int) -> int:
    """Damages the files of a checkpoint, with those of a second run at hand."""
    done = runs.launch("other", [], "seed=2")
    assert done.returncode == 0, done.stderr
    counts = count_noticed(Path(runs.latest("whole")), Path(runs.latest("other")), seed)
    print(f"damage: {dict(counts)}")
    return counts.total()


def elastic(runs: Range, num_points: int, seed: int) -> int:
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
    assert "1 ranks" in ends[0] and "resuming at step" in ends[0], ends[0]
    assert '"done"' in (runs.folder / "elastic" / "status.json").read_text()
    return 1


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


KINDS: dict[str, Callable[[Range, int, int], int]] = {
    each.__name__: each for each in (kill, stop, launcher, disk, full, still, restart, elastic, damage)
}


def strike(runs: Range, name: str, faults: Sequence[Fault]) -> int:
    """Has faults strike and prints how many did; `survive` raises where any was not survived."""
    began = time.monotonic()
    struck = runs.survive(name, faults)
    assert struck.num_struck == len(faults), (name, struck.num_struck, len(faults))
    print(f"{name}: {struck.num_struck} of {len(faults)} survived, {time.monotonic() - began:.0f} s", flush=True)
    return struck.num_struck


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
    """Runs the kinds of faults that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every kind")
    parser.add_argument("--only", action="append", choices=list(KINDS), default=[], metavar="KIND", help=str([*KINDS]))
    parser.add_argument("--points", type=int, default=NUM_POINTS, help=f"points of a kind ({NUM_POINTS})")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = list(KINDS) if options.all else options.only
    if not chosen:
        parser.error("expected --all or --only KIND")
    total = 0
    with tempfile.TemporaryDirectory(prefix="embedtrain-faults-") as folder:
        runs = Range(Path(folder))
        for kind in chosen:
            count = KINDS[kind](runs, options.points, options.seed)
            print(f"{kind}: {count} detected or survived", flush=True)
            total += count
    print(f"{total} faults, 100 % detected or survived")
    return 0


if __name__ == "__main__":
    sys.exit(main())
