"""The codecs of compressed files: how their names end, and how their content begins."""

from __future__ import annotations

import os
import re

_CODECS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
COMPRESSED = tuple(_CODECS)
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
"""How a compressed file begins."""
MAGIC_BYTES = 10
"""So many bytes tell the codec of a file."""


def codec_of_name(name: str) -> str | None:
    """Returns the codec that the suffix of a file's name or URL stands for; None if it stands for none."""
    return _CODECS.get(os.path.splitext(name)[1].lower())


def without_compression(name: str) -> str:
    """Returns a file's name without the suffix of a compression."""
    base, suffix = os.path.splitext(name)
    return base if suffix.lower() in COMPRESSED else name


def codec_of(head: bytes) -> str | None:
    """Returns the codec of a file that begins with `head`; None for a plain file."""
    return next((codec for codec, magic in _MAGIC.items() if magic.match(head)), None)
