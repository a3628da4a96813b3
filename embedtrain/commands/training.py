"""The commands that train: train and compare."""

from __future__ import annotations

import argparse
import functools
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta

from embedtrain.commands.compare import Comparison, parse_rates
from embedtrain.commands.console import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, Commands, add_command, say
from embedtrain.commands.dry_run import dry_run
from embedtrain.config.optimizer import OPTIMIZERS
from embedtrain.config.sections import Config
from embedtrain.distributed.beacon import Beacon
from embedtrain.distributed.failure import explain_failure, is_of_the_group, tell_launcher
from embedtrain.distributed.runtime import Runtime, init_distributed, shut_down
from embedtrain.distributed.stages import begin, whereabouts
from embedtrain.errors import CheckpointError, NonFiniteError, UserError
from embedtrain.planning.room import require_room
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.run import Run, build_run, check_run_folder
from embedtrain.train.interrupt import EXIT_PREEMPTED
from embedtrain.train.lock import RunLock
from embedtrain.train.profile import StepProfile
from embedtrain.train.run_folder import PROFILE_NAME, RunFolder
from embedtrain.train.watchdog import Watchdog

_PATIENCE_SECONDS = 5.0
"""How long a rank that has failed waits for rank 0 to say so."""

_SHORT_ERRORS = (NonFiniteError, CheckpointError)
"""Failures that a message explains; any other is a defect or the machine's, and its traceback is shown."""


def add_training(commands: Commands) -> None:
    """Declares the commands."""
    train = add_command(
        commands,
        "train",
        "train, or resume what lies in run.path",
        "torchrun --nproc-per-node 2 -m embedtrain train configs/word2vec.yaml data.path=corpus.txt",
    )
    train.add_argument("config", help="YAML file, such as configs/word2vec.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    train.add_argument("--profile", action="store_true", help="write a Chrome trace and seconds per stage of 50 steps")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="two steps on the head of the data, and the plan; writes nothing",
    )
    train.set_defaults(run=_train)

    compare = add_command(
        commands,
        "compare",
        "train with several optimizers and draw how they learn",
        "embedtrain compare configs/ranking.yaml data.path=train.csv --optimizers adam,rowwise_adagrad",
    )
    compare.add_argument("config", help="YAML file that all runs share")
    compare.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    compare.add_argument("--optimizers", required=True, metavar="A,B,...", help=f"of {', '.join(OPTIMIZERS)}")
    compare.add_argument(
        "--rates",
        action="append",
        default=[],
        metavar="NAME=RATE,RATE",
        help="learning rates to try; the optimizer's own times 0.1, 0.3, 1, 3 and 10 where not given. The best is "
        "chosen by checkpoint.best_metric at the end",
    )
    compare.add_argument("--output", default="runs/compare", metavar="PATH", help="folder (runs/compare)")
    compare.set_defaults(run=_compare)


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    if options.dry_run:
        return _try(config, options)
    return _train_each([config], options, is_profiled=options.profile)


def _compare(options: argparse.Namespace) -> int:
    names = [name for name in options.optimizers.split(",") if name]
    comparison = Comparison(options.config, options.overrides, names, parse_rates(options.rates), options.output)
    return _train_each(comparison.configs, options, may_diverge=True, finish=lambda: print(comparison.finish()))


def _try(config: Config, options: argparse.Namespace) -> int:
    if options.profile:
        raise UserError("--profile writes into the run folder, and --dry-run does not: give one of them")
    folder = check_run_folder(config)
    runtime = init_distributed(device=config.run.device, timeout_seconds=config.run.timeout_seconds)

    def work() -> int:
        dry_run(config, folder, runtime)
        return EXIT_DONE

    status, _ = _explained(work, _Job(runtime, config.run.timeout_seconds, options.debug))
    if status == EXIT_DONE:
        shut_down()
    return status


def _train_each(
    configs: Sequence[Config],
    options: argparse.Namespace,
    *,
    is_profiled: bool = False,
    may_diverge: bool = False,
    finish: Callable[[], None] = lambda: None,
) -> int:
    """Trains one run after another, and where all are done, rank 0 calls `finish`.

    Args:
        configs: of the runs.
        options: of the command.
        is_profiled: whether to write profiles.
        may_diverge: whether a run whose gradient is not finite any more is done too.
        finish: what to do in the end.
    """
    folders = [check_run_folder(config) for config in configs]
    runtime = init_distributed(device=configs[0].run.device, timeout_seconds=configs[0].run.timeout_seconds)
    for config, folder in zip(configs, folders, strict=True):
        status, error = _train_one(config, folder, runtime, is_debugged=options.debug, is_profiled=is_profiled)
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


def _train_one(
    config: Config, folder: RunFolder, runtime: Runtime, *, is_debugged: bool, is_profiled: bool
) -> tuple[int, Exception | None]:
    """Trains a run; returns its exit status, and what it failed with, which the user was told. Collective: all."""

    def work() -> int:
        with RunLock(folder.path, runtime.ranks) as lock:
            run = build_run(config, runtime, folder, functools.partial(require_room, config, runtime))
            return _run(run, config, runtime, lock, is_profiled=is_profiled)

    return _explained(work, _Job(runtime, config.run.timeout_seconds, is_debugged, folder))


@dataclass(frozen=True)
class _Job:
    """What it takes to explain a failure.

    Attributes:
        runtime: of this process.
        timeout_seconds: how long collectives wait.
        is_debugged: whether the user wants to see tracebacks.
        folder: keeps why the run failed; None where nothing is to be written.
    """

    runtime: Runtime
    timeout_seconds: float
    is_debugged: bool
    folder: RunFolder | None = None

    def note(self, text: str) -> None:
        """Keeps why the run failed, where the folder can still be written to: the failure itself is the one to tell."""
        if self.folder is not None:
            with suppress(Exception):
                self.folder.write_status("failed", EXIT_FAILED, error=text)


def _explained(work: Callable[[], int], job: _Job) -> tuple[int, Exception | None]:
    """Does the work of a job; where it fails, the user is told why, by the rank to blame. Collective: every rank."""
    runtime = job.runtime
    begin("the preparation")
    with Beacon(runtime):
        try:
            return work(), None
        except UserError as error:
            if job.is_debugged:
                raise
            tell_launcher(str(error))
            _tell_once(f"embedtrain: error: {error}", runtime)
            return EXIT_USER_ERROR, error
        except _SHORT_ERRORS as error:
            # Raised alike on every rank.
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
                say(f"embedtrain: rank {runtime.rank} could not go on:\n{traceback.format_exc()}")
            failure = explain_failure(error, runtime, job.timeout_seconds)
            if not is_fault:
                tell_launcher(failure.text, is_fault=False)
            if failure.is_spokesman:
                job.note(failure.text)
                say(f"embedtrain: failed: {failure.text}")
            return EXIT_FAILED, error


def _tell_once(line: str, runtime: Runtime) -> None:
    """Prints on rank 0 what every rank found; the others wait for it, since torchrun ends all when one has left."""
    told = "embedtrain/told"
    if runtime.rank == 0:
        say(line)
        if runtime.store is not None:
            runtime.store.set(told, "")
    elif runtime.store is not None:
        with suppress(Exception):
            runtime.store.wait([told], timedelta(seconds=_PATIENCE_SECONDS))


def _run(run: Run, config: Config, runtime: Runtime, lock: RunLock, *, is_profiled: bool) -> int:
    state = run.trainer.state
    if runtime.rank == 0:
        done = f"resuming at step {state.step:,}" if run.is_resumed else "starting"
        of_all = "" if run.trainer.total_steps is None else f" of {run.trainer.total_steps:,}"
        say(f"{done}{of_all}, {runtime.world_size} ranks, {runtime.device.type}")

    def before_save() -> None:
        # A run that is killed goes on from this checkpoint, and does not log again what came before it.
        for sink in run.sinks:
            sink.flush()
        lock.check()

    with ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.run.timeout_seconds))
        observers = list(run.observers)
        if is_profiled:
            observers.append(stack.enter_context(_profile(run.folder, runtime.rank)).step)

        def observe() -> None:
            for observer in observers:
                observer()

        is_complete = run.trainer.run(
            run.sinks,
            config.log.every_steps,
            before_save=before_save,
            alive=watchdog.alive,
            on_step=observe,
        )
    for sink in run.sinks:
        sink.close()
    status = EXIT_DONE if is_complete else EXIT_PREEMPTED
    if runtime.rank == 0:
        run.folder.write_status("done" if is_complete else "preempted", status, step=state.step)
        say(f"{'done' if is_complete else 'stopped and saved'} at step {state.step:,}: {run.folder.path}")
    return status


def _profile(folder: RunFolder, rank: int) -> StepProfile:
    def write(trace: bytes, table: str) -> None:
        folder.write_profile(rank, trace, table)
        if rank == 0:
            say(f"{table}\nprofile: {folder.join(PROFILE_NAME)}")

    return StepProfile(write)
