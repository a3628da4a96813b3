"""Fixtures for all tests: each starts from the same state, and one that leaves something behind fails."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import hypothesis
import psutil
import pytest
import torch
import torch.distributed as dist

from tests import launching

T = TypeVar("T")

if not torch.cuda.is_available():
    # Read when Triton is imported, which may be long before a test runs its kernels: on CPU they are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine must not fail a property for being slow, and every run tries the same examples.
hypothesis.settings.register_profile("embedtrain", deadline=None, derandomize=True)
hypothesis.settings.load_profile("embedtrain")

# What ends soon after a test is not left behind.
_GRACE_SECONDS = 3.0

# Started once for the whole session: fsspec's event loop and the threads it resolves names in;
# multiprocessing's servers, which `run_ranks` uses.
_SESSION_THREADS = ("fsspecIO", "asyncio_")
_HAS_LISTS_OF_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children").exists()
_SESSION_PROCESSES = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora and test sets beside the checkout."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the shared data folder, absent here: {path}")
    return path


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _environment_restored() -> Iterator[None]:
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    # torch sets the second itself when its compiler is first imported.
    changed -= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    if changed:
        pytest.fail(f"the test left environment variables changed: {sorted(changed)}; use monkeypatch.setenv")


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left a process group initialised")


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = _threads()
    yield
    left = _still_there_after_grace(lambda: _threads() - before)
    if left:
        pytest.fail(f"the test left threads running: {sorted(thread.name for thread in left)}")


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    before = _child_processes()
    yield
    left = _still_there_after_grace(lambda: _child_processes() - before)
    for process in left:
        process.kill()
    if left:
        pytest.fail(f"the test left child processes running: {sorted(process.pid for process in left)}")


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.name.startswith(_SESSION_THREADS)}


def _child_processes() -> set[psutil.Process]:
    if not _HAS_LISTS_OF_CHILDREN:
        children = psutil.Process().children(recursive=True)
    else:
        # psutil reads every process of the machine, which took six milliseconds twice a test.
        children = []
        for pid in _descendants(os.getpid()):
            with suppress(psutil.NoSuchProcess):
                children.append(psutil.Process(pid))
    return {child for child in children if not _is_allowed(child)}


def _descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):  # it has ended
        for thread in (Path("/proc") / str(pid) / "task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                yield child
                yield from _descendants(child)


def _is_allowed(process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        command = " ".join(process.cmdline())
        # Ranks are forks of the fork server and show its command line; the server is our own child.
        return process.ppid() == os.getpid() and any(name in command for name in _SESSION_PROCESSES)
    except psutil.NoSuchProcess:
        return True


def _still_there_after_grace(leftovers: Callable[[], set[T]]) -> set[T]:
    give_up = time.monotonic() + _GRACE_SECONDS
    while (left := leftovers()) and time.monotonic() < give_up:
        time.sleep(0.02)
    return left


_NO_TIME_LEFT = "no time was left to start it"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("embedtrain")
    group.addoption("--all", action="store_true", help="run the tests marked slow too, and start every process cold")
    group.addoption(
        "--part",
        choices=("parallel", "serial"),
        help="run only the tests that may run beside others, or only those marked serial; both by default",
    )
    group.addoption("--start-until", type=float, metavar="UNIX_TIME", help="skip and name the tests that come later")


def pytest_configure(config: pytest.Config) -> None:
    launching.start_warm_by_default(not config.getoption("--all"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` if there is none; leaves out what `--all` and `--part` do not ask for."""
    if not torch.cuda.is_available():
        for item in items:
            # Not by its keywords: the names of folders are among them, a checkout's own too.
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    part = config.getoption("--part")

    def is_asked_for(item: pytest.Item) -> bool:
        is_serial = item.get_closest_marker("serial") is not None
        is_slow = item.get_closest_marker("slow") is not None
        return (config.getoption("--all") or not is_slow) and part in (None, "serial" if is_serial else "parallel")

    left_out = [item for item in items if not is_asked_for(item)]
    items[:] = [item for item in items if is_asked_for(item)]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("--start-until")
    if until is not None and time.time() > until:
        pytest.skip(_NO_TIME_LEFT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the tests that did not get their turn."""
    skipped = terminalreporter.getreports("skipped")
    names = sorted(report.nodeid for report in skipped if _NO_TIME_LEFT in str(report.longrepr))
    if names:
        terminalreporter.section(f"NOT RUN, for lack of time: {len(names)} tests", red=True, bold=True)
        for name in names:
            terminalreporter.line(name)


@pytest.fixture(scope="session")
def runs_all(request: pytest.FixtureRequest) -> bool:
    """Whether this session was asked for everything: what is drawn at random is then drawn ten times as often."""
    return bool(request.config.getoption("--all"))
