"""Contents of the package of a SASRec model: the vectors of items, their raw ids, the network and a program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from embedtrain.data.interactions import Interactions
from embedtrain.recipes.base import NETWORK_NAME, Packed, PackedNetwork, PackedTable
from embedtrain.recipes.sasrec.config import ITEM
from embedtrain.recipes.sasrec.encoder import PaddedEncoder
from embedtrain.recipes.sasrec.model import Sasrec

_ROWS_AT_ONCE = 16384
_TABLE, _NAMES, _PROGRAM = "items.safetensors", "item-names.safetensors", "next_items.py"


def packed_model(model: Sasrec, interactions: Interactions, step: int) -> Packed:
    """Returns the package contents of a model in one process; see `Recipe.pack`."""
    spec, max_length = model.tables.shards[ITEM].spec, model.architecture.max_length
    return Packed(
        model="sasrec",
        step=step,
        facts={
            "sides": {ITEM: {"table": _TABLE, "names": _NAMES}},
            "network": NETWORK_NAME,
            "max_length": max_length,
            "dim": spec.dim,
        },
        tables={_TABLE: PackedTable(spec.num_rows, spec.dim, lambda: _blocks(model, spec.num_rows))},
        texts={_NAMES: interactions.items.utf8_words},
        network=PackedNetwork(
            PaddedEncoder(model.dense.cpu()),
            (torch.zeros(3, max_length, spec.dim), torch.ones(3, dtype=torch.int64)),
        ),
        programs={_PROGRAM: Path(__file__).with_name(_PROGRAM).read_text(encoding="utf-8")},
    )


@torch.no_grad()
def _blocks(model: Sasrec, num_rows: int) -> Iterator[Tensor]:
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        yield model.tables({ITEM: torch.arange(start, min(start + _ROWS_AT_ONCE, num_rows))})[ITEM].cpu()
