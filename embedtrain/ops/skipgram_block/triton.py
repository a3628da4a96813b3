"""Skip-gram as dense products: a block of centres against the band of words around it.

The contexts of neighbouring centres are nearly the same words. So a program takes 16 consecutive centres, the 32 words
that their windows lie in, and one product of matrices gives every logit of a context and a target; those outside a
centre's window are masked. For a window of 5 that is three times the arithmetic and a sixth of the reads of taking
each centre's window apart, and matrix units do the arithmetic. The gradient of each use of a row is written down, and
the uses of a row are then summed in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedtrain.ops._backend.triton_launch import num_warps, on_device_of, power_of_2
from embedtrain.ops._backend.triton_runs import sum_runs
from embedtrain.ops.skipgram_block.types import TextBlock

_CENTRES = 16
_BAND = 32
_LEAST_SIDE = 16
"""Of the matrices that matrix units multiply."""
MAX_DIM = 256
"""Wider rows of a band and of a block of centres do not fit into a program's memory."""


def skipgram_block(vectors: Tensor, block: TextBlock, grad_factor: float, reach: int) -> tuple[Tensor, Tensor]:
    """See `embedtrain.ops.skipgram_block`.

    Args:
        vectors: as there.
        block: as there.
        grad_factor: as there.
        reach: no window holds a word further than this from its centre.
    """
    vectors = vectors.contiguous()
    n, dim = block.num_positions, vectors.shape[1]
    if n == 0:
        return torch.zeros((), dtype=torch.float64, device=vectors.device), torch.zeros_like(vectors)
    own, negatives = block.targets[:, :1], block.targets[:, 1:]
    # [1 + k, n]; -1 is none
    targets = torch.cat([own, negatives.masked_fill(negatives == own, -1)], dim=1).T.contiguous()
    num_blocks, num_bands = triton.cdiv(n, _CENTRES), triton.cdiv(_CENTRES + 2 * reach, _BAND)
    context_grad = torch.empty(num_blocks, num_bands, _BAND, dim, device=vectors.device)
    target_grad = torch.empty(num_bands, *targets.shape, dim, device=vectors.device)
    loss = torch.empty(num_blocks, num_bands, device=vectors.device)
    columns = max(_LEAST_SIDE, power_of_2(dim))
    with on_device_of(vectors):
        _block_against_band[(num_blocks, num_bands)](
            vectors,
            block.inputs.contiguous(),
            targets,
            block.starts.contiguous(),
            block.stops.contiguous(),
            context_grad,
            target_grad,
            loss,
            n,
            dim,
            targets.shape[0],
            reach,
            CENTRES=_CENTRES,
            BAND=_BAND,
            COLUMNS=columns,
            num_warps=max(4, num_warps(_BAND * columns)),
            # Loads ahead of their products take shared memory, which wide rows need for themselves.
            num_stages=2 if columns <= 128 else 1,
        )
    used = torch.cat([_rows_of_bands(block, num_blocks, num_bands, reach, vectors.shape[0]), targets.flatten()])
    if num_bands > 1:
        used = torch.cat([used, targets.flatten().repeat(num_bands - 1)])
    return loss.sum(dtype=torch.float64), _sum_by_row(vectors, used, (context_grad, target_grad), grad_factor)


def _rows_of_bands(block: TextBlock, num_blocks: int, num_bands: int, reach: int, nowhere: int) -> Tensor:
    """Returns the row of every place of every band; `nowhere` before the text begins and after it ends."""
    device = block.inputs.device
    firsts = torch.arange(num_blocks, device=device) * _CENTRES - reach
    positions = (firsts.unsqueeze(1) + torch.arange(num_bands * _BAND, device=device)).flatten()
    inside = (positions >= 0) & (positions < block.num_positions)
    rows = block.inputs[positions.clamp(0, block.num_positions - 1)]
    return rows.masked_fill(~inside, nowhere)


def _sum_by_row(vectors: Tensor, used: Tensor, grads: tuple[Tensor, Tensor], grad_factor: float) -> Tensor:
    num_rows, dim = vectors.shape
    # Uses that are none, -1 among the negatives and places outside the text, come last and into no sum.
    rows, order = torch.sort(used.masked_fill(used < 0, num_rows).int(), stable=True)
    bounds = torch.arange(num_rows + 1, device=vectors.device, dtype=torch.int32)
    starts = torch.searchsorted(rows, bounds)
    of_uses = torch.cat([grad.view(-1, dim) for grad in grads])
    return sum_runs(of_uses, order, starts, factor=grad_factor, has_empty_runs=True)


@triton.jit
def _block_against_band(
    vectors,
    inputs,
    targets,
    starts,
    stops,
    context_grad,
    target_grad,
    loss,
    n,
    dim,
    num_targets,
    reach,
    CENTRES: tl.constexpr,
    BAND: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    band = tl.program_id(1)
    centre = block * CENTRES + tl.arange(0, CENTRES)
    context = block * CENTRES - reach + band * BAND + tl.arange(0, BAND)
    column = tl.arange(0, COLUMNS)
    inside = (column < dim)[None, :]
    is_centre = centre < n
    is_word = (context >= 0) & (context < n)

    start = tl.load(starts + centre, mask=is_centre, other=0)
    stop = tl.load(stops + centre, mask=is_centre, other=0)
    is_pair = (context[:, None] >= start[None, :]) & (context[:, None] < stop[None, :])
    is_pair = is_pair & (context[:, None] != centre[None, :])

    word = tl.load(inputs + context, mask=is_word, other=0)
    x = tl.load(vectors + word[:, None] * dim + column[None, :], mask=is_word[:, None] & inside, other=0.0)
    x_grad = tl.zeros([BAND, COLUMNS], dtype=tl.float32)
    losses = tl.zeros([BAND, CENTRES], dtype=tl.float32)
    place = centre
    written = centre + band.to(tl.int64) * num_targets * n
    for target in range(0, num_targets):
        row = tl.load(targets + place, mask=is_centre, other=-1)
        is_target = row >= 0
        y = tl.load(vectors + row[:, None] * dim + column[None, :], mask=is_target[:, None] & inside, other=0.0)
        is_counted = is_pair & is_target[None, :]
        logit = tl.dot(x, tl.trans(y), input_precision="tf32x3")
        # The first target is the centre itself, whose label is 1: there the loss is of the logit's negative.
        signed = tl.where(target == 0, -logit, logit)
        decay = tl.exp(-tl.abs(signed))
        losses += tl.where(is_counted, tl.maximum(signed, 0.0) + tl.log(1.0 + decay), 0.0)
        probability = tl.where(signed < 0, decay, 1.0) / (1.0 + decay)
        slope = tl.where(is_counted, tl.where(target == 0, -probability, probability), 0.0)
        x_grad += tl.dot(slope, y, input_precision="tf32x3")
        y_grad = tl.dot(tl.trans(slope), x, input_precision="tf32x3")
        at = written[:, None] * dim + column[None, :]
        tl.store(target_grad + at, y_grad, mask=is_centre[:, None] & inside)
        place += n
        written += n
    at = ((block * tl.num_programs(1) + band) * BAND + tl.arange(0, BAND))[:, None] * dim + column[None, :]
    tl.store(context_grad + at, x_grad, mask=inside)
    tl.store(loss + block * tl.num_programs(1) + band, tl.sum(tl.sum(losses, axis=1), axis=0))
