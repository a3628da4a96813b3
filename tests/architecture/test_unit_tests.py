"""The tests in tests/unit stay in one process: what starts ranks or commands is for tests/distributed and tests/e2e."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

UNIT = Path(__file__).resolve().parents[1] / "unit"
STARTING = {"subprocess", "embedtrain.testing.ranks", "tests.launching", "tests.e2e.conftest"}
ALLOWED = {
    "commands/test_completion.py": "asks bash for its completions",
    "commands/test_fuzz.py": "gives the program itself a few of the command lines",
    "commands/test_help.py": "asks a fresh interpreter what the help imports",
    "commands/test_mistakes.py": "pipes the program's output into one that stops reading",
    "train/test_provenance.py": "makes a repository with git",
    "recipes/test_registry.py": "asks a fresh interpreter what the registry imports",
}


@pytest.mark.parametrize("path", sorted(UNIT.rglob("*.py")), ids=lambda path: str(path.relative_to(UNIT)))
def test_a_unit_test_starts_no_process(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    is_allowed = path.relative_to(UNIT).as_posix() in ALLOWED
    assert is_allowed or not imported & STARTING, f"{path.name} imports {sorted(imported & STARTING)}"
