"""Reads embedtrain.h, the only declaration of the native library's C ABI. `setup.py` runs this file by itself."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("embedtrain.h")

_SCALARS = {"int", "int32_t", "int64_t", "uint64_t", "float", "double"}
_CODES = {"float": "f", "int64_t": "q", "uint64_t": "q", "pointer": "q"}
"""By type the code of an `array` of members of it: addresses are 64-bit words."""


class Declarations(NamedTuple):
    """What a header declares, in its order.

    Attributes:
        functions: by name, the arguments' types by their names: a scalar's type, or "pointer".
        structs: by name, the members' types by their names.
    """

    functions: dict[str, dict[str, str]]
    structs: dict[str, dict[str, str]]

    def fingerprint(self) -> int:
        """Returns 64 bits that differ for other declarations; comments and layout of the file do not count."""
        text = repr([(name, [*parts.items()]) for each in self for name, parts in each.items()])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    def array_code(self, struct: str, members: tuple[str, ...]) -> str:
        """Returns the type code of an `array` that holds a struct's members in the order that the caller fills in.

        Raises:
            TypeError: the header declares other members, another order, or members of several sizes.
        """
        declared = self.structs[struct]
        codes = {_CODES.get(kind, kind) for kind in declared.values()}
        if tuple(declared) != members or len(codes) != 1:
            raise TypeError(f"{PATH.name} declares {struct} as {declared}, and Python lays it out as {members}")
        return codes.pop()


def parse(text: str) -> Declarations:
    """Reads the declarations of a header.

    Raises:
        ValueError: the header holds something else than structs and functions that return nothing.
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
        raise ValueError(f"{PATH.name} declares something that is no struct and no void function: {rest.strip()!r}")
    return Declarations(functions, structs)


def read() -> Declarations:
    """Reads the library's header."""
    return parse(PATH.read_text(encoding="utf-8"))


def _declared(text: str) -> tuple[str, str]:
    """Returns the name and the type of one argument or member."""
    found = re.fullmatch(r"\s*(.*?[\s*])(\w+)\s*", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{PATH.name}: expected a type and a name, got {text.strip()!r}")
    kind = "pointer" if "*" in found[1] else found[1].strip()
    if kind != "pointer" and kind not in _SCALARS:
        raise ValueError(f"{PATH.name}: {text.strip()!r} has a type other than {', '.join(sorted(_SCALARS))}")
    return found[2], kind
