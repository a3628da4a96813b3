"""No module of the package imports itself by way of others, deferred imports included."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "embedtrain"


def modules(root: Path) -> dict[str, Path]:
    """Returns the file of each module of the package by its dotted name; a package's is its `__init__`."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(module: str, path: Path) -> Iterator[str]:
    """Yields the dotted name of whatever the file imports, at any depth of it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def imports_of(module: str, files: Mapping[str, Path]) -> set[str]:
    """Returns the modules that a module has Python run: those it names, and the packages around them.

    Packages around the importing module run before it in any case, so they count only if the module names them.
    """
    found = set()
    for name in imported_names(module, files[module]):
        parts = name.split(".")
        while parts and ".".join(parts) not in files:
            parts.pop()
        if not parts:
            continue
        target = ".".join(parts)
        around = [".".join(parts[:length]) for length in range(1, len(parts))]
        found |= {target, *(package for package in around if not module.startswith(f"{package}."))} - {module}
    return found


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Returns groups of modules each of which imports every other, directly or by way of others."""
    reachable: dict[str, set[str]] = {}
    for module in imports:
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            new = imports[waiting.pop()] - seen
            seen |= new
            waiting += new
        reachable[module] = seen
    groups = {
        tuple(sorted(other for other in seen if module in reachable[other]))
        for module, seen in reachable.items()
        if module in seen
    }
    return sorted(list(group) for group in groups)


def test_no_module_imports_itself_by_way_of_others() -> None:
    files = modules(ROOT)
    assert len(files) > 100
    found = circles({module: imports_of(module, files) for module in files})
    assert not found, "\n".join(" <-> ".join(group) for group in found)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.py": "from embedtrain import b", "b.py": "def f():\n    from embedtrain.a import x"}, [["a", "b"]]),
        ({"a.py": "import embedtrain.b", "b.py": "from . import c", "c.py": "from .a import x"}, [["a", "b", "c"]]),
        ({"p/__init__.py": "from embedtrain.p import q", "p/q.py": "import embedtrain.p"}, [["p", "p.q"]]),
        ({"p/__init__.py": "from embedtrain.p import q", "p/q.py": "from ..p.r import x", "p/r.py": ""}, []),
        ({"p/__init__.py": "import embedtrain.a", "p/q.py": "", "a.py": "from embedtrain.p.q import x"}, [["a", "p"]]),
        ({"a.py": "from embedtrain.b import x", "b.py": "import torch"}, []),
    ],
)
def test_every_kind_of_circle_is_found(files: dict[str, str], expected: list[list[str]], tmp_path: Path) -> None:
    for name, text in {"__init__.py": "", **files}.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = modules(tmp_path)
    named = [[f"{PACKAGE}.{module}" for module in group] for group in expected]
    assert circles({module: imports_of(module, found) for module in found}) == named
