"""Baselines for models of interactions: popularity, item-kNN and EASE, each fitted in closed form."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.bags import Bags
from embedtrain.errors import UserError
from embedtrain.recipes.lists import measure_best

_logger = logging.getLogger(__name__)

Scores = Callable[[Any], NDArray[np.float32]]
"""Maps histories, a sparse matrix [n, num_items] of zeros and ones, to the scores of all items, [n, num_items]."""

MAX_EASE_ITEMS = 46_340
"""Maximum number of items of `ease`, because LAPACK counts the entries of a matrix in 32 bits."""

_ROWS_AT_ONCE = 1024


def popularity(known: Bags, num_items: int) -> Scores:
    """Returns scores that equal the number of users of each item."""
    counts = np.bincount(known.values, minlength=num_items).astype(np.float32)
    return lambda histories: np.broadcast_to(counts, histories.shape)


def item_knn(known: Bags, num_items: int, *, neighbors: int, shrink: float, alpha: float = 0.5) -> Scores:
    """Fits item-kNN: an item's score is the sum of its similarities to those of its neighbours that the user has.

    The similarity of an item with `b` users to one of the user's items with `a` users, of whom `c` have both items:
    c / (a ** alpha * b ** (1 - alpha) + shrink).

    Args:
        known: the items of each user.
        num_items: number of all items.
        neighbors: number of neighbours per item.
        shrink: reduces similarities that are based on few users.
        alpha: in [0, 1]; 0.5 gives cosines, and larger values score popular items higher.

    Source: Sarwar et al. 2001, "Item-based collaborative filtering recommendation algorithms"; shrinkage and alpha as
    in Ferrari Dacrema et al. 2019, "Are we really making much progress?", alpha from Aiolli 2013, "Efficient top-N
    recommendation for very large scale binary rated datasets".
    """
    from scipy import sparse

    users = _matrix(known, num_items)
    by_item = users.T.tocsr()
    counts = np.asarray(users.sum(axis=0), np.float64).ravel().clip(min=1)
    norms, own_norms = counts**alpha, counts ** (1 - alpha)
    columns, rows, values = [], [], []
    for start in range(0, num_items, _ROWS_AT_ONCE):
        block = (by_item[start : start + _ROWS_AT_ONCE] @ users).tocsr()
        for place in range(block.shape[0]):
            item, span = start + place, slice(block.indptr[place], block.indptr[place + 1])
            others, common = block.indices[span], block.data[span]
            is_other = others != item
            others, common = others[is_other], common[is_other]
            near = common / (norms[others] * own_norms[item] + shrink)
            if len(near) > neighbors:
                # Items with lower rows win ties, so that the result does not depend on the order in the block.
                kept = np.lexsort((others, -near))[:neighbors]
                others, near = others[kept], near[kept]
            rows.append(others)
            columns.append(np.full(len(others), item, np.int64))
            values.append(near.astype(np.float32))
    parts = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    nearest = sparse.csr_array(parts, shape=(num_items, num_items))
    return lambda histories: np.asarray((histories @ nearest).toarray(), np.float32)


def ease_bytes(num_items: int) -> int:
    """Returns the memory of `ease` in bytes: a matrix of all pairs of items, and some blocks of it."""
    return 4 * num_items * (num_items + 3 * _ROWS_AT_ONCE)


def ease(known: Bags, num_items: int, *, regularization: float) -> Scores:
    """Fits EASE: a linear model that predicts each item from the user's other items, by ridge regression.

    With X [users, items] of zeros and ones and P = inv(X'X + regularization I), the weights are -P / diag(P), and zero
    on the diagonal. P overwrites X'X in memory.

    Args:
        known: the items of each user.
        num_items: number of all items, at most `MAX_EASE_ITEMS`.
        regularization: penalty on the squares of the weights.

    Raises:
        UserError: the regularization is too small.

    Source: Steck 2019, "Embarrassingly shallow autoencoders for sparse data".
    """
    from scipy.linalg import lapack

    users = _matrix(known, num_items)
    by_item = users.T.tocsr()
    gram = np.empty((num_items, num_items), np.float32)
    for start in range(0, num_items, _ROWS_AT_ONCE):
        gram[start : start + _ROWS_AT_ONCE] = (by_item[start : start + _ROWS_AT_ONCE] @ users).toarray()
    gram[np.diag_indices(num_items)] += np.float32(regularization)
    # LAPACK needs column-major order, which the transpose has, to work in place; the matrix is symmetric.
    factor, failed = lapack.spotrf(gram.T, lower=1, overwrite_a=1, clean=0)
    if failed == 0:
        factor, failed = lapack.spotri(factor, lower=1, overwrite_c=1)
    if failed != 0:
        raise UserError(f"EASE cannot be solved with a regularization of {regularization:g}: give a larger one")
    inverse = factor.T
    # LAPACK fills only the lower triangle, which is the upper one of the transpose.
    diagonal = np.diagonal(inverse).copy()
    for start in range(0, num_items, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, num_items)
        corner = inverse[start:stop, start:stop]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T
        inverse[stop:, start:stop] = inverse[start:stop, stop:].T
    for start in range(0, num_items, _ROWS_AT_ONCE):
        inverse[start : start + _ROWS_AT_ONCE] /= -diagonal
    inverse[np.diag_indices(num_items)] = 0
    return lambda histories: np.asarray(histories @ inverse, np.float32)


def measure_scores(
    scores: Scores, num_items: int, histories: Bags, known: Bags | None, held_out: Bags, ks: Sequence[int]
) -> dict[str, float]:
    """Measures the recommendations of a baseline; see `measure_best`. More popular items win ties.

    Args:
        scores: the fitted baseline.
        num_items: number of all items; rows are in order of popularity.
        histories: the items of each user from which all items are scored.
        known: items of each user to leave out of the lists; None to leave out none.
        held_out: the items to find, by user.
        ks: lengths of the lists.
    """
    matrix = _matrix(histories, num_items)

    def best(users: NDArray[np.int64]) -> Tensor:
        found = torch.from_numpy(scores(matrix[users]).copy())
        if known is not None:
            items, lengths = known.of(users)
            found[np.repeat(np.arange(len(users)), lengths), items] = -torch.inf
        ordered = _keys(found).topk(min(num_items, max(ks)), dim=1).indices
        return ordered.masked_fill(found.gather(1, ordered) == -torch.inf, -1)

    return measure_best(best, num_items, held_out, ks)


def _keys(scores: Tensor) -> Tensor:
    """Returns int64 keys in the order of float32 scores [n, m]; of equal scores the first has the largest key."""
    bits = (scores + 0.0).view(torch.int32)  # adding 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.long() << 32) - torch.arange(scores.shape[1])


def _matrix(known: Bags, num_items: int) -> Any:
    """Returns the sparse matrix [users, items] with a 1 per item of a user."""
    from scipy import sparse

    ones = np.ones(len(known.values), np.float32)
    return sparse.csr_array((ones, np.asarray(known.values), np.asarray(known.starts)), shape=(len(known), num_items))
