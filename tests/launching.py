"""Starts Python commands as a user does: cold, or warm, in a fraction of the time that importing torch takes.

`python -m embedtrain` spends three seconds of a core before its first line, torchrun on two ranks nine, nearly all of
it on `import torch`. A warm process skips that: it is a fork of the fork server of `run_ranks`, which has imported
torch already. It is otherwise a process like any other, with its own pid, signals, files and exit status. torchrun runs
unchanged in a warm process, except that its ranks are forks too.

The tests start warm processes by default; `pytest --all` starts cold ones.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.distributed.run

from embedtrain.testing.ranks import fork_server

ROOT = Path(__file__).resolve().parents[1]

_starts_warm = False


def start_warm_by_default(is_warm: bool) -> None:
    """Decides how `start` starts a process if its caller does not."""
    global _starts_warm
    _starts_warm = is_warm


class Process:
    """A started command, with the methods of `subprocess.Popen` that the tests need.

    Its output goes to files, so that it never waits for a reader.
    """

    def __init__(self, args: list[str], process: Any, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.args = args
        self.pid: int = process.pid
        self.returncode: int | None = None
        self._process = process
        self._stdout = stdout
        self._stderr = stderr

    def poll(self) -> int | None:
        """Returns the exit status, negative for a signal; None while the process runs."""
        if self.returncode is None:
            process = self._process
            self.returncode = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end of the process and returns its exit status.

        Raises:
            subprocess.TimeoutExpired: the process still runs.
        """
        if isinstance(self._process, subprocess.Popen):
            self._process.wait(timeout)
        else:
            self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0, self.output(), self.errors())
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end of the process and returns its output and its errors."""
        self.wait(timeout)
        return self.output(), self.errors()

    def output(self) -> str:
        """Returns what the process has written to its standard output so far."""
        return _content(self._stdout)

    def errors(self) -> str:
        """Returns what the process has written to its standard error so far."""
        return _content(self._stderr)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    stdin: IO[Any] | None = None,
    is_warm: bool | None = None,
) -> Process:
    """Starts a Python command, on one thread for arithmetic and with this checkout importable.

    Args:
        command: `sys.executable`, then what follows `python` on a command line: `-m module` or a script, arguments.
        cwd: the folder to start in.
        environment: variables beside those of this process.
        stdin: what the process reads; nothing by default.
        is_warm: None for the session's choice.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    arguments = list(command)
    stdout, stderr = _new_file(), _new_file()
    with open(os.devnull, "rb") as nothing:
        streams = (stdin or nothing, stdout, stderr)
        starts_warm = _starts_warm if is_warm is None else is_warm
        process = (_start_warm if starts_warm else _start_cold)(arguments, cwd, variables, streams)
    return Process(arguments, process, stdout, stderr)


def run(
    command: Sequence[str], *, cwd: Path, text: str = "", timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Starts a Python command as `start` does, with `text` on its standard input, and waits for its end."""
    with tempfile.TemporaryFile() as stdin:
        stdin.write(text.encode())
        stdin.seek(0)
        process = start(command, cwd=cwd, stdin=stdin, **options)
    return finish(process, timeout)


def finish(process: Process, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Waits for the end of a process, and kills it if it takes too long.

    Raises:
        subprocess.TimeoutExpired: it took too long.
    """
    try:
        output, errors = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(process.args, process.wait(), output, errors)


def torchrun(ranks: int | None, *options: str) -> list[str]:
    """Returns the beginning of a command: `python`, or `python -m torch.distributed.run` if `ranks` is a number."""
    if ranks is None:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]


def _new_file() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _content(file: IO[bytes]) -> str:
    # By position: the processes that write share this file's offset.
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace") if size else ""


def _start_cold(command: list[str], cwd: Path, variables: Mapping[str, str], streams: Sequence[IO[Any]]) -> Any:
    stdin, stdout, stderr = streams
    return subprocess.Popen(command, cwd=cwd, env=variables, stdin=stdin, stdout=stdout, stderr=stderr)


def _start_warm(command: list[str], cwd: Path, variables: Mapping[str, str], streams: Sequence[IO[Any]]) -> Any:
    descriptors = [_Sent(stream) for stream in streams]
    process = fork_server().Process(target=_warm_main, args=(command[1:], str(cwd), dict(variables), descriptors))
    process.start()
    return process


class _Sent:
    """A file that is sent to a process of the fork server as it starts."""

    def __init__(self, file: IO[Any]) -> None:
        self._number = file.fileno()

    def __reduce__(self) -> tuple[Callable[..., int], tuple[Any]]:
        return _received, (reduction.DupFd(self._number),)


def _received(sent: Any) -> int:
    number: int = sent.detach()
    return number


def _warm_main(arguments: list[str], cwd: str, variables: dict[str, str], descriptors: list[int]) -> NoReturn:
    """Lives the life of a warm process."""
    for target, number in enumerate(descriptors):
        os.dup2(number, target)
        os.close(number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    _run_python(arguments)


def _run_python(arguments: list[str]) -> NoReturn:
    """Does what `python` does with its arguments, and ends this process as Python ends."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115, it stays open as long as this process lives
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    status: Any = 0
    try:
        if arguments[0] == "-u":
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
            arguments = arguments[1:]
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, os.getcwd())
            if arguments[1] == "torch.distributed.run":
                _fork_ranks()
                torch.distributed.run.main(arguments[2:])
            else:
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status or 0)


def _fork_ranks() -> None:
    """Has torchrun, which runs in this process next, fork its ranks if they are Python's."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def fork_rank(handler: Any, args: tuple[str, ...], env: dict[str, str]) -> Any:
        assert args[0] == sys.executable, args
        return _Fork(list(args[1:]), env, (handler._stdout, handler._stderr))

    SubprocessHandler._popen = fork_rank  # type: ignore[method-assign]


class _Fork(subprocess.Popen[bytes]):
    """A rank of torchrun: a fork of this process instead of a new one."""

    def __init__(self, arguments: list[str], variables: dict[str, str], streams: tuple[IO[Any] | None, ...]) -> None:
        self._arguments = arguments
        self._variables = variables
        self._streams = streams
        super().__init__(arguments)

    def _execute_child(self, *_: Any) -> None:
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            try:
                os.setsid()
                for number, stream in enumerate(self._streams, start=1):
                    if stream is not None:
                        os.dup2(stream.fileno(), number)
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
                    signal.signal(number, signal.SIG_DFL)
                os.environ.clear()
                os.environ.update(self._variables)
                atexit._clear()
                _run_python(self._arguments)
            finally:
                os._exit(1)
