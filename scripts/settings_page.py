"""Makes docs/settings.md from the texts under the fields of the configurations, and from optimizers' docstrings.

python scripts/settings_page.py            # writes it
python scripts/settings_page.py --check    # writes nothing; exit status 1 if the page would change
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from embedtrain.config.optimizer import OPTIMIZERS, OptimizerConfig
from embedtrain.config.sections import Config
from embedtrain.optim import SparseOptimizer
from embedtrain.recipes.registry import BUILT_IN, DEFAULT_MODEL, recipe_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
NOTE = "<!-- Made by scripts/settings_page.py of the docstrings: change those. -->\n"

VALUES = """\
A key that takes a text reads its value literally: `run.path=r/trial #2`, `data.path=a: b.txt`, `data.positive=yes` and
`data.path=$HOME` mean exactly these texts. In a shell, also quote them by the rules of the shell. Variables are not
replaced: `${...}` is text too. There are three special rules:

* `null` means no value, for keys that allow it. Quote the text null: `data.positive="'null'"` in a shell,
  `positive: "null"` in a file.
* A list of texts is written `[on,01,a b.txt]`, without quotes. Quote an item that contains a comma:
  `["a, b.txt",c.txt]`. A key that takes one path or a list of paths reads a value as a list only if it begins with `[`
  and ends with `]`.
* In a YAML file, quote a text that contains ` #` or `: `, because YAML would end the text there. Other texts need no
  quotes: `positive: yes`, `path: 2024-01-01` and `columns: [on, 01, 1e3]` are read as texts because these keys take
  texts. Names of features and tables are texts too.

Values of other types (numbers, true and false, lists of numbers, and whole sections such as
`data.features={tags: {bag: true}}`) are YAML.
"""

_ITEM = re.compile(r"(\*{0,2}\w[\w, ]*): (.*)")


def settings() -> str:
    """Returns the page of keys."""
    pages = [
        NOTE,
        "# Settings\n",
        "Set a key in the YAML file of a run, or anywhere after a command as `key=value`. Keys with the default `???` "
        "must be given.\n",
        VALUES,
        "## Every model\n",
        _table(_keys(Config, Config(model=DEFAULT_MODEL), "")),
    ]
    common = {key for key, _, _ in _keys(Config, Config(), "")}
    for name in BUILT_IN:
        model = recipe_of(name).config
        defaults = {key: default for key, default, _ in _keys(Config, Config(), "")}
        own = [each for each in _keys(model, model(), "") if each[0] not in common or defaults[each[0]] != each[1]]
        pages += [f"## `model: {name}`\n", f"{inspect.getdoc(model)}\n", _table([*own, *_own_of_optimizer(model())])]
    pages += ["## `optimizer`\n", "`optimizer.name` chooses one; see [optimizers](optimizers.md).\n"]
    pages += ["### Every optimizer\n", _table(_keys(OptimizerConfig, OptimizerConfig(), "optimizer."))]
    shared = {field.name for field in fields(OptimizerConfig)} - {"lr"}
    for name, kind in OPTIMIZERS.items():
        own = [each for each in _keys(kind, kind(), "optimizer.") if each[0].rpartition(".")[2] not in shared]
        pages += [f"### `optimizer.name: {name}`\n", _table(own)]
    return "\n".join(pages)


def _own_of_optimizer(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yields the optimizer of a model that names none, and its options that differ from the optimizer's defaults."""
    kind = type(config.optimizer)
    yield "optimizer.name", config.optimizer.name, "See [`optimizer`](#optimizer)."
    defaults = {key: default for key, default, _ in _keys(kind, kind(), "optimizer.")}
    yield from (each for each in _keys(kind, config.optimizer, "optimizer.") if each[1] != defaults[each[0]])


def _keys(section: type[Any], value: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yields key, default and meaning; NAME stands for what the user calls each entry of a section."""
    hints, meanings = get_type_hints(section), _meanings(section)
    for field in fields(section):
        hint, key, default = hints[field.name], f"{prefix}{field.name}", getattr(value, field.name, None)
        if hint is OptimizerConfig or (field.name == "name" and isinstance(value, OptimizerConfig)):
            continue
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _keys(hint, default, f"{key}.")
        elif get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            entry: Any = get_args(hint)[1]
            yield from _keys(entry, entry(), f"{key}.NAME.")
        else:
            yield key, _shown(default), " ".join([*meanings.get(field.name, "").split(), _choices(hint)]).strip()


def _shown(default: Any) -> str:
    words = {None: "null", True: "true", False: "false", "": '""'}
    return words[default] if isinstance(default, bool | str | None) and default in words else str(default)


def _choices(hint: Any) -> str:
    values = [value for value in (*get_args(hint), *map(get_args, get_args(hint))) if value]
    names = [name for value in values for name in (value if isinstance(value, tuple) else (value,))]
    names = [name for name in names if isinstance(name, str)]
    return f"({', '.join(f'`{name}`' for name in names)})" if len(names) > 1 else ""


def _meanings(section: type[Any]) -> dict[str, str]:
    """Returns the text under each field, those of base classes included."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if not is_dataclass(owner):
            continue
        if "kind" in vars(owner):
            found |= _meanings_of_arguments(vars(owner)["kind"])
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                found[field.target.id] = text.value.value  # type: ignore[union-attr, attr-defined]
    return found


def _meanings_of_arguments(kind: type[Any]) -> dict[str, str]:
    """Returns what an optimizer's docstring, or that of a class that it extends, says of its arguments."""
    found: dict[str, str] = {}
    for owner in reversed([each for each in kind.__mro__ if issubclass(each, SparseOptimizer)]):
        _, _, text = inspect.cleandoc(owner.__doc__ or "").partition("\nArgs:\n")
        name = ""
        for line in textwrap.dedent(text.partition("\n\n")[0]).splitlines():
            if item := _ITEM.fullmatch(line):
                name, found[item[1]] = item[1], item[2][0].upper() + item[2][1:]
            else:
                found[name] += f" {line.strip()}"
    return found


def _table(rows: Iterator[tuple[str, str, str]] | list[tuple[str, str, str]]) -> str:
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{key}` | `{default}` | {meaning.replace('|', '&#124;')} |" for key, default, meaning in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes or compares the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    text = settings()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if options.check:
        print(
            f"{PAGE.name} is not made from the present docstrings; run python scripts/settings_page.py", file=sys.stderr
        )
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
