"""How much the negatives' term of a loss weighs unless the configuration says so."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedtrain.recipes.retrieval.config import Loss

_OF_CONTRAST, _OF_UNIFORMITY = 100.0, 1.0


def default_negative_weight(loss: Loss, counts: NDArray[np.int64]) -> float:
    """Returns the weight of the negatives' term.

    Args:
        loss: what training makes small.
        counts: [num_items]; interactions of each item.
    """
    if loss == "cosine_contrastive":
        return _OF_CONTRAST
    if loss == "alignment_uniformity":
        return _OF_UNIFORMITY
    return 1.22
