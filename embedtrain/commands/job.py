"""Training as a command: one or more runs, or a dry run; explains failures to the user."""

from __future__ import annotations

import copy
import functools
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from embedtrain.checkpoint import latest_checkpoint
from embedtrain.commands.console import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, say
from embedtrain.commands.dry_run import dry_run
from embedtrain.config.sections import Config
from embedtrain.distributed.beacon import Beacon
from embedtrain.distributed.failure import explain_failure, is_of_the_group
from embedtrain.distributed.launcher import tell_launcher
from embedtrain.distributed.runtime import Runtime, init_distributed, shut_down
from embedtrain.distributed.stages import begin, whereabouts
from embedtrain.errors import CheckpointError, NonFiniteError, UserError, printable
from embedtrain.planning.room import require_room
from embedtrain.recipes.building import build_parts
from embedtrain.recipes.growing import Beginning
from embedtrain.serve.publication import open_sink, require_lasting, require_no_password, require_reachable
from embedtrain.train.interrupt import EXIT_PREEMPTED
from embedtrain.train.lock import RunLock
from embedtrain.train.run import Watch, check_run_folder, train_run
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.task import Parts

_PATIENCE_SECONDS = 5.0
"""Seconds that a failed rank waits for rank 0 to print the error."""

_SHORT_ERRORS = (NonFiniteError, CheckpointError)
"""Failures that a message explains; for any other failure the traceback is shown."""


def try_run(config: Config, *, is_debugged: bool) -> int:
    """Does a dry run and returns the exit status.

    Collective: every rank.
    """
    folder = check_run_folder(config)
    _check_publication(config)
    runtime = init_distributed(device=config.run.device, timeout_seconds=config.run.timeout_seconds)

    tried = config
    if config.start_from is not None and latest_checkpoint(folder.checkpoints_path) is None:
        tried = copy.deepcopy(config)
        tried.start_from, tried.start_from_grow = None, False
        if runtime.rank == 0:
            say(f"the dry run ignores start_from={config.start_from}: its tables start with initial values")

    def work() -> int:
        dry_run(tried, folder, runtime)
        return EXIT_DONE

    status, _ = _explained(work, _Job(runtime, config.run.timeout_seconds, is_debugged))
    if status == EXIT_DONE:
        shut_down()
    return status


def train_each(
    configs: Sequence[Config],
    *,
    is_debugged: bool,
    is_profiled: bool = False,
    may_diverge: bool = False,
    finish: Callable[[], None] = lambda: None,
) -> int:
    """Trains runs one after another, and calls `finish` on rank 0 when all are done.

    Args:
        configs: configurations of the runs.
        is_debugged: whether to show tracebacks.
        is_profiled: whether to write profiles.
        may_diverge: whether a run whose gradient becomes non-finite counts as done instead of failed.
        finish: called on rank 0 at the end.
    """
    folders = [check_run_folder(config) for config in configs]
    for config in configs:
        _check_publication(config)
    runtime = init_distributed(device=configs[0].run.device, timeout_seconds=configs[0].run.timeout_seconds)
    for config, folder in zip(configs, folders, strict=True):
        status, error = _train_one(config, folder, runtime, is_debugged=is_debugged, is_profiled=is_profiled)
        if may_diverge and isinstance(error, NonFiniteError):
            status = EXIT_DONE
        if status == EXIT_PREEMPTED:
            break
        if status != EXIT_DONE:
            return status
    else:
        if runtime.rank == 0:
            finish()
    shut_down()
    return status


def _check_publication(config: Config) -> None:
    """Checks on rank 0 that the run can be published to `publish.to`; other hosts need not reach it."""
    url = config.publish.to
    if url is None:
        return
    require_no_password("publish.to", url)
    require_lasting(url)
    open_sink(url).close()
    if os.environ.get("RANK", "0") == "0":
        require_reachable(url, config.model)


class Trials(Protocol):
    """Runs that are chosen one after the other; rank 0 alone is asked."""

    def next(self) -> Sequence[str] | None:
        """Returns the settings of the next run; None after the last."""

    def watch(self) -> Watch:
        """Returns what may stop the run that is trained next."""

    def take(self, status: int, error: Exception | None) -> bool:
        """Takes how the run ended; returns whether to go on with the next."""

    def finish(self) -> None:
        """Called after the last run."""


def train_trials(
    open_trials: Callable[[], Trials],
    folder: str,
    first: Config,
    load: Callable[[Sequence[str]], Config],
    *,
    is_debugged: bool,
) -> int:
    """Trains runs that are chosen by what came of those before; returns the exit status.

    Args:
        open_trials: called on rank 0; returns what chooses.
        folder: of all runs, in which no other job may choose.
        first: a configuration with the device of all.
        load: returns the configuration of the settings of a run.
        is_debugged: whether the user wants to see tracebacks.
    """
    runtime = init_distributed(device=first.run.device, timeout_seconds=first.run.timeout_seconds)
    with RunLock(folder, runtime.ranks, key="--output"):
        status = _train_chosen(open_trials, runtime, load, is_debugged=is_debugged)
    if status in (EXIT_DONE, EXIT_PREEMPTED):
        shut_down()
    return status


def _train_chosen(
    open_trials: Callable[[], Trials],
    runtime: Runtime,
    load: Callable[[Sequence[str]], Config],
    *,
    is_debugged: bool,
) -> int:
    ranks, opened, status = runtime.ranks, list[Trials](), EXIT_DONE
    ranks.run_on_first(lambda: opened.append(open_trials()))
    trials = next(iter(opened), None)
    while (settings := ranks.run_on_first(lambda: None if trials is None else trials.next())) is not None:
        config = load(settings)
        folder = check_run_folder(config)
        watch = None if trials is None else trials.watch()
        status, error = _train_one(config, folder, runtime, is_debugged=is_debugged, is_profiled=False, watch=watch)
        is_wanted = _is_taken(trials, status, error)
        if not ranks.run_on_first(is_wanted):
            break
        status = EXIT_DONE
    if status == EXIT_DONE and trials is not None:
        trials.finish()
    return status


def _is_taken(trials: Trials | None, status: int, error: Exception | None) -> Callable[[], bool]:
    return lambda: trials is not None and trials.take(status, error)


def _train_one(
    config: Config,
    folder: RunFolder,
    runtime: Runtime,
    *,
    is_debugged: bool,
    is_profiled: bool,
    watch: Watch | None = None,
) -> tuple[int, Exception | None]:
    """Trains a run; returns its exit status and the error, which was already printed. Collective: every rank."""
    beginning = Beginning(config, runtime)

    def make_parts() -> Parts:
        return build_parts(config, runtime, functools.partial(require_room, config, runtime), beginning.begin())

    def work() -> int:
        return train_run(config, runtime, folder, make_parts, is_profiled=is_profiled, undo=beginning.undo, watch=watch)

    return _explained(work, _Job(runtime, config.run.timeout_seconds, is_debugged, folder))


@dataclass(frozen=True)
class _Job:
    """Holds the context that the explanation of a failure needs.

    Attributes:
        runtime: this process's runtime.
        timeout_seconds: timeout of collectives.
        is_debugged: whether to show tracebacks.
        folder: the run folder, to which the reason of a failure is written; None to write nothing.
    """

    runtime: Runtime
    timeout_seconds: float
    is_debugged: bool
    folder: RunFolder | None = None

    def note(self, text: str) -> None:
        """Writes the reason of the failure to the run folder; ignores write errors, which must not hide the failure."""
        if self.folder is not None:
            with suppress(Exception):
                self.folder.write_status("failed", EXIT_FAILED, error=text)


def _explained(work: Callable[[], int], job: _Job) -> tuple[int, Exception | None]:
    """Runs `work`; if it fails, the rank at fault prints the reason. Collective: every rank."""
    runtime = job.runtime
    begin("the preparation")
    with Beacon(runtime):
        try:
            return work(), None
        except UserError as error:
            if job.is_debugged:
                raise
            tell_launcher(str(error))
            _tell_once(printable(f"embedtrain: error: {error}"), runtime)
            return EXIT_USER_ERROR, error
        except _SHORT_ERRORS as error:
            # Every rank raises this error.
            tell_launcher(str(error))
            if runtime.rank == 0:
                job.note(str(error))
            _tell_once(f"embedtrain: failed: {error}", runtime)
            return EXIT_FAILED, error
        except Exception as error:
            is_fault = not is_of_the_group(error)
            if is_fault:
                cause = f"{type(error).__name__}: {error}"
                where = f"rank {runtime.rank} on {socket.gethostname()} failed in {whereabouts()}"
                tell_launcher(f"{where}: {cause}")
                say(f"embedtrain: {where}: {cause}\n{traceback.format_exc()}")
            elif job.is_debugged:
                say(f"embedtrain: rank {runtime.rank} cannot continue:\n{traceback.format_exc()}")
            failure = explain_failure(error, runtime, job.timeout_seconds)
            if not is_fault:
                tell_launcher(failure.text, is_fault=False)
            if failure.is_spokesman:
                job.note(failure.text)
                say(f"embedtrain: failed: {failure.text}")
            return EXIT_FAILED, error


def _tell_once(line: str, runtime: Runtime) -> None:
    """Prints on rank 0 an error that every rank has; other ranks wait, because torchrun kills all when one exits."""
    told = "embedtrain/told"
    if runtime.rank == 0:
        say(line)
        if runtime.store is not None:
            runtime.store.set(told, "")
    elif runtime.store is not None:
        with suppress(Exception):
            runtime.store.wait([told], timedelta(seconds=_PATIENCE_SECONDS))
