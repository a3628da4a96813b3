"""The fenced blocks of README and docs, for the tests that run or check them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MADE = ("settings.md",)
"""Pages that a script makes."""

PROGRAMS = ("bash", "docker", "embedtrain", "pip", "pre-commit", "python", "sbatch", "source", "torchrun", "zcat")

_BLOCK = re.compile(r"(?:<!-- not run: (.+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: where it stands.
        line: its first line there.
        language: as the fence names it.
        text: between the fences.
        not_run: why nobody can run it here; empty for a block that the tests run.
    """

    page: Path
    line: int
    language: str
    text: str
    not_run: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, where the block is one of commands."""
        lines = self.text.replace("\\\n", " ").splitlines()
        lines = [line for line in lines if line and not line.startswith("#")]
        if self.language not in ("", "sh") or not lines or lines[0].split()[0] not in PROGRAMS:
            return []
        return [shlex.split(part, comments=True) for line in lines for part in line.split(" | ")]


def redirected(words: list[str]) -> tuple[list[str], str | None]:
    """Returns the words of a command without `> FILE` at their end, and the file's name; None without one."""
    return (words[:-2], words[-1]) if ">" in words[-2:-1] else (words, None)


def blocks(page: Path) -> Iterator[Block]:
    """Yields the blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        reason, language, body = found.groups()
        yield Block(page, text[: found.start()].count("\n") + 1, language, body, reason or "")
