"""Contents of the package of a retrieval model: the vectors of users and items, and their raw ids."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from embedtrain.data.interactions import Interactions
from embedtrain.ops._backend.transfer import to_host
from embedtrain.recipes.base import Packed, PackedTable
from embedtrain.recipes.retrieval.model import ITEM, USER, Retrieval

_ROWS_AT_ONCE = 16384


def packed_sides(model: Retrieval, interactions: Interactions, step: int) -> Packed:
    """Returns the package contents of a model in one process; see `Recipe.pack`."""
    sides = {USER: interactions.users, ITEM: interactions.items}
    dim = model.tables.shards[ITEM].spec.dim
    return Packed(
        model="retrieval",
        step=step,
        facts={"sides": {side: {"table": _table(side), "names": _names(side)} for side in sides}},
        tables={
            _table(side): PackedTable(len(names), dim, functools.partial(_blocks, model, side, len(names)))
            for side, names in sides.items()
        },
        texts={_names(side): names.utf8_words for side, names in sides.items()},
    )


def _table(side: str) -> str:
    return f"{side}s.safetensors"


def _names(side: str) -> str:
    return f"{side}-names.safetensors"


def _blocks(model: Retrieval, side: str, num_rows: int) -> Iterator[Tensor]:
    with torch.no_grad():
        for start in range(0, num_rows, _ROWS_AT_ONCE):
            ids = torch.arange(start, min(start + _ROWS_AT_ONCE, num_rows))
            yield to_host(model.encode({side: ids})[side])
