"""Parsing and formatting of sizes, bandwidths and counts."""

from __future__ import annotations

import math
import re

from embedtrain.errors import UserError

_UNITS = {"": 1, "B": 1}
_UNITS.update({f"{letter}iB": 1 << 10 * power for power, letter in enumerate("KMGTP", start=1)})
_UNITS.update({f"{letter}B": 10 ** (3 * power) for power, letter in enumerate("KMGTP", start=1)})

_FACTORS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def parse_bytes(text: str) -> int:
    """Returns the bytes of "80GiB", "80 GB" or "1000".

    Raises:
        UserError: `text` is not a size.
    """
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].lower() not in units or match[1].count(".") > 1 or match[1] == ".":
        raise UserError(f"expected a size such as 80GiB or 512MB, got {text!r}")
    return int(float(match[1]) * units[match[2].lower()])


def parse_bandwidth(text: str) -> float:
    """Returns the bytes per second of "20GB/s" or "512 MiB/s".

    Raises:
        UserError: `text` is not a bandwidth.
    """
    size, slash, unit = text.strip().partition("/")
    try:
        bandwidth = parse_bytes(size)
    except UserError:
        bandwidth = 0
    if (slash, unit) != ("/", "s") or bandwidth < 1:
        raise UserError(f"expected a bandwidth such as 20GB/s, got {text!r}")
    return float(bandwidth)


def parse_count(text: str) -> int:
    """Returns the number of "1000", "1_000_000", "10e9", "5M" or "1.5B".

    Raises:
        UserError: `text` is not a whole number of at least 1.
    """
    number, factor = text.replace(",", "").replace("_", "").strip(), 1
    if number[-1:].lower() in _FACTORS:
        number, factor = number[:-1], _FACTORS[number[-1].lower()]
    try:
        value = float(number) * factor
    except ValueError:
        value = math.nan
    if not (1 <= value < math.inf) or value != int(value):
        raise UserError(f"expected a number such as 1000000, 10e9 or 5M, got {text!r}")
    return int(value)


def format_bytes(num_bytes: float) -> str:
    """Returns a size such as "7.45 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.2f} {unit}"
