"""What the ranks that are left say of a failure."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from embedtrain.distributed.failure import _blame, explain_failure, is_of_the_group
from embedtrain.distributed.runtime import Runtime

GONE = (False, "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer")


@pytest.mark.parametrize(
    ("reports", "world_size", "expected"),
    [
        ({0: GONE}, 2, "rank 1 did not take part in step 7 and does not answer: died, was stopped, or hangs"),
        ({0: GONE, 2: GONE}, 4, "ranks 1, 3 did not take part in step 7 and do not answer"),
        ({0: GONE, 1: (True, "OSError: disk")}, 3, "in step 7 rank 1 failed: OSError: disk"),
        ({1: (True, "a"), 0: (True, "b")}, 2, "in step 7 rank 0 failed: b; rank 1 failed: a"),
        ({0: GONE, 1: GONE}, 2, "in step 7 a collective failed on every rank: RuntimeError: [gloo/"),
    ],
)
def test_the_rank_to_blame_is_named(reports: dict[int, tuple[bool, str]], world_size: int, expected: str) -> None:
    assert _blame(reports, world_size, "step 7", 60.0).startswith(expected)


def test_an_error_of_the_group_is_told_from_the_ranks_own() -> None:
    assert is_of_the_group(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed"))
    assert is_of_the_group(dist.DistNetworkError("reset"))
    assert not is_of_the_group(RuntimeError("CUDA out of memory"))
    assert not is_of_the_group(ValueError("gloo"))


def test_one_process_blames_itself() -> None:
    runtime = Runtime(0, 0, 1, torch.device("cpu"), None)
    failure = explain_failure(OSError("disk"), runtime, "step 3", 60.0)
    assert (failure.text, failure.is_spokesman) == ("in step 3 rank 0 failed: OSError: disk", True)
