"""Stochastic rounding of float32 rows to bfloat16, so that small updates survive on average."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend.mix import mix64


def round_to_bfloat16(values: Tensor, keys: Tensor) -> Tensor:
    """Rounds each value to one of its two bfloat16 neighbours, the nearer with the higher probability.

    Args:
        values: [n, dim] float32.
        keys: [n] int64; the random bits depend only on the row's key and the column.

    Returns:
        [n, dim] bfloat16, equal to `values` in expectation. Values that bfloat16 can represent do not change.
    """
    columns = torch.arange(values.shape[1], device=values.device)
    noise = mix64(mix64(keys).unsqueeze(1) + columns) & 0xFFFF
    bits = values.contiguous().view(torch.int32).to(torch.int64) + noise
    return (bits & ~0xFFFF).to(torch.int32).view(torch.float32).to(torch.bfloat16)
