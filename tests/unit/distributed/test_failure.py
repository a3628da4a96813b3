"""What the ranks that are left say of a failure."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from embedtrain.distributed.beacon import Beacon, read_beacon
from embedtrain.distributed.failure import (
    Report,
    _blame,
    _ranges,
    explain_failure,
    is_of_the_group,
)
from embedtrain.distributed.launcher import tell_launcher
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.distributed.stages import begin, stage, whereabouts
from embedtrain.testing.threads import thread_ranks

GONE = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer"
WAITED = Report("a", "step 7, forward > exchange", GONE)
ABSENT = "did not take part in step 7 and"


@pytest.mark.parametrize(
    ("reports", "world_size", "parts"),
    [
        ({0: WAITED}, 2, [f"rank 1 {ABSENT} does not answer: died, was stopped, or hangs", "60"]),
        ({0: WAITED, 2: WAITED}, 4, [f"ranks 1, 3 {ABSENT} do not answer", "ranks 0, 2 on a in step 7, forward"]),
        (
            {0: WAITED, 1: Report("b", "step 6, sample"), 2: WAITED, 3: WAITED},
            4,
            [
                f"rank 1 {ABSENT} does not answer",
                "Last seen: ranks 0, 2, 3 on a in step 7, forward > exchange; rank 1 on b in step 6, sample",
            ],
        ),
        (
            {0: WAITED, 1: Report("b", "step 7, backward", "OSError: disk", is_fault=True)},
            3,
            ["rank 1 on b failed in step 7, backward: OSError: disk"],
        ),
        (
            {rank: Report("a", "step 7", text, is_fault=True) for rank, text in ((1, "x"), (0, "y"))},
            2,
            ["rank 0 on a failed in step 7: y; rank 1 on a failed in step 7: x"],
        ),
        ({0: WAITED, 1: WAITED}, 2, [f"in step 7 a collective failed on every rank: {GONE}", "ranks 0, 1 on a"]),
    ],
)
def test_the_rank_to_blame_is_named(reports: dict[int, Report], world_size: int, parts: list[str]) -> None:
    said = _blame(reports, world_size, "step 7", 60.0)
    assert said.startswith(parts[0])
    for part in parts[1:]:
        assert part in said


def test_many_ranks_are_named_in_ranges() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7, 8"


def test_an_error_of_the_group_is_told_from_the_ranks_own() -> None:
    assert is_of_the_group(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed"))
    assert is_of_the_group(dist.DistNetworkError("reset"))
    assert not is_of_the_group(RuntimeError("CUDA out of memory"))
    assert not is_of_the_group(ValueError("gloo"))


def test_one_process_blames_itself() -> None:
    runtime = Runtime(ONE_PROCESS, 0, torch.device("cpu"))
    begin("step 3")
    with suppress(OSError), stage("forward"), stage("exchange"):
        raise OSError("disk")
    failure = explain_failure(OSError("disk"), runtime, 60.0)
    expected = f"rank 0 on {socket.gethostname()} failed in step 3, forward > exchange: OSError: disk"
    assert (failure.text, failure.is_spokesman) == (expected, True)
    begin("step 4")
    assert whereabouts() == "step 4"


def test_a_silent_rank_is_read_from_what_it_posted() -> None:
    store = dist.HashStore()
    runtimes = [Runtime(ranks, ranks.rank, torch.device("cpu"), store) for ranks in thread_ranks(2)]
    begin("step 9")
    with stage("sample"), Beacon(runtimes[1]):
        deadline = time.monotonic() + 10
        while read_beacon(store, 1) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    failure = explain_failure(RuntimeError(GONE), runtimes[0], 60.0)
    assert failure.is_spokesman
    assert failure.text.startswith("rank 1 did not take part in step 9")
    assert f"rank 1 on {socket.gethostname()} in step 9, sample" in failure.text


def test_torchrun_finds_the_reason_where_it_looks_and_blames_the_rank_at_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = {}
    for rank, is_fault in ((0, False), (1, True)):
        path = tmp_path / f"error-{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        tell_launcher("rank 1 on b failed: disk", is_fault=is_fault)
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=1, error_file=str(path))
        assert "rank 1 on b failed: disk" in str(failures[rank].message)
        assert abs(failures[rank].timestamp - time.time()) < 60
    assert ChildFailedError("train", failures).get_first_failure()[0] == 1
