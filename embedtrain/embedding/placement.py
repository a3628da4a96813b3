"""Where rows live: on the device, or in host memory with copies of the hot ones on the device."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from embedtrain.sharding.layout import Layout, layout_of
from embedtrain.spec import TableSpec

PlacementChoice = Literal["device", "host", "auto"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Auto:
    """The choice "auto" for tables that are saved while they are trained.

    Attributes:
        save_bytes: of the device's memory, what a save in the background may take while it goes on; see
            `SaveOptions.max_extra_memory_bytes`.
    """

    save_bytes: int


@dataclass(frozen=True)
class Placement:
    """Where rows live.

    Attributes:
        is_host: whether in host memory, and not on the device.
        cache_bytes: of the device's memory, for copies of hot rows.
    """

    is_host: bool = False
    cache_bytes: int = 0


DEVICE = Placement()


def place_rows(
    choice: PlacementChoice | Auto,
    cache_bytes: int | None,
    groups: Sequence[Sequence[TableSpec]],
    world_size: int,
    device: torch.device,
) -> Placement:
    """Decides where this rank's rows live; `cache_bytes` is of all groups, the result's of each.

    "auto" takes the host if twice the weights and what a save may take do not fit into the device's free memory: the
    other half is for the optimizer's state and the batches. Ranks may decide differently: nothing that travels depends
    on it.

    Raises:
        ValueError: the choice is none, or `cache_bytes` is negative or given for rows on the device.
    """
    save_bytes = 0
    if isinstance(choice, Auto):
        save_bytes, choice = choice.save_bytes, "auto"
    if choice not in get_args(PlacementChoice):
        raise ValueError(f"placement must be one of {get_args(PlacementChoice)}, got {choice!r}")
    if cache_bytes is not None and (cache_bytes < 0 or choice == "device"):
        raise ValueError(f"cache_bytes must be at least 0 and goes with placement host or auto, got {cache_bytes}")
    if choice == "device" or (choice == "auto" and device.type != "cuda"):
        return DEVICE
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    weight_bytes = sum(
        layout_of(spec.num_rows, world_size, spec.layout).rows_per_rank * spec.dim * spec.dtype.itemsize
        for specs in groups
        for spec in specs
    )
    if choice == "auto" and 2 * weight_bytes + save_bytes <= free_bytes:
        return DEVICE
    if choice == "auto":
        _logger.info(
            f"tables of {weight_bytes:,} bytes per rank live in host memory: {free_bytes:,} bytes of {device} are free"
            + (f", of which a save may take {save_bytes:,}" if save_bytes else "")
        )
    together = free_bytes // 2 if cache_bytes is None else cache_bytes
    return Placement(is_host=True, cache_bytes=math.floor(together / len(groups)))


def hot_rows(
    pieces: Sequence[tuple[Layout, tuple[int, int], int]], cache_bytes: int, world_size: int, row_bytes: int
) -> Tensor:
    """Returns the local rows to keep on the device, ascending: those of low ids, by as many of each table as fit.

    Low ids are the hot ones, and every rank has its share of any first ids.

    Args:
        pieces: per table its layout, this rank's range of slots, and where that begins among the local rows.
        cache_bytes: what the copies may take.
        world_size: ranks that share the tables.
        row_bytes: of a row with its state.
    """
    num_ids = cache_bytes // row_bytes // len(pieces) * world_size
    rows = []
    for layout, (start, stop), first_row in pieces:
        slots = layout.slot_of(torch.arange(min(num_ids, layout.num_rows)))
        rows.append(slots[(slots >= start) & (slots < stop)] - start + first_row)
    return torch.cat(rows).sort().values
