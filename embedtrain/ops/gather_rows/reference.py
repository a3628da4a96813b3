"""Gathering in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(source: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """See `embedtrain.ops.gather_rows`."""
    return source.index_select(0, rows).to(dtype)
