"""Imports between the parts of the package go down only, deferred imports included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "embedtrain"

# A module may import itself and whatever stands on a lower level.
LEVELS = {
    "errors": 0,
    "jagged": 0,
    "schema": 1,
    "spec": 0,
    "storage": 1,
    "ops": 1,
    "sharding": 1,
    "distributed": 2,
    "data": 3,
    "metrics": 3,
    "optim": 3,
    "embedding": 4,
    "checkpoint": 5,
    "config": 6,
    "export": 7,
    "train": 7,
    "recipes": 8,
    "planning": 9,
    "report": 9,
    "commands": 10,
    "cli": 11,
    "__main__": 12,
    "__init__": 13,
}

# Imports within a level.
ALLOWED = {
    ("jagged", "errors"),
    ("spec", "errors"),
    ("sharding", "ops"),
    ("export", "train"),
}

MODULES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = [
    ROOT / "setup.py",
    *sorted(ROOT.glob("benchmarks/**/*.py")),
    *sorted(ROOT.glob("scripts/**/*.py")),
]


def part_of(path: Path) -> str:
    """Returns the first name below the package: "data" for embedtrain/data/text.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(path: Path) -> list[tuple[int, str]]:
    """Returns line and part of each import of this package anywhere in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = absolute_source(path, node)
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        own = [name.split(".") for name in names if name.split(".")[0] == "embedtrain"]
        found += [(node.lineno, existing_part(name)) for name in own]
    return found


def absolute_source(path: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = path.relative_to(ROOT).parent.parts
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def existing_part(name: list[str]) -> str:
    """Returns the part that a dotted name lies in; names of the package itself lie in its `__init__`."""
    if len(name) > 1 and ((PACKAGE / name[1]).is_dir() or (PACKAGE / f"{name[1]}.py").exists()):
        return name[1]
    return "__init__"


def test_every_part_has_a_level() -> None:
    parts = {part_of(path) for path in MODULES}
    assert parts - {"testing"} <= set(LEVELS), "give new parts a level here and in the design"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    part = part_of(path)
    if part == "testing":
        return
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for line, imported in imported_parts(path)
        if imported != part and (part, imported) not in ALLOWED and not LEVELS.get(imported, 99) < LEVELS.get(part, -1)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_tests_import_testing(path: Path) -> None:
    assert "testing" not in {imported for _, imported in imported_parts(path)}


@pytest.mark.parametrize(
    ("statement", "parts"),
    [
        ("def f():\n    from embedtrain.recipes.word2vec.model import Word2Vec", ["recipes"]),
        ("from ..recipes import word2vec", ["recipes"]),
        ("from .. import recipes", ["recipes"]),
        ("from . import text", ["data"]),
        ("import embedtrain.data.text as text", ["data"]),
        ("from embedtrain import TableSpec", ["__init__"]),
        ("import torch.data", []),
    ],
)
def test_every_form_of_import_is_seen(
    statement: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "embedtrain")
    for part in ("data", "recipes"):
        (tmp_path / "embedtrain" / part).mkdir(parents=True)
    module = tmp_path / "embedtrain" / "data" / "module.py"
    module.write_text(statement)
    assert [part for _, part in imported_parts(module)] == parts
