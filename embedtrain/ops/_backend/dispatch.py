"""Selects the implementation that runs the ops, once per process and device type."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Literal

from torch import Tensor

from embedtrain.ops._backend import library

Backend = Literal["native", "triton", "reference"]

VARIABLE = "EMBEDTRAIN_OPS"
"""Environment variable: `native` (on CPUs), `triton` or `reference`; if unset, the fastest available backend runs."""
INTERPRETER_VARIABLE = "TRITON_INTERPRET"
"""Environment variable of Triton: 1 runs its kernels on CPU tensors, slowly, for tests."""

_logger = logging.getLogger(__name__)


@functools.cache
def cpu_backend() -> Backend:
    """Returns the backend for CPU tensors in this process.

    Raises:
        ValueError: the environment selects a backend that is unknown or not available.
        RuntimeError: the native library was not built from the present declarations in embedtrain.h.
    """
    asked = _asked()
    if asked == "reference":
        return "reference"
    built = library.find() is not None
    if asked == "native" and not built:
        raise ValueError(f"{VARIABLE}=native, but the native library was not built: {library.how_to_build()}")
    if asked == "triton":
        _require_triton()
        if os.environ.get(INTERPRETER_VARIABLE) == "1":
            return "triton"
    if not built:
        _logger.warning("ops run on the PyTorch reference, up to ten times slower: %s", library.how_to_build())
    return "native" if built else "reference"


@functools.cache
def gpu_backend() -> Backend:
    """Returns the backend for CUDA tensors in this process.

    Raises:
        ValueError: the environment selects a backend that is unknown or not available.
    """
    asked = _asked()
    if asked == "triton":
        _require_triton()
    if asked == "reference":
        return "reference"
    if importlib.util.find_spec("triton") is None:
        _logger.warning("ops on GPUs run on the PyTorch reference, which is slower: Triton is not installed")
        return "reference"
    return "triton"


def backend_of(tensor: Tensor) -> Backend:
    """Returns the backend for a tensor."""
    return gpu_backend() if tensor.is_cuda else cpu_backend()


def uses_native(tensor: Tensor) -> bool:
    """Returns whether the native kernels run ops on a tensor."""
    return backend_of(tensor) == "native"


def uses_triton(tensor: Tensor) -> bool:
    """Returns whether the Triton kernels run ops on a tensor."""
    return backend_of(tensor) == "triton"


def _asked() -> str:
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "native", "triton", "reference"):
        raise ValueError(f"{VARIABLE} must be native, triton or reference, got {asked!r}")
    return asked


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"{VARIABLE}=triton, but Triton is not installed: pip install triton")
