"""A model is its folder and one line of the registry: nothing else knows it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from embedtrain.config.sections import Config
from embedtrain.recipes.registry import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "embedtrain" / "recipes"
MODULES = sorted((ROOT / "embedtrain").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def folders() -> list[str]:
    return sorted(path.parent.name for path in RECIPES.glob("*/recipe.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def configurations() -> set[str]:
    """Names of the classes of whole configurations."""
    for value in BUILT_IN.values():
        importlib.import_module(value.partition(":")[0])
    found, waiting = set(), [Config]
    while waiting:
        kind = waiting.pop()
        assert is_dataclass(kind)
        found.add(kind.__name__)
        waiting += kind.__subclasses__()
    return found


def names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} | {
        each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)
    }


def test_every_folder_has_its_line_in_the_registry() -> None:
    assert sorted(BUILT_IN) == folders()


@pytest.mark.parametrize("folder", folders())
def test_nothing_outside_its_folder_imports_from_a_recipe(folder: str) -> None:
    inside = f"embedtrain.recipes.{folder}"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in TREES.items()
        if RECIPES / folder not in path.parents
        for name in imports(tree)
        if name == inside or name.startswith(f"{inside}.")
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_asks_which_class_a_configuration_is_of() -> None:
    kinds = configurations()
    assert {"Config", "Word2VecConfig", "RankingConfig", "RetrievalConfig"} <= kinds
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
        and kinds & names(node.args[1])
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_outside_its_folder_compares_with_a_models_name() -> None:
    wrong = []
    for path, tree in TREES.items():
        if path.parent.name in BUILT_IN and path.parent.parent == RECIPES:
            continue
        for node in ast.walk(tree):
            values = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            values += [key for key in node.keys if key is not None] if isinstance(node, ast.Dict) else []
            if any(isinstance(each, ast.Constant) and each.value in BUILT_IN for each in values):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    allowed = {
        "embedtrain/recipes/registry.py",  # the registry's own lines
        "embedtrain/export/formats/__init__.py",  # word2vec is a file format too
    }
    assert not [place for place in wrong if place.partition(":")[0] not in allowed], wrong
