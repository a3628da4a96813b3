"""Reads embedtrain.h, the only declaration of the native library's C ABI. `setup.py` runs this file by itself."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("embedtrain.h")

_SCALARS = {"int", "int32_t", "int64_t", "uint64_t", "float", "double"}
_CODES = {"float": "f", "int64_t": "q", "uint64_t": "q", "pointer": "q"}
"""Type codes for `array.array` by C type; a pointer is a 64-bit word."""


class Declarations(NamedTuple):
    """Holds the declarations of a header, in order.

    Attributes:
        functions: by function name, a mapping from argument names to types: a scalar type or "pointer".
        structs: by struct name, a mapping from member names to types.
    """

    functions: dict[str, dict[str, str]]
    structs: dict[str, dict[str, str]]

    def fingerprint(self) -> int:
        """Returns a 64-bit hash of the declarations; comments and whitespace do not change it."""
        text = repr([(name, [*parts.items()]) for each in self for name, parts in each.items()])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    def array_code(self, struct: str, members: tuple[str, ...]) -> str:
        """Returns the type code for an `array.array` that holds a struct with the given members, in this order.

        Raises:
            TypeError: the header declares other members or another order, or the members differ in size.
        """
        declared = self.structs[struct]
        codes = {_CODES.get(kind, kind) for kind in declared.values()}
        if tuple(declared) != members or len(codes) != 1:
            raise TypeError(f"{PATH.name} declares {struct} as {declared}, but Python lays it out as {members}")
        return codes.pop()


def parse(text: str) -> Declarations:
    """Parses the declarations of a header.

    Raises:
        ValueError: the header contains anything other than structs and functions that return void.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/|^\s*#[^\n]*", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r'extern\s+"C"\s*\{(.*)\}', r"\1", text, flags=re.DOTALL)
    functions: dict[str, dict[str, str]] = {}
    structs: dict[str, dict[str, str]] = {}

    def take_struct(found: re.Match[str]) -> str:
        structs[found[1]] = dict(_declared(member) for member in found[2].split(";") if member.strip())
        return ""

    def take_function(found: re.Match[str]) -> str:
        functions[found[1]] = dict(_declared(argument) for argument in found[2].split(","))
        return ""

    rest = re.sub(r"\bstruct\s+(\w+)\s*\{([^}]*)\}\s*;", take_struct, text)
    rest = re.sub(r"\bvoid\s+(\w+)\s*\(([^)]*)\)\s*;", take_function, rest)
    if rest.strip():
        raise ValueError(f"{PATH.name} declares something other than a struct or void function: {rest.strip()!r}")
    return Declarations(functions, structs)


def read() -> Declarations:
    """Returns the declarations of embedtrain.h."""
    return parse(PATH.read_text(encoding="utf-8"))


def _declared(text: str) -> tuple[str, str]:
    """Returns the name and the type of an argument or member."""
    found = re.fullmatch(r"\s*(.*?[\s*])(\w+)\s*", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{PATH.name}: expected a type and a name, got {text.strip()!r}")
    kind = "pointer" if "*" in found[1] else found[1].strip()
    if kind != "pointer" and kind not in _SCALARS:
        raise ValueError(f"{PATH.name}: {text.strip()!r} has a type other than {', '.join(sorted(_SCALARS))}")
    return found[2], kind
