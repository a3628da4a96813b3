"""What a model of interactions is compared with: popularity, item-kNN and EASE, each fitted in closed form."""

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
"""Returns the scores [n, num_items] of all items for histories, a sparse matrix [n, num_items] of zeros and ones."""

MAX_EASE_ITEMS = 46_340
"""LAPACK counts the entries of a matrix in 32 bits."""

_ROWS_AT_ONCE = 1024


def popularity(known: Bags, num_items: int) -> Scores:
    """Returns scores that are the items' numbers of users."""
    counts = np.bincount(known.values, minlength=num_items).astype(np.float32)
    return lambda histories: np.broadcast_to(counts, histories.shape)


def item_knn(known: Bags, num_items: int, *, neighbors: int, shrink: float, alpha: float = 0.5) -> Scores:
    """Fits item-kNN: an item's score is the sum of its similarities to the user's items among its nearest ones.

    How similar an item with `b` users is to an item of the user with `a` users, `c` of them both:
    c / (a ** alpha * b ** (1 - alpha) + shrink).

    Args:
        known: the items of each user.
        num_items: in all.
        neighbors: how many items are near to each.
        shrink: how much similarities count less if they stand on few users.
        alpha: in [0, 1]; 0.5 gives cosines. A larger one scores popular items higher.

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
                # Of equal similarities the items with the lower rows, whatever the order in the block.
                kept = np.lexsort((others, -near))[:neighbors]
                others, near = others[kept], near[kept]
            rows.append(others)
            columns.append(np.full(len(others), item, np.int64))
            values.append(near.astype(np.float32))
    parts = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    nearest = sparse.csr_array(parts, shape=(num_items, num_items))
    return lambda histories: np.asarray((histories @ nearest).toarray(), np.float32)


def ease_bytes(num_items: int) -> int:
    """Returns how much memory `ease` takes: a matrix of all pairs of items, and blocks of it."""
    return 4 * num_items * (num_items + 3 * _ROWS_AT_ONCE)


def ease(known: Bags, num_items: int, *, regularization: float) -> Scores:
    """Fits EASE: the linear model of items by items without itself, of least squares with a penalty.

    With X [users, items] of zeros and ones and P = inv(X'X + regularization I), the weights are -P / diag(P), and zero
    on the diagonal. P is computed in the place of X'X.

    Args:
        known: the items of each user.
        num_items: in all; at most `MAX_EASE_ITEMS`.
        regularization: the penalty on the squares of the weights.

    Source: Steck 2019, "Embarrassingly shallow autoencoders for sparse data".
    """
    from scipy.linalg import lapack

    users = _matrix(known, num_items)
    by_item = users.T.tocsr()
    gram = np.empty((num_items, num_items), np.float32)
    for start in range(0, num_items, _ROWS_AT_ONCE):
        gram[start : start + _ROWS_AT_ONCE] = (by_item[start : start + _ROWS_AT_ONCE] @ users).toarray()
    gram[np.diag_indices(num_items)] += np.float32(regularization)
    # The transpose of a symmetric matrix has the order of LAPACK, which then works in place.
    factor, failed = lapack.spotrf(gram.T, lower=1, overwrite_a=1, clean=0)
    if failed == 0:
        factor, failed = lapack.spotri(factor, lower=1, overwrite_c=1)
    if failed != 0:
        raise UserError(f"EASE cannot be solved with a regularization of {regularization:g}: give a larger one")
    inverse = factor.T
    # LAPACK fills one triangle; of the transpose it is the upper one.
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
    """Measures what scores recommend; see `measure_best`. Of equal scores the more popular item comes first.

    Args:
        scores: of all items for some histories.
        num_items: in all; their rows are in order of popularity.
        histories: the items of each user by which the others are scored.
        known: the items of each user that are left out of the lists; None to leave out none.
        held_out: the items to find.
        ks: lengths of the list.
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
    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.long() << 32) - torch.arange(scores.shape[1])


def _matrix(known: Bags, num_items: int) -> Any:
    """Returns users by items as a sparse matrix of ones."""
    from scipy import sparse

    ones = np.ones(len(known.values), np.float32)
    return sparse.csr_array((ones, np.asarray(known.values), np.asarray(known.starts)), shape=(len(known), num_items))
