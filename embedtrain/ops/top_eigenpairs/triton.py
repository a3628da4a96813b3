"""Power iteration on a GPU: one program per matrix, in place of dozens of launches of a few microseconds each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedtrain.ops._backend.triton_launch import on_device_of, power_of_2
from embedtrain.ops.top_eigenpairs.reference import start_vectors

_NUM_TURNS = 16
"""Turns of two products each: together the 32nd power."""
_TILE_ELEMENTS = 8192
"""Products that a program holds in registers: one per eigenvector and element of some rows of the matrix."""


def top_eigenpairs(matrices: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """See `embedtrain.ops.top_eigenpairs`."""
    matrices = matrices.contiguous()
    num, dim = matrices.shape[:2]
    columns, vectors_at_once = power_of_2(dim), power_of_2(number)
    values = torch.empty(num, number, dtype=torch.float32, device=matrices.device)
    # The program reads and writes the vectors in every turn; they stay in the cache.
    vectors = start_vectors(dim, number, matrices.device).T.float().expand(num, -1, -1).contiguous()
    with on_device_of(matrices):
        _iterate[(num,)](
            matrices,
            values,
            vectors,
            DIM=dim,
            NUMBER=number,
            NUM_TURNS=_NUM_TURNS,
            COLUMNS=columns,
            VECTORS=vectors_at_once,
            TILE_ROWS=max(1, _TILE_ELEMENTS // (columns * vectors_at_once)),
            num_warps=4,
        )
    return values, vectors


@triton.jit
def _product(
    matrix,
    own,
    dim: tl.constexpr,
    number: tl.constexpr,
    columns: tl.constexpr,
    vectors: tl.constexpr,
    tile_rows: tl.constexpr,
):
    """Returns the products of a symmetric matrix with its vectors, [vectors, columns]."""
    place = tl.arange(0, vectors)
    column = tl.arange(0, columns)
    product = tl.zeros([vectors, columns], dtype=tl.float32)
    for first in range(0, dim, tile_rows):
        row = first + tl.arange(0, tile_rows)
        inside = (row < dim)[:, None] & (column < dim)[None, :]
        tile = tl.load(matrix + row[:, None] * dim + column[None, :], mask=inside, other=0.0)
        is_factor = (place < number)[:, None] & (row < dim)[None, :]
        factor = tl.load(own + place[:, None] * dim + row[None, :], mask=is_factor, other=0.0)
        product += tl.sum(factor[:, :, None] * tile[None, :, :], axis=1)
    return product


@triton.jit
def _scaled(product):
    """Scales all vectors by one factor, so that their largest element is 1 and squares neither overflow nor vanish."""
    largest = tl.max(tl.abs(product))
    return product / tl.where(largest > 0, largest, 1.0)


@triton.jit
def _store(at, vectors, inside):
    """Stores vectors that the program reads again."""
    tl.debug_barrier()  # all threads have read the vectors before
    tl.store(at, vectors, mask=inside)
    tl.debug_barrier()  # all threads see them


@triton.jit
def _iterate(
    matrices,
    values,
    vectors,
    DIM: tl.constexpr,
    NUMBER: tl.constexpr,
    NUM_TURNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTORS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    number = tl.program_id(0)
    matrix, own = matrices + number * DIM * DIM, vectors + number * NUMBER * DIM
    place = tl.arange(0, VECTORS)
    column = tl.arange(0, COLUMNS)
    inside = (place < NUMBER)[:, None] & (column < DIM)[None, :]
    at = place[:, None] * DIM + column[None, :]
    product = tl.zeros([VECTORS, COLUMNS], dtype=tl.float32)
    for _turn in range(NUM_TURNS):
        product = _scaled(_product(matrix, own, DIM, NUMBER, COLUMNS, VECTORS, TILE_ROWS))
        _store(own + at, product, inside)
        product = _scaled(_product(matrix, own, DIM, NUMBER, COLUMNS, VECTORS, TILE_ROWS))
        for k in range(NUMBER):
            vector = tl.sum(tl.where((place == k)[:, None], product, 0.0), axis=0)
            norm = tl.sqrt(tl.sum(vector * vector))
            vector = vector / tl.where(norm > 1e-20, norm, 1.0)
            # Rounding leaves components along the earlier vectors, which are large relative to a short vector. So they
            # are removed a second time.
            before = tl.where((place < k)[:, None], product, 0.0)
            along = tl.sum(before * vector[None, :], axis=1)
            vector -= tl.sum(along[:, None] * before, axis=0)
            norm = tl.sqrt(tl.sum(vector * vector))
            vector = vector / tl.where(norm > 1e-20, norm, 1.0)
            along = tl.where(place > k, tl.sum(product * vector[None, :], axis=1), 0.0)
            product = tl.where((place == k)[:, None], vector[None, :], product - along[:, None] * vector[None, :])
        _store(own + at, product, inside)
    found = tl.sum(_product(matrix, own, DIM, NUMBER, COLUMNS, VECTORS, TILE_ROWS) * product, axis=1)
    tl.store(values + number * NUMBER + place, found, mask=place < NUMBER)
