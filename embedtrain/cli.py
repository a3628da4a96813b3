"""The command line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import TypeAlias

from embedtrain import inspection
from embedtrain.build import Run, build_run, check_run_folder, open_run_vectors
from embedtrain.comparison import Comparison, parse_rates
from embedtrain.config import Config, load_config
from embedtrain.config.optimizer import OPTIMIZERS
from embedtrain.distributed.failure import explain_failure, is_of_the_group
from embedtrain.distributed.runtime import Runtime, init_distributed, shut_down
from embedtrain.errors import CheckpointError, NonFiniteError, UserError
from embedtrain.export import FORMATS, Vectors, export_vectors, neighbors
from embedtrain.planning.command import add_plan_arguments, run_plan
from embedtrain.recommending import evaluate_run, recommend
from embedtrain.report import write_report
from embedtrain.train.interrupt import EXIT_PREEMPTED
from embedtrain.train.lock import RunLock
from embedtrain.train.profile import StepProfile
from embedtrain.train.run_folder import PROFILE_NAME, RunFolder
from embedtrain.train.watchdog import Watchdog

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR = 0, 1, 2

_PATIENCE_SECONDS = 5.0
"""How long a rank that has failed waits for rank 0 to say so."""

_SHORT_ERRORS = (NonFiniteError, CheckpointError)
"""Failures that a message explains; any other is a defect or the machine's, and its traceback is shown."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 1 failure, 2 the user's mistake, 75 saved and stopped."""
    options = _build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("embedtrain").setLevel(logging.INFO if _is_first_rank() else logging.ERROR)
    try:
        status: int = options.run(options)
    except UserError as error:
        if options.debug:
            raise
        _print_once(f"embedtrain: error: {error}")
        status = EXIT_USER_ERROR
    except CheckpointError as error:
        if options.debug:
            raise
        _print_once(f"embedtrain: failed: {error}")
        status = EXIT_FAILED
    except BrokenPipeError:
        # Whoever read our output has seen enough, as `| head` has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_DONE
    return status


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="embedtrain", description="Trains embedding tables sharded over the ranks of a torchrun job."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of your mistakes too")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_training(commands)
    _add_measuring(commands)
    _add_reading(commands)
    return parser


def _add_training(commands: _Commands) -> None:
    train = commands.add_parser("train", help="train, or resume what lies in run.path")
    train.add_argument("config", help="YAML file, such as configs/word2vec.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    train.add_argument("--profile", action="store_true", help="write a Chrome trace and seconds per stage of 50 steps")
    train.set_defaults(run=_train)

    compare = commands.add_parser("compare", help="train with several optimizers and draw how they learn")
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

    plan = commands.add_parser("plan", help="what a run will need on each rank, and how long a step takes")
    add_plan_arguments(plan)
    plan.set_defaults(run=run_plan)


def _add_measuring(commands: _Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="measure a run: word vectors on analogies and similarity, retrieval on held-out data"
    )
    _add_run(evaluate)
    evaluate.add_argument("--analogies", action="append", default=[], metavar="FILE", help="`: section` and `a b c d`")
    evaluate.add_argument("--similarity", action="append", default=[], metavar="FILE", help="`word word score`")
    evaluate.add_argument("--restrict-vocab", type=int, default=300_000, metavar="N", help="most frequent words only")
    evaluate.add_argument("--case-sensitive", action="store_true", help="compare words as they are written")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="write a page of HTML about a run: curves, neighbours, advice")
    report.add_argument("path", metavar="RUN", help="run folder")
    report.add_argument("--output", metavar="PATH", help="the page (report.html in the run folder)")
    report.add_argument("--words", nargs="*", default=[], metavar="WORD", help="whose neighbours to show")
    report.set_defaults(run=_report)

    inspect = commands.add_parser("inspect", help="show a run's newest checkpoint and configuration")
    inspect.add_argument("path", metavar="RUN", help="run folder")
    inspect.add_argument("--verify", action="store_true", help="read every byte and compare its checksum")
    inspect.set_defaults(run=_inspect)


def _add_reading(commands: _Commands) -> None:
    recommend = commands.add_parser("recommend", help="print or write the best items of users of a retrieval run")
    recommend.add_argument("path", metavar="RUN", help="run folder")
    recommend.add_argument("users", nargs="*", metavar="USER", help="raw ids, as in the data; --all for all users")
    recommend.add_argument("--all", action="store_true", help="all users, into the file of --output")
    recommend.add_argument("--top", type=int, default=10, metavar="N", help="how many items each (10)")
    recommend.add_argument("--include-known", action="store_true", help="also items that the user has already")
    recommend.add_argument("--output", metavar="PATH", help="a new Parquet file, instead of printing")
    recommend.add_argument("--overwrite", action="store_true", help="replace what is there")
    recommend.set_defaults(run=_recommend)

    near = commands.add_parser("neighbors", help="print the nearest words, items or users of one, or of a sum")
    _add_run(near)
    near.add_argument("query", nargs="+", help="such as: king, or: king - man + woman, or the id of an item")
    near.add_argument("--top", type=int, default=10, metavar="N", help="how many (10)")
    near.set_defaults(run=_neighbors)

    export = commands.add_parser("export", help="write the vectors of a run for other programs")
    _add_run(export)
    export.add_argument("--format", required=True, choices=list(FORMATS))
    export.add_argument("--output", required=True, metavar="PATH", help="new file, or folder for projector")
    export.add_argument("--max-rows", type=int, metavar="N", help="only the N most frequent words")
    export.add_argument("--overwrite", action="store_true", help="replace what is there")
    export.set_defaults(run=_export)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN", help="run folder")
    parser.add_argument("--table", metavar="NAME", help="a table other than the one that holds the vectors")


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
            _print(f"embedtrain: rank {runtime.rank} failed:\n{traceback.format_exc()}")
        doing = f"step {run.trainer.state.step + 1}" if run else "the preparation"
        failure = explain_failure(error, runtime, doing, config.run.timeout_seconds)
        if failure.is_spokesman:
            _note_failure(folder, failure.text)
            _print(f"embedtrain: failed: {failure.text}")
        return EXIT_FAILED, error


def _tell_once(line: str, runtime: Runtime) -> None:
    """Prints on rank 0 what every rank found; the others wait for it, since torchrun ends all when one has left."""
    told = "embedtrain/told"
    if runtime.rank == 0:
        _print(line)
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
        _print(f"{done} of {run.trainer.total_steps:,}, {runtime.world_size} ranks, {runtime.device.type}")

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
        _print(f"{'done' if is_complete else 'stopped and saved'} at step {state.step:,}: {run.folder.path}")
    return status


def _profile(folder: RunFolder, rank: int) -> StepProfile:
    def write(trace: bytes, table: str) -> None:
        folder.write_profile(rank, trace, table)
        if rank == 0:
            _print(f"{table}\nprofile: {folder.join(PROFILE_NAME)}")

    return StepProfile(write)


def _evaluate(options: argparse.Namespace) -> int:
    if evaluate_run(options.path):
        return EXIT_DONE
    if not options.analogies and not options.similarity:
        raise UserError("expected --analogies FILE or --similarity FILE")
    with _open(options) as vectors:
        inspection.print_evaluation(
            vectors,
            options.analogies,
            options.similarity,
            restrict_vocab=options.restrict_vocab,
            case_insensitive=not options.case_sensitive,
        )
    return EXIT_DONE


def _neighbors(options: argparse.Namespace) -> int:
    with _open(options) as vectors:
        query = " ".join(options.query)
        print(query)
        for word, cosine in neighbors(vectors, query, options.top):
            print(f"  {cosine:.3f}  {word}")
    return EXIT_DONE


def _recommend(options: argparse.Namespace) -> int:
    recommend(
        options.path,
        None if options.all else options.users,
        top=options.top,
        leave_out_known=not options.include_known,
        output=options.output,
        overwrite=options.overwrite,
    )
    return EXIT_DONE


def _open(options: argparse.Namespace) -> Vectors:
    return open_run_vectors(options.path, options.table, init_distributed(device="cpu"))


def _export(options: argparse.Namespace) -> int:
    with _open(options) as vectors:
        for path in export_vectors(
            vectors, options.format, options.output, overwrite=options.overwrite, max_rows=options.max_rows
        ):
            print(path)
    return EXIT_DONE


def _report(options: argparse.Namespace) -> int:
    print(write_report(options.path, options.output, options.words))
    return EXIT_DONE


def _inspect(options: argparse.Namespace) -> int:
    inspection.print_run(options.path, verify=options.verify)
    return EXIT_DONE


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_once(line: str) -> None:
    """Prints what every rank has to say alike."""
    if _is_first_rank():
        _print(line)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
