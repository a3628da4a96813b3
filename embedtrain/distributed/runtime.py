"""Joins and leaves a torchrun job: rank, device and process group of this process."""

from __future__ import annotations

import atexit
import copyreg
import ctypes
import importlib
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from embedtrain.distributed.ranks import GroupRanks, OneProcess, Ranks
from embedtrain.distributed.shared_memory import SharedMemoryRanks, ranks_of
from embedtrain.errors import JobError, UserError

DEFAULT_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Runtime:
    """Describes this process's place in its job.

    Attributes:
        ranks: the ranks of the job; after `shut_down` they can no longer communicate.
        local_rank: index among the processes of this host.
        device: device of this rank's shards and computation.
        store: the job's key-value store, which outlives a failed collective; None without torchrun.
    """

    ranks: Ranks
    local_rank: int
    device: torch.device
    store: dist.Store | None = None

    @property
    def rank(self) -> int:
        """Index among all processes of the job; 0 without torchrun."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Number of processes of the job."""
        return self.ranks.size


def init_distributed(*, device: str = "auto", timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Runtime:
    """Joins the job that torchrun describes in the environment; without torchrun, a job of one process.

    Collective: every rank of the job.

    Args:
        device: "cpu" (Gloo), "cuda" (NCCL, one GPU per rank), or "auto": CUDA if it is available.
        timeout_seconds: timeout of collectives, after which the job fails.

    Raises:
        UserError: `device` is unknown; CUDA is requested but not available, or there are too few GPUs; the environment
            does not describe a job; or the job's port is in use.
        JobError: the ranks did not find one another in time.
    """
    local_rank = _check_environment()
    chosen = _choose_device(device, local_rank)
    if "RANK" not in os.environ:
        return Runtime(OneProcess(), 0, chosen)
    _die_with_launcher()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # Torch's watchdog would abort the process without an explanation. Instead the host waits with a timeout (see
        # `embedtrain.ops._backend.transfer.wait_for`) and then reports the rank at fault.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    # The functions of this module bind the job's group as a default argument at import. torch's optimizers import it;
    # imported after the group exists, it would keep the group alive until the process ends (see `GroupRanks`).
    importlib.import_module("torch.distributed.nn")
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = _rendezvous(timeout)
    # Restarted ranks get the store of the failed attempt and would read the addresses of dead peers from it. The
    # launcher's restart count does not identify attempts: each host counts for itself, and joining hosts do not count.
    try:
        attempt = agree_on_attempt(store, rank, world_size, timeout_seconds)
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"embedtrain/attempt-{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=chosen if chosen.type == "cuda" else None,
        )
        ranks = job_ranks()
        if chosen.type == "cuda":
            # The first collective creates a communicator, which takes seconds: do it here instead of within a step.
            for each in (ranks, ranks.beside()):
                each.all_reduce(torch.zeros(1, device=chosen))
    except (RuntimeError, TimeoutError) as error:
        raise JobError(
            f"rank {rank} on {socket.gethostname()} did not find the other ranks of the {world_size}: "
            f"{' '.join(str(error).split())}"
        ) from error
    atexit.register(shut_down)
    return Runtime(ranks, local_rank, chosen, dist.PrefixStore(attempt, store))


def _check_environment() -> int:
    """Checks the environment variables of a launcher and returns the local rank.

    Raises:
        UserError: a variable is missing or is not a number.
    """
    if "RANK" in os.environ:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"expected {', '.join(missing)} in the environment beside RANK={os.environ['RANK']}: start with "
                "torchrun, which sets all of them, or unset RANK for one process"
            )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"expected a whole number in the environment's {name}, got {os.environ[name]!r}")
    return int(os.environ.get("LOCAL_RANK", "0"))


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Returns the job's store, the rank and the world size."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        found: tuple[dist.Store, int, int] = next(iter(dist.rendezvous("env://", timeout=timeout)))
        return found
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"expected port {os.environ['MASTER_PORT']} of {socket.gethostname()} free for the job's store, but "
                "another program listens there: give another MASTER_PORT, or start with torchrun --standalone, which "
                "finds one"
            ) from error
        raise JobError(
            f"rank {os.environ['RANK']} on {socket.gethostname()} did not reach the job's store at {address} within "
            f"{timeout.total_seconds():g} seconds (run.timeout_seconds): is rank 0 there, and the port open? "
            f"{' '.join(str(error).split())}"
        ) from error


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """Returns a random word that the ranks of this attempt share, unlike any earlier attempt on the same store.

    Each rank posts a random hello and waits for the answer to exactly this hello, which an earlier attempt cannot have
    left. Rank 0 answers every hello, also of dead ranks, until all ranks have acknowledged.

    Collective: every rank of the job.

    Raises:
        TimeoutError: a rank did not respond in time.
    """
    prefix = "embedtrain/attempts"
    own = secrets.token_hex(8)
    store.set(f"{prefix}/hello-{rank}", own)
    deadline = time.monotonic() + timeout_seconds
    if rank != 0:
        answer = f"{prefix}/answer-{rank}-{own}"
        store.wait([answer], timedelta(seconds=timeout_seconds))
        attempt = bytes(store.get(answer)).decode()
        store.set(f"{prefix}/come-{rank}-{attempt}", "")
        return attempt
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"{prefix}/hello-{other}"]):
                word = bytes(store.get(f"{prefix}/hello-{other}")).decode()
                store.set(f"{prefix}/answer-{other}-{word}", own)
        missing -= {other for other in missing if store.check([f"{prefix}/come-{other}-{own}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(f"these of {world_size} ranks did not join in {timeout_seconds:g} s: {sorted(missing)}")
        time.sleep(0.005)
    return own


def shut_down() -> None:
    """Leaves the job; no-op if none was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def job_ranks() -> Ranks:
    """Returns the ranks of the job, or one process if this process joined none. Collective: every rank of the job."""
    return ranks_of(dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)


def _rejoin(rank: int, size: int) -> Ranks:
    ranks = job_ranks()
    if (ranks.rank, ranks.size) != (rank, size):
        raise RuntimeError(
            f"these tables were pickled by rank {rank} of {size}, and this is rank {ranks.rank} of {ranks.size}: a "
            "pickle holds the rows of one rank. Use a checkpoint, which loads on any number of ranks"
        )
    return ranks


def _reduce(ranks: GroupRanks) -> tuple[Callable[[int, int], Ranks], tuple[int, int]]:
    return _rejoin, (ranks.rank, ranks.size)


# Unpickled ranks belong to the current job.
copyreg.pickle(GroupRanks, _reduce)  # type: ignore[arg-type]
copyreg.pickle(SharedMemoryRanks, _reduce)  # type: ignore[arg-type]


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this host has {torch.cuda.device_count()}; "
            "start fewer ranks per host, or use device=cpu"
        )
    return torch.device("cuda", local_rank)


def _die_with_launcher() -> None:
    """Makes the kernel kill this rank when torchrun dies; otherwise it would continue to save checkpoints."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
