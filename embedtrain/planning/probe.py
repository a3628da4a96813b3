"""Measures the bandwidths of this machine within seconds, on all ranks at once.

`python -m embedtrain.planning.probe DEVICE` is what `probe_own_ranks` starts: rank 0 prints the bandwidths as JSON.
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
"""Size of the copied memory: more than caches hold."""
EXCHANGE_BYTES = 4 << 20
"""Size of the exchanged rows of each rank. Larger ones would time the allocation of memory as well."""
_DIM = 64
_REPEATS = 10


def probe(runtime: Runtime) -> Bandwidths:
    """Copies memory and exchanges rows. Collective: every rank; each returns the bandwidths of the slowest rank.

    The quickest of ten runs counts, since a plan gives a lower bound of times.
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
    """Returns the least time of some runs that all ranks begin together, on the slowest rank. Collective."""
    found = []
    for _ in range(_REPEATS + 2):
        runtime.ranks.all_reduce(torch.zeros(1))  # no rank returns before all have called
        started_at = time.perf_counter()
        run()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        found.append(time.perf_counter() - started_at)
    # The first runs map memory, one for each of two buffers.
    return max(runtime.ranks.all_gather(min(found[2:])))


def probe_own_ranks(num_ranks: int, device: str) -> Bandwidths:
    """Probes on ranks of its own, at most one per GPU, in a process that torchrun did not start.

    Raises:
        UserError: `device` is unknown or absent.
        JobError: the ranks failed; they say why on stderr.
    """
    runtime = init_distributed(device=device)
    if runtime.device.type == "cuda":
        num_ranks = min(num_ranks, torch.cuda.device_count())
    if num_ranks == 1:
        return probe(runtime)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    # As torchrun would set it, but without a warning.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [*launcher, "-m", __spec__.name, device]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise JobError(f"expected {num_ranks} ranks to probe this machine, but they failed: see above")
    return Bandwidths(**json.loads(done.stdout))


def main() -> None:
    """Probes as one of the ranks that `probe_own_ranks` started."""
    runtime = init_distributed(device=sys.argv[1])
    found = probe(runtime)
    if runtime.rank == 0:
        print(json.dumps(asdict(found)))
    shut_down()


if __name__ == "__main__":
    main()
