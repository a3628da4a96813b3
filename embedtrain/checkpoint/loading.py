"""Loading a checkpoint into a model's shards: all tables, or selected ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from embedtrain.checkpoint.manifest import TensorInfo, canonical_json
from embedtrain.checkpoint.reader import CONVERTIBLE, CheckpointReader
from embedtrain.embedding.shard_view import ShardView, StepCount
from embedtrain.errors import CheckpointError, UserError


@dataclass(frozen=True)
class LoadOptions:
    """Says which tensors are loaded and which differences between checkpoint and model are allowed.

    Attributes:
        convert_dtype: whether bfloat16 weights may be loaded into float32 tables, and float32 into bfloat16.
        optimizer_state: "require" loads it; "reset" keeps the model's initial optimizer state.
        tables: names of the tables to load; the other tables keep their values. None loads all.
    """

    convert_dtype: bool = False
    optimizer_state: Literal["require", "reset"] = "require"
    tables: Sequence[str] | None = None

    def selects(self, name: str) -> bool:
        """Returns whether the tensor `name` is loaded."""
        table, _, kind = name.rpartition("/")
        is_wanted = self.tables is None or table in self.tables
        return is_wanted and (self.optimizer_state == "require" or kind == "weight")


def load_shards(reader: CheckpointReader, shards: Sequence[ShardView], options: LoadOptions | None = None) -> list[str]:
    """Fills the shards' tensors in place and restores their tables' step counts, on any number of ranks.

    Not a collective. A rank passes a shard for every tensor of the checkpoint, with zero rows if it holds none.
    Nothing is loaded if any difference is found that `options` does not allow.

    Returns:
        The names of the tensors that were not loaded.

    Raises:
        UserError: `options` names a table that the model or the checkpoint does not have.
        CheckpointError: names, shapes, dtypes or layouts differ; the message lists every difference.
        CorruptCheckpointError: see `CheckpointReader`; the shards may be partly filled and must not be used.
    """
    options = options or LoadOptions()
    _check_tables(reader, shards, options)
    wanted = [view for view in shards if options.selects(view.name)]
    saved = {name: info for name, info in reader.tensors.items() if options.selects(name)}
    steps = reader.manifest.table_steps if options.optimizer_state == "require" else {}
    differences = [*_differences(saved, wanted, options.convert_dtype), *_differing_steps(steps, wanted)]
    if differences:
        raise CheckpointError(f"{reader.path} does not fit the model:\n  " + "\n  ".join(differences))
    for view in wanted:
        if view.changes is not None:
            view.changes.before_update_of_all()
        reader.read_into(view.name, view.offset, view.tensor)
        if view.steps is not None and view.table in steps:
            view.steps.restore(steps[view.table])
    return [view.name for view in shards if not options.selects(view.name)]


def _differing_steps(steps: Mapping[str, int], shards: Sequence[ShardView]) -> Iterator[str]:
    """Yields a message per step count that tables share in the model but not in the checkpoint."""
    counts: dict[StepCount, dict[str, int]] = {}
    for view in shards:
        if view.steps is not None and view.table in steps:
            counts.setdefault(view.steps, {})[view.table] = steps[view.table]
    for found in counts.values():
        if len(set(found.values())) > 1:
            told = [f"{steps} steps for {table}" for table, steps in found.items()]
            yield f"{_and(list(found))} share an optimizer in the model, but the checkpoint has {_and(told)}"


def _and(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]])


def _check_tables(reader: CheckpointReader, shards: Sequence[ShardView], options: LoadOptions) -> None:
    places = {"the model": [view.name for view in shards], reader.path: list(reader.tensors)}
    for place, names in places.items():
        tables = {name.rpartition("/")[0] for name in names}
        missing = sorted(set(options.tables or []) - tables)
        if missing:
            raise UserError(f"cannot load table {', '.join(missing)}: {place} has only {sorted(tables)}")


def _differences(tensors: Mapping[str, TensorInfo], shards: Sequence[ShardView], converts: bool) -> Iterator[str]:
    expected = {view.name for view in shards}
    for name in sorted(expected - tensors.keys()):
        yield f"{name}: missing from the checkpoint"
    for name in sorted(tensors.keys() - expected):
        yield f"{name}: only in the checkpoint"
    for view in shards:
        info = tensors.get(view.name)
        if info is None:
            continue
        if info.shape != view.global_shape:
            yield f"{view.name}: shape {info.shape} in the checkpoint, {view.global_shape} in the model"
        is_converted = converts and {info.dtype, view.tensor.dtype} == CONVERTIBLE
        if info.dtype != view.tensor.dtype and not is_converted:
            yield f"{view.name}: {info.dtype} in the checkpoint, {view.tensor.dtype} in the model"
        if canonical_json(info.layout) != canonical_json(view.layout):
            yield f"{view.name}: layout {info.layout} in the checkpoint, {dict(view.layout)} in the model"
