"""Exposes tables in a module's state dict as DTensors in the order of slots, for checkpoint programs such as torch's.

`torch.distributed.tensor` is imported inside functions, because its import is slow.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embedtrain.embedding.shard_view import ShardView, StepCount
from embedtrain.errors import UserError
from embedtrain.optim.stores import STEP

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def add_entries(
    destination: dict[str, Any],
    prefix: str,
    views: Sequence[ShardView],
    mesh: DeviceMesh | None,
    taken: Collection[str],
) -> None:
    """Adds weights and states as DTensors ("item.weight") and the step count of each table ("item.step").

    Args:
        destination: state dict that gets the entries.
        prefix: prefix of the entries' names.
        views: the shards.
        mesh: the ranks; None for one process.
        taken: names of the module's parameters and buffers.

    Raises:
        ValueError: a parameter or buffer has the name of an entry, for example in a subclass.
    """
    added = {_key_of(view): as_entry(view, mesh) for view in views}
    added |= {f"{table}.{STEP}": torch.tensor(steps.value) for table, steps in _counts(views).items()}
    for key, entry in added.items():
        if key in taken:
            raise ValueError(f"a table and another part of the module both have the entry {key!r}: rename one")
        destination[prefix + key] = entry


def take_entries(
    state_dict: Mapping[str, Any], prefix: str, views: Sequence[ShardView], missing: list[str], faults: list[str]
) -> dict[str, Any]:
    """Copies the entries of `add_entries`, or whole tensors, into the shards; returns the other entries.

    Args:
        state_dict: the entries.
        prefix: prefix of the entries' names.
        views: the shards.
        missing: gets the names of entries that `state_dict` lacks.
        faults: gets a message per entry that cannot be loaded.
    """
    rest = dict(state_dict)
    for view in views:
        if (key := prefix + _key_of(view)) in rest:
            faults += _take_entry(view, rest.pop(key))
        else:
            missing.append(key)
    found: dict[StepCount, int] = {}
    for table, steps in _counts(views).items():
        if (key := f"{prefix}{table}.{STEP}") not in rest:
            missing.append(key)
            continue
        value = int(rest.pop(key))
        if found.setdefault(steps, value) != value:
            faults.append(f"{key}: {value} steps, but {found[steps]} for another table with the same optimizer")
        steps.restore(value)
    return rest


def refuse_clashes(tables: Sequence[str]) -> None:
    """Refuses a table whose name is a state dict entry of another table, as "item.weight" is an entry of "item".

    Raises:
        UserError: there is such a table.
    """
    known = set(tables)
    for name in tables:
        parts = name.split(".")
        for number in range(1, len(parts)):
            table = ".".join(parts[:number])
            if table in known and parts[number] in ("weight", STEP):
                raise UserError(
                    f"the name of table {name!r} begins with {table}.{parts[number]}, the name of an entry of the "
                    f"table {table!r} in state dicts: rename one of the tables"
                )


def as_attributes(views: Sequence[ShardView]) -> SimpleNamespace:
    """Returns an object with nested attributes for the dotted names of all entries.

    Raises:
        ValueError: the name of an entry is a prefix of the name of another table's entry.
    """
    root = SimpleNamespace()
    keys = [*map(_key_of, views), *(f"{table}.{STEP}" for table in _counts(views))]
    for key in keys:
        *parents, last = key.split(".")
        node = root
        for name in parents:
            node = vars(node).setdefault(name, SimpleNamespace())
            if node is None:
                raise ValueError(f"the entry {key!r} begins with an entry of another table: rename one of the tables")
        if vars(node).setdefault(last, None) is not None:
            raise ValueError(f"entries of other tables begin with the entry {key!r}: rename one of the tables")
    return root


def _key_of(view: ShardView) -> str:
    return view.name.replace("/", ".")


def _counts(views: Sequence[ShardView]) -> dict[str, StepCount]:
    """Returns the step counts by table; tables without an optimizer are left out."""
    return {view.table: view.steps for view in views if view.steps is not None and view.steps.value is not None}


def as_entry(view: ShardView, mesh: DeviceMesh | None) -> Tensor:
    """Returns the whole tensor as a DTensor that shares memory with this rank's rows; a plain tensor without a mesh."""
    # A separate storage object over the same memory: torch's asynchronous save fails for tensors that share a storage,
    # and `torch.save` writes whole storages.
    rows = torch.from_dlpack(view.tensor)
    if mesh is None:
        return rows
    from torch.distributed.tensor import DTensor, Shard

    stride = tuple(math.prod(view.global_shape[dim + 1 :]) for dim in range(len(view.global_shape)))
    shape = torch.Size(view.global_shape)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _take_entry(view: ShardView, entry: Tensor) -> list[str]:
    """Copies this rank's rows of an entry into the shard; returns messages if the entry does not fit.

    Args:
        view: the shard.
        entry: a DTensor as `as_entry` returns it, sharded as the model is; or the whole tensor in the order of slots.
    """
    from torch.distributed.tensor import DTensor

    if tuple(entry.shape) != view.global_shape:
        return [f"{_key_of(view)}: shape {tuple(entry.shape)} in the state dict, {view.global_shape} in the model"]
    if isinstance(entry, DTensor):
        rows = entry.to_local()
        if rows.shape != view.tensor.shape:
            return [f"{_key_of(view)}: its DTensor is not sharded over the ranks like the model: expected Shard(0)"]
    else:
        rows = entry[view.offset : view.stop]
    view.tensor.copy_(rows)
    return []
