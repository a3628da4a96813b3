"""Which implementation runs an op: decided once at the first call, and logged."""

from __future__ import annotations

import functools
import logging
import os

from torch import Tensor

from embedtrain.ops.native import library

VARIABLE = "EMBEDTRAIN_OPS"
"""Environment variable: `native` or `reference`; unset takes native where it was built."""

_logger = logging.getLogger(__name__)


@functools.cache
def cpu_backend() -> str:
    """Returns "native" or "reference": what runs the ops on CPU tensors in this process.

    Raises:
        ValueError: the environment asks for a backend that is unknown or was not built.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "native", "reference"):
        raise ValueError(f"{VARIABLE} must be native or reference, got {asked!r}")
    built = library.find() is not None
    if asked == "native" and not built:
        raise ValueError(f"{VARIABLE}=native, but the native library was not built: {library.HOW_TO_BUILD}")
    if not built and not asked:
        _logger.warning("ops run on the PyTorch reference, which is slower: %s", library.HOW_TO_BUILD)
    return asked or ("native" if built else "reference")


def uses_native(tensor: Tensor) -> bool:
    """Returns whether an op on this tensor runs natively; GPUs run the reference, which PyTorch carries."""
    return tensor.device.type == "cpu" and cpu_backend() == "native"
