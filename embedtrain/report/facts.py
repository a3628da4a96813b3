"""What a report says of a run, read from its folder: no model is built and nothing is trained."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from embedtrain import storage
from embedtrain.checkpoint import CheckpointReader, is_complete, latest_checkpoint
from embedtrain.errors import CheckpointError, UserError
from embedtrain.report.curves import BUSIEST_RANK, STAGE, Curves, RunCurves, read_curves
from embedtrain.sharding.layout import read_layout
from embedtrain.train.run_folder import PROFILE_NAME, RunFolder
from embedtrain.train.state import RunState, TrainState, read_run_state

_ACCUMULATOR = "/accumulator"
_BLOCK_ROWS = 1 << 20
_MAX_PROFILES = 64


@dataclass(frozen=True)
class TableFacts:
    """A table of the newest checkpoint.

    Attributes:
        name: of the table.
        num_rows: its rows.
        dim: its columns.
        num_untouched: rows whose accumulator is still at its first value; None if that cannot be told.
        has_shared_row: whether row 0 stands for all values without a row of their own; it counts as touched.
        is_hashed: whether values share rows by their hash.
    """

    name: str
    num_rows: int
    dim: int
    num_untouched: int | None
    has_shared_row: bool = False
    is_hashed: bool = False


@dataclass(frozen=True)
class RunFacts:
    """A run, as its folder tells it.

    Attributes:
        path: the run folder.
        config: its configuration, YAML.
        status: of status.json; empty while the run is going on or after it was killed.
        step: of the newest checkpoint, or of the last record if there is no checkpoint yet.
        world_size: ranks that saved it; None without a checkpoint.
        seconds: spent in training.
        epochs: passes over the data that are done, as `epochs_done` counts them.
        num_skipped: steps left out because a gradient was not finite.
        logged: the numbers of `metrics.jsonl`.
        tables: in order of name.
        profile: table of seconds per stage of each rank, by name; empty without `train --profile`.
        starts: when, how and from which commit the run was started and resumed, in order.
    """

    path: str
    config: str
    status: Mapping[str, Any]
    step: int
    world_size: int | None
    seconds: float
    epochs: float
    num_skipped: int
    logged: RunCurves
    tables: Sequence[TableFacts]
    profile: Mapping[str, str] = field(default_factory=dict)
    starts: Sequence[Mapping[str, Any]] = ()

    @property
    def curves(self) -> Curves:
        """By the name of a number, its steps and values."""
        return self.logged.curves

    @property
    def name(self) -> str:
        """The name of the run: the last part of the path of its folder."""
        return storage.base_name(self.path)

    @functools.cached_property
    def settings(self) -> Mapping[str, Any]:
        """The configuration; empty if it cannot be read."""
        try:
            loaded = yaml.safe_load(self.config)
        except yaml.YAMLError:
            return {}
        return loaded if isinstance(loaded, dict) else {}

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds per step by stage, mean over what was logged, the longest first."""
        means = {
            name.removeprefix(STAGE): sum(values) / len(values)
            for name, (_, values) in self.curves.items()
            if name.startswith(STAGE) and name != BUSIEST_RANK
        }
        return dict(sorted(means.items(), key=lambda item: -item[1]))


def read_facts(run_path: str) -> RunFacts:
    """Reads what there is to say of a run; a run that has saved no checkpoint yet has no tables.

    Args:
        run_path: the run folder, any fsspec URL.

    Raises:
        UserError: there is no run.
    """
    folder = RunFolder(run_path)
    config = folder.read_config()
    if config is None:
        raise UserError(f"no run folder at {run_path!r}; expected the run.path that a training wrote to")
    logged = read_curves(folder.read_metrics())
    state, world_size, tables = _read_newest(folder.checkpoints_path)
    return RunFacts(
        path=folder.path,
        config=config,
        status=folder.read_status(),
        step=logged.last_step if state is None else state.train.step,
        world_size=world_size,
        seconds=_last(logged, "seconds") if state is None else state.train.seconds,
        epochs=_last(logged, "epoch") if state is None else epochs_done(state.train, logged.curves),
        num_skipped=0 if state is None else state.optimizer.num_skipped,
        logged=logged,
        tables=tables,
        profile=_profile(folder),
        starts=folder.read_starts(),
    )


def _read_newest(checkpoints_path: str) -> tuple[RunState | None, int | None, list[TableFacts]]:
    """Returns state, ranks and tables of the newest checkpoint.

    The training of the run may save another one and delete this one meanwhile: then it is read instead.
    """
    while (path := latest_checkpoint(checkpoints_path)) is not None:
        try:
            with CheckpointReader(path) as reader:
                state = read_run_state(reader.manifest, path)
                return state, reader.manifest.world_size, _tables(reader, state)
        except (CheckpointError, FileNotFoundError):
            if is_complete(path):
                raise
    return None, None, []


def _last(logged: RunCurves, name: str) -> float:
    return logged.curves.get(name, ([], [0.0]))[1][-1]


def epochs_done(state: TrainState, curves: Curves) -> float:
    """Returns how many passes over its data a run has done; of a stream infinity.

    What is done of the last pass is known from the length of an epoch, which the records of `metrics.jsonl` tell;
    without records only whole passes count.
    """
    if state.stream:
        return math.inf
    steps, epochs = curves.get("epoch", ([], []))
    if not state.step_in_epoch or not steps or not steps[-1]:
        return float(state.epoch)
    return state.epoch + state.step_in_epoch * epochs[-1] / steps[-1]


def _tables(reader: CheckpointReader, state: RunState) -> list[TableFacts]:
    # Of a click log's columns: there row 0 stands for all values without a row of their own.
    columns = reader.state.get("features", {})
    starts = {group.get("initial_accumulator_value") for group in state.optimizer.param_groups}
    start = starts.pop() if len(starts) == 1 else None
    found = []
    for table in sorted(name.removesuffix("/weight") for name in reader.tensors if name.endswith("/weight")):
        num_rows, dim = reader.table(table).shape
        accumulator = reader.tensors.get(table + _ACCUMULATOR)
        num_untouched = None
        names = state.row_names.get(table, {})
        has_shared_row = isinstance(columns, Mapping) and table in columns and "file" in names
        if start is not None and accumulator is not None and accumulator.shape == (num_rows,):
            num_untouched = _count_equal(reader, table + _ACCUMULATOR, num_rows, start)
            if has_shared_row:
                # Values that are rare or unknown share row 0: without any in training it keeps its first values.
                slot = read_layout(reader.table(table).layout, num_rows, table).slot_of(torch.tensor([0]))
                num_untouched -= int((reader.gather(table + _ACCUMULATOR, slot) == start).sum())
        is_hashed = names.get("encoding") == "hash"
        found.append(TableFacts(table, num_rows, dim, num_untouched, has_shared_row, is_hashed))
    return found


def _count_equal(reader: CheckpointReader, name: str, num_rows: int, value: float) -> int:
    expected = torch.tensor(value, dtype=torch.float32)
    return sum(
        int((reader.read(name, start, min(start + _BLOCK_ROWS, num_rows)) == expected).sum())
        for start in range(0, num_rows, _BLOCK_ROWS)
    )


def _profile(folder: RunFolder) -> dict[str, str]:
    """Returns the table of stages of each rank that was profiled."""
    found: dict[str, str] = {}
    for rank in range(_MAX_PROFILES):
        try:
            found[f"rank {rank}"] = storage.read(folder.join(f"{PROFILE_NAME}/rank-{rank}.txt")).decode(
                errors="replace"
            )
        except FileNotFoundError:
            break
    return found
