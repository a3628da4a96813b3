"""What a report says of a run, read from its folder: no model is built and nothing is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from embedtrain import storage
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.export import Vectors, neighbors
from embedtrain.export.vectors import FloatRows
from embedtrain.recipes.trained import open_run_vectors
from embedtrain.sharding.layout import read_layout
from embedtrain.train.run_folder import PROFILE_NAME, RunFolder
from embedtrain.train.state import RunState, TrainState, read_run_state

STAGE, MEMORY = "stage/", "memory/"
BUSIEST_RANK = f"{STAGE}busiest_rank"

_ACCUMULATOR = "/accumulator"
_BLOCK_ROWS = 1 << 20
_NUM_FREQUENT = 300

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableFacts:
    """A table of the newest checkpoint.

    Attributes:
        name: of the table.
        num_rows: its rows.
        dim: its columns.
        num_untouched: rows whose accumulator is still at its first value; None where that cannot be told.
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
        step: of the newest checkpoint.
        world_size: ranks that saved it.
        seconds: spent in training.
        epochs: passes over the data that are done, as `epochs_done` counts them.
        num_skipped: steps left out because a gradient was not finite.
        curves: per number that was logged, its steps and values.
        tables: in order of name.
        neighbors: of some frequent words, each with its nearest and their cosines.
        frequent_words: the most frequent ones, or the first rows' names; none where no table is the one to look at.
        frequent_rows: [n, dim]; their vectors.
        noun: what those stand for: a word, an item.
        profile: table of seconds per stage of each rank, by name; empty without `train --profile`.
    """

    path: str
    config: str
    status: Mapping[str, Any]
    step: int
    world_size: int
    seconds: float
    epochs: float
    num_skipped: int
    curves: Mapping[str, tuple[list[int], list[float]]]
    tables: Sequence[TableFacts]
    neighbors: Mapping[str, Sequence[tuple[str, float]]] = field(default_factory=dict)
    frequent_words: Sequence[str] = ()
    frequent_rows: FloatRows = field(default_factory=lambda: np.empty((0, 0), np.float32))
    profile: Mapping[str, str] = field(default_factory=dict)
    noun: str = "row"

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds a step by stage, mean over what was logged, the longest first."""
        means = {
            name.removeprefix(STAGE): sum(values) / len(values)
            for name, (_, values) in self.curves.items()
            if name.startswith(STAGE) and name != BUSIEST_RANK
        }
        return dict(sorted(means.items(), key=lambda item: -item[1]))


def read_facts(run_path: str, words: Sequence[str], runtime: Runtime, num_neighbors: int = 6) -> RunFacts:
    """Reads what there is to say of a run.

    Args:
        run_path: the run folder, any fsspec URL.
        words: whose neighbours to find; where there are none, of frequent words that are not the most common.
        runtime: of this process.
        num_neighbors: of each.

    Raises:
        UserError: there is no run, no complete checkpoint, or no such word.
    """
    folder = RunFolder(run_path)
    path = latest_checkpoint(folder.checkpoints_path)
    if path is None:
        raise UserError(f"there is no complete checkpoint in {run_path!r}; a report needs one")
    with CheckpointReader(path) as reader:
        state, world_size = read_run_state(reader.manifest, path), reader.manifest.world_size
        tables = _tables(reader, state)
    near, frequent_words, frequent_rows, noun = _vectors(run_path, words, runtime, num_neighbors)
    curves = read_curves(folder)
    return RunFacts(
        path=folder.path,
        config=folder.read_config() or "",
        status=folder.read_status(),
        step=state.train.step,
        world_size=world_size,
        seconds=state.train.seconds,
        epochs=epochs_done(state.train, curves),
        num_skipped=state.optimizer.num_skipped,
        curves=curves,
        tables=tables,
        neighbors=near,
        frequent_words=frequent_words,
        frequent_rows=frequent_rows,
        noun=noun,
        profile=_profile(folder),
    )


def read_curves(folder: RunFolder) -> dict[str, tuple[list[int], list[float]]]:
    """Returns the steps and values of each number in metrics.jsonl; nulls and texts are left out."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in folder.read_metrics():
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    return curves


def epochs_done(state: TrainState, curves: Mapping[str, tuple[list[int], list[float]]]) -> float:
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


def _vectors(
    run_path: str, words: Sequence[str], runtime: Runtime, top: int
) -> tuple[dict[str, list[tuple[str, float]]], list[str], FloatRows, str]:
    """Returns neighbours, words and vectors of the most frequent rows, and what these stand for."""
    try:
        opened = open_run_vectors(run_path, None, runtime)
    except UserError as error:
        if words:
            raise
        # Several tables, and none is said to be the one to look at; or the data of a retrieval run are gone.
        _logger.warning(f"the report is without neighbours and map: {error}")
        return {}, [], np.empty((0, 0), np.float32), "row"
    with opened as vectors:
        near = {word: neighbors(vectors, word, top) for word in words or _examples(vectors)}
        frequent = vectors.first(_NUM_FREQUENT)
        return near, list(frequent.words), frequent.rows(0, frequent.num_rows), vectors.noun


def _examples(vectors: Vectors) -> list[str]:
    """Returns words spread over the frequent ones, the most common left out: they stand beside everything."""
    places = [100, 200, 400, 800, 1600, 3200]
    if vectors.num_rows <= places[2]:
        places = list(range(0, vectors.num_rows, 1 + vectors.num_rows // 6))
    return [vectors.words[place] for place in places if place < vectors.num_rows]


def _profile(folder: RunFolder) -> dict[str, str]:
    found = {}
    for rank in range(64):
        try:
            found[f"rank {rank}"] = storage.read(folder.join(f"{PROFILE_NAME}/rank-{rank}.txt")).decode(
                errors="replace"
            )
        except FileNotFoundError:
            break
    return found
