"""The tables as entries of a module's state dict: DTensors in order of slots, for other checkpoint programs.

torch's module of DTensors takes long to import, and is imported when it is first needed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embedtrain.embedding.shard_view import ShardView

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def key_of(view: ShardView) -> str:
    """Returns the name of a tensor in a state dict: "item.weight" for "item/weight"."""
    return view.name.replace("/", ".")


def as_entry(view: ShardView, mesh: DeviceMesh | None) -> Tensor:
    """Returns the whole tensor as a DTensor that shares memory with this rank's rows; plain without ranks."""
    if mesh is None:
        return view.tensor
    from torch.distributed.tensor import DTensor, Shard

    stride = tuple(math.prod(view.global_shape[dim + 1 :]) for dim in range(len(view.global_shape)))
    shape = torch.Size(view.global_shape)
    return DTensor.from_local(view.tensor, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def take_entry(view: ShardView, entry: Tensor) -> str | None:
    """Copies this rank's rows of an entry into the shard; returns what is wrong with it, if anything is.

    Args:
        view: the shard.
        entry: what `as_entry` returns, on any ranks alike; or the whole tensor, in order of slots.
    """
    from torch.distributed.tensor import DTensor

    if tuple(entry.shape) != view.global_shape:
        return f"{key_of(view)}: shape {tuple(entry.shape)} in the state dict, {view.global_shape} in the model"
    if isinstance(entry, DTensor):
        rows = entry.to_local()
        if rows.shape != view.tensor.shape:
            return f"{key_of(view)}: its DTensor is not cut over the ranks as the model's: expected Shard(0)"
    else:
        rows = entry[view.offset : view.stop]
    view.tensor.copy_(rows)
    return None
