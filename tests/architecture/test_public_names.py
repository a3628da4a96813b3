"""What the package shows: documented names, a light import, and nothing of the machine it was written on."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import embedtrain

ROOT = Path(__file__).resolve().parents[2]

# Needed by some commands only; a library user should not wait for them.
DEFERRED_MODULES = {"gensim", "matplotlib", "pyarrow", "scipy", "tensorboard", "triton"}

FOREIGN_TEXT = ["/work/", "/root/", "/home/", "/Users/", "helper-", "contracts.md", "findings.md", "style.md"]


def test_every_public_name_is_documented() -> None:
    public = {name: getattr(embedtrain, name) for name in embedtrain.__all__}
    needs_docstring = {name: value for name, value in public.items() if inspect.ismodule(value) or callable(value)}
    assert needs_docstring
    assert not [name for name, value in needs_docstring.items() if not inspect.getdoc(value)]


def test_importing_the_package_is_light() -> None:
    program = "import sys, embedtrain, embedtrain.metrics; print(*{name.partition('.')[0] for name in sys.modules})"
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not DEFERRED_MODULES & set(imported.stdout.split())


def test_no_file_names_the_machine_it_was_written_on() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("needs a git checkout")
    found = []
    for name in listing.stdout.split("\0")[:-1]:
        path = ROOT / name
        if path == Path(__file__) or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{name} contains {foreign!r}" for foreign in FOREIGN_TEXT if foreign in text]
    assert not found, "\n".join(found)
