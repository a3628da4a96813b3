"""Recipes are found by name: built-in ones, and those of packages, which may be broken."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embedtrain.errors import UserError
from embedtrain.optim.registry import warn_once
from embedtrain.recipes import loading
from embedtrain.recipes.loading import load_config, setting_keys
from embedtrain.recipes.registry import RECIPES, recipe_of

Install = Callable[..., None]

RECIPE = """
from dataclasses import dataclass, field
from embedtrain.recipes import api as recipes

@dataclass
class Data:
    path: str = "???"
    shelf: str = "top"

@dataclass
class BooksConfig(recipes.Config):
    data: Data = field(default_factory=Data)

    def table_names(self):
        return ["book"]

RECIPE = recipes.Recipe(BooksConfig, None, None, None)
"""


def forget() -> None:
    vars(RECIPES).pop("_entries", None)
    RECIPES._loaded.clear()
    for cached in (warn_once, loading._known_keys):
        cached.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs packages, each with one module and one entry point."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def install_one(package: str, model: str, source: str, value: str = "RECIPE") -> None:
        module = package.replace("-", "_")
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(source)
        information = tmp_path / f"{module}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[embedtrain.recipes]\n{model} = {module}:{value}\n")
        forget()

    yield install_one
    for module in modules:
        sys.modules.pop(module, None)
    monkeypatch.undo()
    forget()


def test_a_packages_model_has_its_own_keys(install: Install) -> None:
    install("book-shop", "books", RECIPE)
    assert list(RECIPES)[-1] == "books"
    config = load_config(None, ["model=books", "data.path=x", "data.shelf=low", "table.dim=9"])
    assert (config.model, config.data.shelf, config.table.dim) == ("books", "low", 9)
    assert "data.shelf" in setting_keys()
    with pytest.raises(UserError, match=r"no key word2vec.window for model books \(it is one of model word2vec\)"):
        load_config(None, ["model=books", "data.path=x", "word2vec.window=3"])


def test_an_unknown_key_imports_no_package(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("broken-shop", "broken", "raise RuntimeError('out of stock')")
    with pytest.raises(UserError, match=r"no key data.shelf for model word2vec; did you mean|no key data.shelf"):
        load_config(None, ["data.path=x", "data.shelf=low"])
    assert "out of stock" not in caplog.text


def test_a_model_that_does_not_exist_is_named_with_those_that_do(install: Install) -> None:
    install("book-shop", "books", RECIPE)
    with pytest.raises(
        UserError, match="there is no model 'films'; there are word2vec, sasrec, retrieval, ranking, books"
    ):
        load_config(None, ["model=films"])


@pytest.mark.parametrize(
    ("source", "value", "said"),
    [
        ("import no_such_module", "RECIPE", "importing broken_shop:RECIPE failed: ModuleNotFoundError: No module"),
        ("raise RuntimeError('out of stock')", "RECIPE", "failed: RuntimeError: out of stock"),
        ("", "RECIPE", "failed: AttributeError"),
        ("RECIPE = dict", "RECIPE", "expected broken_shop:RECIPE to be an embedtrain.recipes.api.Recipe, got type"),
    ],
)
def test_a_broken_package_is_named_and_breaks_nothing_else(
    install: Install, source: str, value: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    install("broken-shop", "broken", source, value)
    with pytest.raises(UserError) as raised:
        load_config(None, ["model=broken", "data.path=x"])
    assert "package broken-shop offers the model 'broken'" in str(raised.value)
    assert said in str(raised.value)
    # Other models do not need it, unless all keys of all models are asked for: then it is left out, and said once.
    with caplog.at_level(logging.WARNING):
        assert load_config(None, ["data.path=x"]).model == "word2vec"
        assert not caplog.records
        assert "word2vec.window" in setting_keys()
        setting_keys()
    assert [record.getMessage() for record in caplog.records] == [str(raised.value).removeprefix("'model=broken': ")]


def test_a_name_belongs_to_one_package(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("book-shop", "books", RECIPE)
    install("other-shop", "books", RECIPE)
    with pytest.raises(UserError, match=r"several packages: .*; uninstall all but one of them") as raised:
        recipe_of("books")
    assert "book-shop" in str(raised.value)
    assert "other-shop" in str(raised.value)
    install("word-shop", "word2vec", RECIPE)
    assert recipe_of("word2vec").config.__name__ == "Word2VecConfig"
    assert "package word-shop offers the model 'word2vec', which embedtrain has itself" in caplog.text


def test_only_the_model_that_is_asked_for_is_imported() -> None:
    program = (
        "import sys; from embedtrain import cli; from embedtrain.recipes.loading import load_config; "
        "load_config(None, ['data.path=x']); print(*(name for name in sys.modules if '.recipes.' in name))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "embedtrain.recipes.word2vec.recipe" in done.stdout
    for other in ("retrieval", "ranking"):
        assert f"embedtrain.recipes.{other}" not in done.stdout
