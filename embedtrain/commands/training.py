"""The commands that train: train and compare."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta

from embedtrain.build import Run, build_run, check_run_folder
from embedtrain.commands.console import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, Commands, add_command, say
from embedtrain.comparison import Comparison, parse_rates
from embedtrain.config import Config, load_config
from embedtrain.config.optimizer import OPTIMIZERS
from embedtrain.distributed.failure import explain_failure, is_of_the_group
from embedtrain.distributed.runtime import Runtime, init_distributed, shut_down
from embedtrain.errors import CheckpointError, NonFiniteError, UserError
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
    return _train_each([load_config(options.config, options.overrides)], options, is_profiled=options.profile)


def _compare(options: argparse.Namespace) -> int:
    names = [name for name in options.optimizers.split(",") if name]
    comparison = Comparison(options.config, options.overrides, names, parse_rates(options.rates), options.output)
    return _train_each(comparison.configs, options, may_diverge=True, finish=lambda: print(comparison.finish()))


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
    run = None
    try:
        with RunLock(folder.path, runtime.group) as lock:
            run = build_run(config, runtime, folder)
            return _run(run, config, runtime, lock, is_profiled=is_profiled), None
    except UserError as error:
        if is_debugged:
            raise
        _tell_once(f"embedtrain: error: {error}", runtime)
        return EXIT_USER_ERROR, error
    except _SHORT_ERRORS as error:
        # Raised alike on every rank.
        if runtime.rank == 0:
            _note_failure(folder, str(error))
        _tell_once(f"embedtrain: failed: {error}", runtime)
        return EXIT_FAILED, error
    except Exception as error:
        if is_debugged or not is_of_the_group(error):
            say(f"embedtrain: rank {runtime.rank} failed:\n{traceback.format_exc()}")
        doing = f"step {run.trainer.state.step + 1}" if run else "the preparation"
        failure = explain_failure(error, runtime, doing, config.run.timeout_seconds)
        if failure.is_spokesman:
            _note_failure(folder, failure.text)
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


def _note_failure(folder: RunFolder, text: str) -> None:
    """Keeps why the run failed, where the folder can still be written to: the failure itself is the one to tell."""
    with suppress(Exception):
        folder.write_status("failed", EXIT_FAILED, error=text)


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
