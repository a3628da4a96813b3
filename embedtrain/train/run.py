"""Runs training in a run folder: locks the folder, builds or resumes the run, trains, and writes the status."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from embedtrain.checkpoint import LoadOptions, Retention, SaveOptions, latest_checkpoint
from embedtrain.config.resolved import differing_keys, settings_in, to_yaml
from embedtrain.config.secrets import hide_secrets
from embedtrain.config.sections import Config
from embedtrain.config.tuned import tuned_settings
from embedtrain.config.values import settings_of
from embedtrain.data.seal import Unverified, Verification
from embedtrain.distributed.failure import is_shared
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import Runtime
from embedtrain.embedding.init_from import init_from
from embedtrain.errors import UserError, counted, printable
from embedtrain.metrics.sinks import ConsoleSink, JsonlSink, MetricSink, RunEnd, TensorBoardSink
from embedtrain.metrics.trackers import MlflowSink, WandbSink, require_tracker
from embedtrain.optim.schedule import schedule_factor
from embedtrain.storage import local_path, shown
from embedtrain.train.best import BestPolicy, check_metric
from embedtrain.train.checkpoints import Checkpoints, ResumePolicy, SavePolicy
from embedtrain.train.interrupt import EXIT_PREEMPTED
from embedtrain.train.lock import RunLock
from embedtrain.train.profile import StepProfile
from embedtrain.train.provenance import start_facts
from embedtrain.train.publisher import Publisher
from embedtrain.train.row_statistics import RowStatistics, TableStatistics
from embedtrain.train.run_folder import PROFILE_NAME, TENSORBOARD_NAME, RunFolder
from embedtrain.train.state import TrainState
from embedtrain.train.step import StepOptions, has_bfloat16, step_options
from embedtrain.train.task import Parts, StreamedBatches, Task
from embedtrain.train.trainer import Trainer
from embedtrain.train.watchdog import Watchdog

_logger = logging.getLogger(__name__)

_VERIFICATION_SECONDS = 60.0
"""Longest time that a run waits before its last save for the checksums of its prepared data."""


@dataclass(frozen=True)
class Run:
    """Holds a run that is ready to train.

    Attributes:
        trainer: the training loop, restored from the newest checkpoint if there is one.
        folder: the run folder.
        checkpoints: saves and restores the run.
        sinks: receive the records; empty on all ranks but rank 0.
        is_resumed: whether a checkpoint was restored.
        is_begun: whether an earlier job has started this run.
        observers: called on every rank after each step.
        unverified: see `Parts`.
    """

    trainer: Trainer
    folder: RunFolder
    checkpoints: Checkpoints
    sinks: list[MetricSink]
    is_resumed: bool
    is_begun: bool
    observers: list[Callable[[], None]]
    unverified: Unverified


class Watch(MetricSink, Protocol):
    """A sink that receives the records of a run and may stop the run."""

    def is_asked(self) -> bool:
        """Returns whether the run must save and stop."""


def check_run_folder(config: Config) -> RunFolder:
    """Returns the run folder, after checking that a run in it has the same configuration.

    Raises:
        UserError: the folder holds checkpoints of a run with other settings, or a tracker is not installed.
    """
    for package in ("wandb", "mlflow"):
        if getattr(config.log, package) is not None:
            require_tracker(f"log.{package}", package)
    folder = RunFolder(config.run.path)
    folder.require_writable_names()
    earlier = folder.read_config()
    if earlier is not None and latest_checkpoint(folder.checkpoints_path) is not None:
        differing = differing_keys(earlier, config, _allowed_to_change(config))
        if differing:
            raise UserError(
                f"{folder.path} holds a run with other settings: {'; '.join(differing)}. "
                "Give the settings that it began with to resume it, or another run.path to start anew."
            )
    return folder


def train_run(
    config: Config,
    runtime: Runtime,
    folder: RunFolder,
    make_parts: Callable[[], Parts],
    *,
    is_profiled: bool = False,
    undo: Callable[[], None] = lambda: None,
    watch: Watch | None = None,
) -> int:
    """Trains or resumes a run and returns its exit status: 0, or `EXIT_PREEMPTED` if it was asked to stop.

    Collective: every rank.

    Args:
        config: configuration of the run.
        runtime: runtime of this process.
        folder: the run folder, which is locked during the run.
        make_parts: collective; prepares the data and builds the task.
        is_profiled: whether to write profiles into the folder.
        undo: called if the run cannot be built; must remove everything that `make_parts` has written to the folder.
        watch: on rank 0, a sink that may stop the run; None for no sink.

    Raises:
        UserError: another job uses the folder, the data cannot be used, or the checkpoint was trained on other data.
    """
    _step_options(config, runtime)  # reports options that the device does not support before the data are prepared
    with RunLock(folder.path, runtime.ranks) as lock:
        try:
            run = build_run(config, runtime, folder, make_parts())
        except BaseException:
            undo()
            raise
        return _train(run, config, runtime, lock, is_profiled=is_profiled, watch=watch)


def _train(run: Run, config: Config, runtime: Runtime, lock: RunLock, *, is_profiled: bool, watch: Watch | None) -> int:
    state = run.trainer.state
    if runtime.rank == 0:
        _say_how_it_starts(run, runtime)

    verification = begin_verification(run.unverified, config.run.timeout_seconds, runtime.ranks)

    def require_sound_data() -> None:
        if verification is not None:
            # A run that was asked to stop has no time to wait; it verifies the data when it resumes.
            verification.require_sound(is_last=run.trainer.is_over())

    def before_save() -> None:
        # A killed run resumes from this checkpoint and does not log earlier records again, so write them now.
        for sink in run.sinks:
            sink.flush()
        lock.check()
        runtime.ranks.run_on_each(require_sound_data)

    with ExitStack() as stack:
        ends: list[RunEnd] = ["failed"]
        # Close files first, because a tracker may wait for its server. The stack calls the last callback first.
        for sink in reversed(run.sinks):
            stack.callback(lambda sink: sink.close(ends[-1]), sink)
        watchdog = stack.enter_context(Watchdog(config.run.timeout_seconds))
        observers = list(run.observers)
        publisher = _publisher(config, run) if runtime.rank == 0 else None
        if publisher is not None:
            observers.append(publisher.step)
        if is_profiled:
            observers.append(stack.enter_context(_profile(run.folder, runtime.rank)).step)

        def observe() -> None:
            for observer in observers:
                observer()

        is_complete = run.trainer.run(
            run.sinks if watch is None else [*run.sinks, watch],
            config.log.every_steps,
            before_save=before_save,
            alive=watchdog.alive,
            on_step=observe,
            is_asked=(lambda: False) if watch is None else watch.is_asked,
        )
        ends.append("finished" if is_complete else "preempted")
    if publisher is not None and is_complete:
        publisher.finish()
    status = 0 if is_complete else EXIT_PREEMPTED
    if runtime.rank == 0:
        run.folder.write_status("done" if is_complete else "preempted", status, step=state.step)
        _say(f"{'done' if is_complete else 'stopped and saved'} at step {state.step:,}: {run.folder.path}")
    return status


def begin_verification(unverified: Unverified, timeout_seconds: float, ranks: Ranks) -> Verification | None:
    """Starts a thread on rank 0 that verifies the checksums of prepared data.

    Collective: every rank. If rank 0 cannot start the thread, all ranks raise.

    Args:
        unverified: the data to verify.
        timeout_seconds: timeout of collectives; the run waits for the verification for at most half of it.
        ranks: the ranks of the run.

    Returns:
        The verification; None on other ranks, and if there are no data to verify.
    """
    patience = min(_VERIFICATION_SECONDS, timeout_seconds / 2)
    return ranks.run_on_each(lambda: Verification(unverified, patience) if ranks.rank == 0 and unverified else None)


def _publisher(config: Config, run: Run) -> Publisher | None:
    if config.publish.to is None:
        return None
    return Publisher(run.folder.path, config.publish, lambda: run.checkpoints.complete_step)


@contextmanager
def _profile(folder: RunFolder, rank: int) -> Iterator[StepProfile]:
    def write(trace: bytes, table: str) -> None:
        folder.write_profile(rank, trace, table)
        if rank == 0:
            _say(f"{table}\nprofile: {folder.join(PROFILE_NAME)}")

    with StepProfile(write) as profile:
        yield profile
    if rank == 0 and not profile.is_written:
        _logger.warning(
            f"no profile was written: the first {profile.warmup_steps} steps are not profiled, and no step followed"
        )


def _say_how_it_starts(run: Run, runtime: Runtime) -> None:
    if run.is_begun and not run.is_resumed:
        _say(f"{run.folder.path} holds a run that ended before its first checkpoint: it starts anew")
    step, total = run.trainer.state.step, run.trainer.total_steps
    where = f"{counted(runtime.world_size, 'rank')}, {runtime.device.type}"
    of_all = "" if total is None else f": {counted(total, 'step')}"
    if run.is_resumed and step > 0:
        _say(f"resuming at step {step:,}{'' if total is None else f' of {total:,}'}, {where}")
    else:
        _say(f"starting{' from the grown tables' if run.is_resumed else ''}{of_all}, {where}")


def _say(line: str) -> None:
    print(printable(line, keep="\n"), file=sys.stderr, flush=True)


def build_run(config: Config, runtime: Runtime, folder: RunFolder, parts: Parts) -> Run:
    """Builds a run and restores its newest checkpoint.

    Collective: every rank.

    Args:
        config: configuration of the run.
        runtime: runtime of this process.
        folder: the run folder.
        parts: the task and its facts.

    Raises:
        UserError: the checkpoint was made with other data or another optimizer, or `checkpoint.best_metric` is unknown.
    """
    check_metric(config.checkpoint.best_metric, parts.task)
    earlier = folder.read_config()
    started = start_new_tables(parts, config, folder, runtime)
    state = TrainState()
    checkpoints = Checkpoints(
        folder.checkpoints_path,
        parts.task,
        state,
        facts={"config": settings_of(config), **parts.facts, "init_from": started},
        policy=_save_policy(config),
        resume=_resume_policy(config),
        ranks=runtime.ranks,
    )
    is_resumed = checkpoints.restore()
    _check_reset(config, earlier, state)
    trainer = Trainer(
        parts.task,
        state,
        epochs=config.train.epochs,
        schedule=functools.partial(_schedule_factor, config),
        checkpoints=checkpoints,
        ranks=runtime.ranks,
        options=_step_options(config, runtime),
        is_shared=functools.partial(is_shared, runtime=runtime),
    )
    _check_epochs(config, earlier, trainer, runtime)
    if config.train.precision == "bfloat16" and runtime.rank == 0 and not has_bfloat16(runtime.device):
        _logger.warning(
            "train.precision=bfloat16: this processor has no instructions for bfloat16 (AMX or AVX-512 BF16), and "
            "multiplies several times slower in it than in float32"
        )
    runtime.ranks.run_on_first(functools.partial(_write_folder, folder, config, parts, state.step, runtime.world_size))
    sinks = _build_sinks(config, folder, state, parts.task) if runtime.rank == 0 else []
    observers = _build_observers(config, folder, state, parts.task, sinks, runtime)
    return Run(trainer, folder, checkpoints, sinks, is_resumed, earlier is not None, observers, parts.unverified)


def _step_options(config: Config, runtime: Runtime) -> StepOptions:
    reset_at = config.optimizer.reset_state_from_step
    return step_options(config.train, runtime.device, reset_state_from_step=reset_at)


def start_new_tables(parts: Parts, config: Config, folder: RunFolder, runtime: Runtime) -> dict[str, Any]:
    """Initialises tables from files of vectors, unless a checkpoint will replace them.

    Collective: every rank.

    Returns:
        By table, the path of the file and the counts of rows, as JSON.

    Raises:
        UserError: a file cannot be used.
    """
    is_new = runtime.ranks.run_on_first(lambda: latest_checkpoint(folder.checkpoints_path) is None)
    loaded = config.resume.tables
    sources = {
        table: source for table, source in parts.pretrained.items() if is_new or not (loaded is None or table in loaded)
    }
    started: dict[str, Any] = {}
    for table, source in sources.items():
        counts = init_from(parts.task.tables, table, source.path, source.rows())
        started[table] = {"path": source.path, **asdict(counts)}
        if runtime.rank == 0:
            _logger.info(
                f"table {table}: {counts.num_copied:,} of {counts.num_rows:,} rows start from {source.path} "
                f"({counts.num_in_file:,} vectors), {counts.num_rows - counts.num_copied:,} keep their initial values"
            )
    return started


def _save_policy(config: Config) -> SavePolicy:
    settings = config.checkpoint
    retention = Retention(
        settings.keep_last, settings.keep_every, config.num_best, settings.best_metric, settings.best_mode
    )
    options = SaveOptions(
        settings.mode, settings.max_extra_memory_bytes, settings.max_failures, settings.full_every, retention
    )
    stop = config.train.early_stop
    best = BestPolicy(settings.best_metric, settings.best_mode, config.num_best, stop.patience, stop.min_delta)
    return SavePolicy(settings.every_steps, settings.every_seconds, options, config.run.timeout_seconds, best)


def _resume_policy(config: Config) -> ResumePolicy:
    settings = config.resume
    return ResumePolicy(
        settings.on_corrupt, LoadOptions(settings.convert_dtype, settings.optimizer_state, settings.tables)
    )


def _allowed_to_change(config: Config) -> tuple[str, ...]:
    """Returns the settings that may differ in addition to those that always may, given the `resume` settings."""
    allowed = {
        "optimizer.": config.resume.optimizer_state == "reset",
        "table.dtype": config.resume.convert_dtype,
    }
    return tuple(key for key, is_allowed in allowed.items() if is_allowed)


def _check_reset(config: Config, earlier_yaml: str | None, state: TrainState) -> None:
    """Raises UserError if the optimizer state should be reset at a step that the run has passed without a reset."""
    asked = config.optimizer.reset_state_from_step
    if asked is None or asked >= state.step or earlier_yaml is None:
        return
    if settings_in(earlier_yaml).get("optimizer.reset_state_from_step") != asked:
        raise UserError(
            f"optimizer.reset_state_from_step={asked}: {config.run.path} is at step {state.step} already; give this "
            "step or a later one"
        )


def _check_epochs(config: Config, earlier_yaml: str | None, trainer: Trainer, runtime: Runtime) -> None:
    """Raises UserError if fewer epochs are configured than are done; logs the learning rate if their number changed."""
    step, total = trainer.state.step, trainer.total_steps
    if total is None or step == 0 or earlier_yaml is None:
        return
    if step > total:
        raise UserError(
            f"train.epochs={config.train.epochs} ends at step {total:,}, and {config.run.path} is at step {step:,} "
            "already: give more epochs, or another run.path"
        )
    earlier = settings_in(earlier_yaml).get("train.epochs")
    if earlier != config.train.epochs and step < total and runtime.rank == 0:
        factor = _schedule_factor(config, step / total)
        num_epochs = config.schedule.epochs or config.train.epochs
        _logger.info(
            f"train.epochs changed from {earlier} to {config.train.epochs}: the learning rate continues at "
            f"{factor:.3g} of its base, by the schedule {config.schedule.name} over {num_epochs} epochs"
        )


def _schedule_factor(config: Config, done: float) -> float:
    schedule = config.schedule
    if schedule.epochs is not None:
        done *= config.train.epochs / schedule.epochs
    return schedule_factor(schedule.name, done, schedule.min_factor, schedule.warmup)


def _write_folder(folder: RunFolder, config: Config, parts: Parts, step: int, num_ranks: int) -> None:
    folder.write_config(to_yaml(config))
    folder.add_start(start_facts(step, num_ranks), is_new=step == 0)
    parts.write_files(folder)


def _build_sinks(config: Config, folder: RunFolder, state: TrainState, task: Task) -> list[MetricSink]:
    metrics = JsonlSink(folder.metrics_path)
    metrics.truncate_after(state.step)
    total = None if isinstance(task.batches, StreamedBatches) else config.train.epochs * task.batches.examples_per_epoch
    sinks: list[MetricSink] = [ConsoleSink(sys.stderr, total, task.unit), metrics]
    if config.log.tensorboard and local_path(folder.path) is not None:
        board = TensorBoardSink(folder.join(TENSORBOARD_NAME), purge_step=state.step + 1)
        measures = list(dict.fromkeys(["loss", config.checkpoint.best_metric, *(task.measures or ())]))
        # The name includes the parent folder: TensorBoard merges runs of equal names, such as runs of two sweeps.
        board.log_settings("/".join(folder.path.split("/")[-2:]), tuned_settings(config), measures)
        sinks.append(board)
    if config.log.wandb is None and config.log.mlflow is None:
        return sinks
    # Other people may read what a tracker stores.
    settings = hide_secrets("", settings_of(config))
    path, run_id = local_path(folder.path) or shown(folder.path), folder.run_id(is_new=state.step == 0)
    if config.log.wandb is not None:
        sinks.append(WandbSink(config.log.wandb, path, run_id, settings))
    if config.log.mlflow is not None:
        sinks.append(MlflowSink(config.log.mlflow, path, run_id, settings))
    return sinks


def _build_observers(
    config: Config,
    folder: RunFolder,
    state: TrainState,
    task: Task,
    sinks: Sequence[MetricSink],
    runtime: Runtime,
) -> list[Callable[[], None]]:
    every = config.log.rows_every_steps
    if every is None or not config.log.tensorboard or local_path(folder.path) is None:
        return []
    statistics = RowStatistics(task.tables, task.optimizer, task.frequencies, runtime.ranks)
    boards = [sink for sink in sinks if isinstance(sink, TensorBoardSink)]

    def observe() -> None:
        if state.step % every == 0:
            for table, found in statistics.measure().items():
                for board in boards:
                    _write_statistics(board, table, found, state.step)

    return [observe]


def _write_statistics(board: TensorBoardSink, table: str, found: TableStatistics, step: int) -> None:
    board.log({"step": step, f"state_mean/{table}": found.mean_state, f"never_touched/{table}": found.never_touched})
    for number, histogram in enumerate(found.rates, start=1):
        decile = {1: "decile 1, hot", 10: "decile 10, rare"}.get(number, f"decile {number}")
        name = "all rows" if len(found.rates) == 1 else decile
        board.log_histogram(f"effective_rate_{table}/{name}", histogram, step)
