"""Measuring the bandwidths of this machine in a few seconds, on all ranks at once.

`probe_own_ranks` starts `python -m embedtrain.planning.probe DEVICE`, whose rank 0 prints the bandwidths as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from embedtrain.distributed.runtime import Runtime, init_distributed, shut_down
from embedtrain.errors import JobError
from embedtrain.planning.plan import Bandwidths

COPY_BYTES = 256 << 20
"""Size of the copied memory, larger than CPU caches."""
EXCHANGE_BYTES = 4 << 20
"""Size of the exchanged rows per rank. With larger ones the time would include memory allocation."""
_DIM = 64
_REPEATS = 10


def probe(runtime: Runtime) -> Bandwidths:
    """Measures memory copies and exchanges; returns on every rank the bandwidths of the slowest rank.

    The fastest of ten runs counts, because a plan gives lower bounds of times.

    Collective: every rank.
    """
    source = torch.ones(COPY_BYTES // 4, device=runtime.device)
    target = torch.zeros_like(source)
    memory = 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), runtime)
    if runtime.world_size == 1:
        return Bandwidths(memory)
    counts = [EXCHANGE_BYTES // (4 * _DIM) // runtime.world_size] * runtime.world_size
    rows = torch.ones(sum(counts), _DIM, device=runtime.device)
    sent_bytes = rows.nbytes - rows.nbytes // runtime.world_size
    seconds = _least_seconds(lambda: runtime.ranks.all_to_all(rows, counts, counts), runtime)
    return Bandwidths(memory, sent_bytes / seconds)


def _least_seconds(run: Callable[[], object], runtime: Runtime) -> float:
    """Returns the minimum time of several runs on the slowest rank. Collective: every rank."""
    found = []
    for _ in range(_REPEATS + 2):
        runtime.ranks.all_reduce(torch.zeros(1))  # A barrier: all ranks start together.
        started_at = time.perf_counter()
        run()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        found.append(time.perf_counter() - started_at)
    # The first two runs allocate the memory of two buffers.
    return max(runtime.ranks.all_gather(min(found[2:])))


def probe_own_ranks(num_ranks: int, device: str) -> Bandwidths:
    """Starts ranks to probe on, at most one per GPU; for a process that torchrun did not start.

    Raises:
        UserError: `device` is unknown or not available.
        JobError: the ranks failed; they print the reason to stderr.
    """
    runtime = init_distributed(device=device)
    if runtime.device.type == "cuda":
        num_ranks = min(num_ranks, torch.cuda.device_count())
    if num_ranks == 1:
        return probe(runtime)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    # torchrun would set this too, with a warning.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [*launcher, "-m", __spec__.name, device]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise JobError(f"the {num_ranks} ranks that measure this machine failed: see their errors above")
    return Bandwidths(**json.loads(done.stdout))


def main() -> None:
    """Runs one of the ranks that `probe_own_ranks` starts."""
    runtime = init_distributed(device=sys.argv[1])
    found = probe(runtime)
    if runtime.rank == 0:
        print(json.dumps(asdict(found)))
    shut_down()


if __name__ == "__main__":
    main()
