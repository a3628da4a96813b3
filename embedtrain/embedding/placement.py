"""Decides where rows are stored: on the device, or in host memory with a cache of hot rows on the device."""

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
    """Describes the placement "auto" for tables that are saved during training.

    Attributes:
        save_bytes: device memory to reserve for a background save; see `SaveOptions.max_extra_memory_bytes`.
    """

    save_bytes: int


@dataclass(frozen=True)
class Placement:
    """Describes where the rows of a table group are stored.

    Attributes:
        is_host: whether rows are stored in host memory; else on the device.
        cache_bytes: device memory for copies of hot rows.
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
    """Returns where this rank stores its rows.

    "auto" chooses the host if twice the size of the weights plus the memory of a save exceeds the device's free memory.
    The factor two leaves room for optimizer state and batches. Ranks may choose differently, because the exchange does
    not depend on it.

    Args:
        choice: the placement that the user gave.
        cache_bytes: device memory for the caches of all groups together; None for half of the free memory. The result
            has the share of one group.
        groups: the tables of each group.
        world_size: number of ranks that share the tables.
        device: device of this rank.

    Raises:
        ValueError: the choice is invalid, or `cache_bytes` is negative or given for rows on the device.
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
            f"tables of {weight_bytes:,} bytes per rank are stored in host memory: {device} has {free_bytes:,} bytes "
            "of free memory" + (f", of which a save may take {save_bytes:,}" if save_bytes else "")
        )
    together = free_bytes // 2 if cache_bytes is None else cache_bytes
    return Placement(is_host=True, cache_bytes=math.floor(together / len(groups)))


def hot_rows(
    pieces: Sequence[tuple[Layout, tuple[int, int], int]], cache_bytes: int, world_size: int, row_bytes: int
) -> Tensor:
    """Returns the local rows to keep on the device, ascending: the rows with the lowest ids of each table that fit.

    Low ids are hot, and the layout gives every rank an equal share of them.

    Args:
        pieces: per table, its layout, this rank's range of slots, and the first local row of the range.
        cache_bytes: memory for the copies.
        world_size: number of ranks that share the tables.
        row_bytes: size of a row with its optimizer state.
    """
    num_ids = cache_bytes // row_bytes // len(pieces) * world_size
    rows = []
    for layout, (start, stop), first_row in pieces:
        slots = layout.slot_of(torch.arange(min(num_ids, layout.num_rows)))
        rows.append(slots[(slots >= start) & (slots < stop)] - start + first_row)
    return torch.cat(rows).sort().values
