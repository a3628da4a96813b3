"""Calls the native kernel that finds the largest magnitude of gradients."""

from __future__ import annotations

from array import array

from embedtrain.ops._backend import library


def largest_magnitudes(features: array[int], num_features: int, dim: int) -> tuple[float, float]:
    """See `embedtrain.ops.row_gradient.reference`; `features` comes from `embedtrain.ops.pool_rows.native.describe`."""
    largest = array("f", (0.0, 0.0))
    library.get().embedtrain_largest_magnitude(features.buffer_info()[0], num_features, dim, largest.buffer_info()[0])
    return largest[0], largest[1]
