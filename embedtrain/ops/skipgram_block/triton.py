"""The word2vec objective as dense matrix products: a block of centres times the band of words around it.

The contexts of neighbouring centres are nearly the same words. So a program takes 16 consecutive centres and the band
of 32 words that contains their windows. For skip-gram, one matrix product gives the logits of all pairs of a context
and a target, and pairs outside a window are masked. Compared with separate products per window of 5, this is three
times the arithmetic, which tensor cores do, and a sixth of the reads.

For CBOW, the product of the window mask (0 or 1) and the words gives the sums of the windows.

The program writes the gradient of each use of a row. A second kernel sums the uses of each row in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedtrain.ops._backend.triton_launch import on_device_of, power_of_2
from embedtrain.ops._backend.triton_runs import sum_runs
from embedtrain.ops.skipgram_block.types import Architecture, TextBlock

_CENTRES = 16
_BAND = 32
_LEAST_SIDE = 16
"""Smallest side of a matrix that tensor cores multiply."""
_MOST_COLUMNS, _COLUMNS_OF_PARTS = 128, 64
"""Rows with more columns than the first number do not fit into the registers of a skip-gram program. Such rows are cut
into parts, whose number of columns is the second number."""


class _Uses(NamedTuple):
    """Holds the gradient of each use of a row.

    Attributes:
        context_grad: [num_blocks, num_bands, _BAND, dim]; gradients of the words of each band.
        target_grad: [num_bands or 1, 1 + k, num_positions, dim]; gradients of the targets.
        loss: partial losses of any shape, whose sum is the loss.
    """

    context_grad: Tensor
    target_grad: Tensor
    loss: Tensor


def skipgram_block(
    vectors: Tensor, block: TextBlock, architecture: Architecture, factor: float, reach: int
) -> tuple[Tensor, Tensor]:
    """See `embedtrain.ops.skipgram_block`; `reach` is the largest distance of a word from its window's centre."""
    vectors = vectors.contiguous()
    if block.num_positions == 0:
        return torch.zeros((), dtype=torch.float64, device=vectors.device), torch.zeros_like(vectors)
    own, negatives = block.targets[:, :1], block.targets[:, 1:]
    # [1 + k, n]; -1 marks a negative to skip
    targets = torch.cat([own, negatives.masked_fill(negatives == own, -1)], dim=1).T.contiguous()
    n, dim, device = block.num_positions, vectors.shape[1], vectors.device
    num_blocks, num_bands = triton.cdiv(n, _CENTRES), triton.cdiv(_CENTRES + 2 * reach, _BAND)
    is_skipgram = architecture == "skipgram"
    uses = _Uses(
        torch.empty(num_blocks, num_bands, _BAND, dim, device=device),
        torch.empty(num_bands if is_skipgram else 1, *targets.shape, dim, device=device),
        torch.empty((num_blocks, num_bands) if is_skipgram else num_blocks, device=device),
    )
    text = [tensor.contiguous() for tensor in (block.inputs, targets, block.starts, block.stops)]
    with on_device_of(vectors):
        launch = _skipgram if is_skipgram else _cbow
        launch(num_blocks, num_bands, dim, vectors, *text, *uses, n, targets.shape[0], reach)
    rows = [_rows_of_bands(block, num_blocks, num_bands, reach, vectors.shape[0])]
    rows += [targets.flatten()] * len(uses.target_grad)
    return uses.loss.sum(dtype=torch.float64) * factor, _sum_by_row(vectors, torch.cat(rows), uses, factor)


def _skipgram(num_blocks: int, num_bands: int, dim: int, *given: Tensor | int) -> None:
    columns = max(_LEAST_SIDE, power_of_2(dim)) if dim <= _MOST_COLUMNS else _COLUMNS_OF_PARTS
    num_parts = triton.cdiv(dim, columns)
    _block_against_band[(num_blocks, num_bands, num_parts)](
        *given,
        DIM=dim,
        CENTRES=_CENTRES,
        BAND=_BAND,
        COLUMNS=columns,
        PARTS=num_parts,
        num_warps=4,
        num_stages=2 if num_parts == 1 else 1,
    )


def _cbow(num_blocks: int, num_bands: int, dim: int, *given: Tensor | int) -> None:
    columns = max(_LEAST_SIDE, power_of_2(dim))
    _block_of_means[(num_blocks,)](
        *given,
        num_bands,
        DIM=dim,
        CENTRES=_CENTRES,
        BAND=_BAND,
        COLUMNS=columns,
        num_warps=max(4, min(32, columns // 64)),
        num_stages=1,
    )


def _rows_of_bands(block: TextBlock, num_blocks: int, num_bands: int, reach: int, nowhere: int) -> Tensor:
    """Returns the row at every position of every band; `nowhere` for positions outside the text."""
    device = block.inputs.device
    firsts = torch.arange(num_blocks, device=device) * _CENTRES - reach
    positions = (firsts.unsqueeze(1) + torch.arange(num_bands * _BAND, device=device)).flatten()
    inside = (positions >= 0) & (positions < block.num_positions)
    rows = block.inputs[positions.clamp(0, block.num_positions - 1)]
    return rows.masked_fill(~inside, nowhere)


def _sum_by_row(vectors: Tensor, used: Tensor, uses: _Uses, factor: float) -> Tensor:
    num_rows, dim = vectors.shape
    # Skipped negatives (-1) and positions outside the text sort last, after the end of the last run.
    rows, order = torch.sort(used.masked_fill(used < 0, num_rows).int(), stable=True)
    bounds = torch.arange(num_rows + 1, device=vectors.device, dtype=torch.int32)
    starts = torch.searchsorted(rows, bounds)
    of_uses = torch.cat([uses.context_grad.view(-1, dim), uses.target_grad.view(-1, dim)])
    return sum_runs(of_uses, order, starts, factor=factor, has_empty_runs=True)


@triton.jit
def _rows_at(vectors, row, is_row, first_column, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Loads columns of rows, [rows, COLUMNS]; zeros for masked rows and columns."""
    column = first_column + tl.arange(0, COLUMNS)
    mask = is_row[:, None] & (column < DIM)[None, :]
    return tl.load(vectors + row[:, None] * DIM + column[None, :], mask=mask, other=0.0)


@triton.jit
def _pairs(context, centre, start, stop):
    """Returns a mask, [contexts, centres]: whether the word is in the centre's window and is not the centre."""
    inside = (context[:, None] >= start[None, :]) & (context[:, None] < stop[None, :])
    return inside & (context[:, None] != centre[None, :])


@triton.jit
def _loss_and_slope(logit, is_own):
    """Returns the negative-sampling loss of logits and its derivative; the label is 1 for the centre itself."""
    signed = tl.where(is_own, -logit, logit)
    decay = tl.exp(-tl.abs(signed))
    probability = tl.where(signed < 0, decay, 1.0) / (1.0 + decay)
    return tl.maximum(signed, 0.0) + tl.log(1.0 + decay), tl.where(is_own, -probability, probability)


@triton.jit(do_not_specialize=["n"])
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
    num_targets,
    reach,
    DIM: tl.constexpr,
    CENTRES: tl.constexpr,
    BAND: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Computes skip-gram. Every part computes all logits, in the same order, and the gradients of its own columns."""
    block = tl.program_id(0).to(tl.int64)
    band = tl.program_id(1)
    part = tl.program_id(2)
    centre = block * CENTRES + tl.arange(0, CENTRES)
    context = block * CENTRES - reach + band * BAND + tl.arange(0, BAND)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < DIM)[None, :]
    is_centre = centre < n
    is_word = (context >= 0) & (context < n)
    start = tl.load(starts + centre, mask=is_centre, other=0)
    stop = tl.load(stops + centre, mask=is_centre, other=0)
    is_pair = _pairs(context, centre, start, stop)

    word = tl.load(inputs + context, mask=is_word, other=0)
    x = _rows_at(vectors, word, is_word, part * COLUMNS, DIM, COLUMNS)
    x_grad = tl.zeros([BAND, COLUMNS], dtype=tl.float32)
    losses = tl.zeros([BAND, CENTRES], dtype=tl.float32)
    place = centre
    written = centre + band.to(tl.int64) * num_targets * n
    for target in range(0, num_targets):
        row = tl.load(targets + place, mask=is_centre, other=-1)
        is_target = row >= 0
        y = _rows_at(vectors, row, is_target, part * COLUMNS, DIM, COLUMNS)
        if PARTS == 1:
            logit = tl.dot(x, tl.trans(y), input_precision="tf32x3")
        else:
            logit = tl.zeros([BAND, CENTRES], dtype=tl.float32)
            for each in range(0, PARTS):
                some_x = _rows_at(vectors, word, is_word, each * COLUMNS, DIM, COLUMNS)
                some_y = _rows_at(vectors, row, is_target, each * COLUMNS, DIM, COLUMNS)
                logit += tl.dot(some_x, tl.trans(some_y), input_precision="tf32x3")
        is_counted = is_pair & is_target[None, :]
        losses_now, slope = _loss_and_slope(logit, target == 0)
        losses += tl.where(is_counted, losses_now, 0.0)
        slope = tl.where(is_counted, slope, 0.0)
        x_grad += tl.dot(slope, y, input_precision="tf32x3")
        y_grad = tl.dot(tl.trans(slope), x, input_precision="tf32x3")
        tl.store(target_grad + written[:, None] * DIM + column[None, :], y_grad, mask=is_centre[:, None] & inside)
        place += n
        written += n
    at = ((block * tl.num_programs(1) + band) * BAND + tl.arange(0, BAND))[:, None] * DIM + column[None, :]
    tl.store(context_grad + at, x_grad, mask=inside)
    if part == 0:
        tl.store(loss + block * tl.num_programs(1) + band, tl.sum(tl.sum(losses, axis=1), axis=0))


@triton.jit(do_not_specialize=["n"])
def _block_of_means(
    vectors,
    inputs,
    targets,
    starts,
    stops,
    context_grad,
    target_grad,
    loss,
    n,
    num_targets,
    reach,
    num_bands,
    DIM: tl.constexpr,
    CENTRES: tl.constexpr,
    BAND: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes CBOW: the mean of each window predicts the targets of the window's centre."""
    block = tl.program_id(0).to(tl.int64)
    centre = block * CENTRES + tl.arange(0, CENTRES)
    column = tl.arange(0, COLUMNS)
    inside = (column < DIM)[None, :]
    is_centre = centre < n
    start = tl.load(starts + centre, mask=is_centre, other=0)
    stop = tl.load(stops + centre, mask=is_centre, other=0)

    num_contexts = tl.zeros([CENTRES], dtype=tl.float32)
    mean = tl.zeros([CENTRES, COLUMNS], dtype=tl.float32)
    for band in range(0, num_bands):
        context = block * CENTRES - reach + band * BAND + tl.arange(0, BAND)
        is_word = (context >= 0) & (context < n)
        word = tl.load(inputs + context, mask=is_word, other=0)
        is_pair = _pairs(context, centre, start, stop).to(tl.float32)
        x = _rows_at(vectors, word, is_word, 0, DIM, COLUMNS)
        mean += tl.dot(tl.trans(is_pair), x, input_precision="tf32x3")
        num_contexts += tl.sum(is_pair, axis=0)
    has_contexts = num_contexts > 0.0
    num_contexts = tl.maximum(num_contexts, 1.0)
    mean = tl.div_rn(mean, tl.broadcast_to(num_contexts[:, None], [CENTRES, COLUMNS]))

    mean_grad = tl.zeros([CENTRES, COLUMNS], dtype=tl.float32)
    losses = tl.zeros([CENTRES], dtype=tl.float32)
    place = centre
    for target in range(0, num_targets):
        row = tl.load(targets + place, mask=is_centre, other=-1)
        is_counted = (row >= 0) & has_contexts
        y = _rows_at(vectors, row, is_counted, 0, DIM, COLUMNS)
        losses_now, slope = _loss_and_slope(tl.sum(mean * y, axis=1), target == 0)
        losses += tl.where(is_counted, losses_now, 0.0)
        slope = tl.where(is_counted, slope, 0.0)
        mean_grad += slope[:, None] * y
        at = place[:, None] * DIM + column[None, :]
        tl.store(target_grad + at, slope[:, None] * mean, mask=is_centre[:, None] & inside)
        place += n
    mean_grad = tl.div_rn(mean_grad, tl.broadcast_to(num_contexts[:, None], [CENTRES, COLUMNS]))

    for band in range(0, num_bands):
        context = block * CENTRES - reach + band * BAND + tl.arange(0, BAND)
        is_pair = _pairs(context, centre, start, stop).to(tl.float32)
        x_grad = tl.dot(is_pair, mean_grad, input_precision="tf32x3")
        at = ((block * num_bands + band) * BAND + tl.arange(0, BAND))[:, None] * DIM + column[None, :]
        tl.store(context_grad + at, x_grad, mask=inside)
    tl.store(loss + block, tl.sum(losses, axis=0))
