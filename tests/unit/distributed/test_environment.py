"""What a launcher must have said, and ranks that do not find each other."""

from __future__ import annotations

import socket

import pytest

from embedtrain.distributed.runtime import init_distributed
from embedtrain.errors import JobError, UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def describe(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_rank_without_the_rest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    describe(monkeypatch, RANK="1", MASTER_ADDR="localhost")
    with pytest.raises(UserError, match="expected WORLD_SIZE, MASTER_PORT in the environment beside RANK=1: start"):
        init_distributed(device="cpu")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_what_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    describe(monkeypatch, RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500")
    describe(monkeypatch, **{name: "two"})
    with pytest.raises(UserError, match=f"expected a whole number in the environment's {name}, got 'two'"):
        init_distributed(device="cpu")


def test_a_port_in_use_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        describe(monkeypatch, RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=port)
        with pytest.raises(UserError, match=f"expected port {port} of .* free .* give another MASTER_PORT"):
            init_distributed(device="cpu", timeout_seconds=5)


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    describe(monkeypatch, RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    with pytest.raises(JobError, match=f"rank 1 on .* did not reach the job's store at localhost:{port} within 1 sec"):
        init_distributed(device="cpu", timeout_seconds=1)
