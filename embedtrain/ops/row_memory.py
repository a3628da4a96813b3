"""Memory for rows that are read at random."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops import dispatch


def allocate_rows(shape: tuple[int, ...], fill: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor full of `fill`; on CPU in large pages where the system has them.

    With small pages each random row costs a walk of the page table beside the row itself.
    """
    rows = torch.empty(shape, dtype=dtype, device=device)
    if rows.numel() and dispatch.uses_native(rows):
        from embedtrain.ops.native import library

        # Before the first write: that is when pages are chosen.
        library.get().embedtrain_advise_huge_pages(rows.data_ptr(), rows.numel() * rows.element_size())
    return rows.fill_(fill)
