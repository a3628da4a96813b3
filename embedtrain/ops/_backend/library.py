"""Loads the native library, which the installation builds if it finds a C++ compiler."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

from torch import Tensor

from embedtrain.ops._backend import header

PATH = Path(__file__).with_name("libembedtrain_native.so")

_PACKAGE = Path(__file__).resolve().parents[2]

_TYPES: dict[str, type] = {
    "pointer": ctypes.c_void_p,
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


@functools.cache
def find() -> ctypes.CDLL | None:
    """Returns the library with the signatures of its functions set, or None if it was not built.

    Raises:
        RuntimeError: the library was not built from the present declarations in embedtrain.h.
    """
    return load(PATH, declarations()) if PATH.exists() else None


def how_to_build() -> str:
    """Returns advice for users without a built library."""
    installed = _installed_elsewhere()
    if installed is None:
        return "install a C++ compiler (g++), then run pip install again"
    return (
        f"Python imports embedtrain from the source tree {_PACKAGE.parent}, which has no built library, and not from "
        f"{installed}, which has one: start from another folder, or run pip install -e . in the source tree"
    )


def _installed_elsewhere() -> str | None:
    """Returns the folder of an embedtrain with a library that this source tree shadows; None if there is none."""
    own = _PACKAGE.parent
    for entry in sys.path:
        folder = Path(entry or ".").resolve()
        if folder != own and (folder / PATH.relative_to(_PACKAGE.parent)).exists():
            return str(folder)
    return None


@functools.cache
def get() -> ctypes.CDLL:
    """Returns the library.

    Raises:
        RuntimeError: the library was not built, or was built from other declarations.
    """
    loaded = find()
    if loaded is None:
        raise RuntimeError(f"the native library was not built: {how_to_build()}")
    return loaded


def load(path: Path, declared: header.Declarations) -> ctypes.CDLL:
    """Loads a library and sets the argument types of its functions.

    Raises:
        RuntimeError: the library was built from other declarations.
    """
    loaded = ctypes.CDLL(str(path))
    try:
        fingerprint = ctypes.c_uint64.in_dll(loaded, "embedtrain_fingerprint").value
    except ValueError:
        fingerprint = None
    if fingerprint != declared.fingerprint():
        raise RuntimeError(f"{path} was built from another {header.PATH.name}: run pip install again")
    for name, arguments in declared.functions.items():
        function = getattr(loaded, name)
        function.argtypes = [_TYPES[kind] for kind in arguments.values()]
        function.restype = None
    return loaded


def outside_error(name: str, values: Tensor, bound: int) -> IndexError:
    """Returns the error for values of which some are not in [0, bound); waits for the device."""
    return IndexError(f"{name} must lie in [0, {bound}), got {int(values.min())} to {int(values.max())}")


def array_code(struct: str, *members: str) -> str:
    """Returns the type code for an `array.array` that holds a struct with the given members, in this order.

    Modules call it at import, so that a layout that differs from the header fails at once.

    Raises:
        TypeError: the header declares the struct differently.
    """
    return declarations().array_code(struct, members)


@functools.cache
def declarations() -> header.Declarations:
    """Returns the declarations of embedtrain.h, which are read once."""
    return header.read()
