"""Makes docs/reference.md and docs/settings.md of the docstrings of the package.

python scripts/reference.py            # writes both
python scripts/reference.py --check    # exit status 1 where what is there is not what would be written
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

from embedtrain.config.optimizer import OPTIMIZERS, OptimizerConfig
from embedtrain.config.sections import Config
from embedtrain.optim import SparseOptimizer
from embedtrain.recipes.registry import BUILT_IN, DEFAULT_MODEL, recipe_of

DOCS = Path(__file__).resolve().parents[1] / "docs"
MODULES = (
    "embedtrain",
    "embedtrain.optim",
    "embedtrain.recipes.api",
    "embedtrain.recipes.retrieval.losses",
    "embedtrain.checkpoint",
    "embedtrain.export",
)
NOTE = "<!-- Made by scripts/reference.py of the docstrings: change those. -->\n"

VALUES = """A key of text takes what is written, character by character: `run.path=r/trial #2`, `data.path=a: b.txt`,
`data.positive=yes` and `data.path=$HOME` mean these texts. (Quote them for your shell, which has rules of its own.)
Nothing is replaced in a value: `${...}` is text too. Three rules remain:

* `null` means no value, if the key has that choice. The text null is quoted: `data.positive="'null'"` in a shell,
  `positive: "null"` in a file.
* A list of texts is written `[on,01,a b.txt]`, without quotes; an item that holds a comma stands in quotes:
  `["a, b.txt",c.txt]`. A key that takes one path or several takes a text as one path, unless the text begins with `[`
  and ends with `]`.
* In a YAML file, YAML decides where a text ends, so a text with ` #` or `: ` in it needs quotes there. The key decides
  the type: `positive: yes`, `path: 2024-01-01` and `columns: [on, 01, 1e3]` are texts, and so are names of features
  and tables.

Keys of other types (numbers, true and false, lists of numbers, and whole sections such as
`data.features={tags: {bag: true}}`) take YAML.
"""

_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Collective|Source):(?: (.*))?")
_ITEM = re.compile(r"(\*{0,2}\w[\w, ]*): (.*)")


def public_names(module: ModuleType) -> list[str]:
    """Returns what a module shows: its `__all__`, or the functions and classes that it defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=str.lower)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return sorted((name for name in own if not name.startswith("_")), key=str.lower)


def reference() -> str:
    """Returns the page of names."""
    pages = [
        NOTE,
        "# Reference\n",
        "The names that programs may rely on. [Settings](settings.md) has the keys of runs.\n",
    ]
    for name in MODULES:
        module = importlib.import_module(name)
        pages += [f"## `{name}`\n", f"{inspect.getdoc(module)}\n"]
        for shown in public_names(module):
            pages += _describe(name, shown, getattr(module, shown))
    return "\n".join(pages)


def _describe(module: str, name: str, value: Any) -> Iterator[str]:
    yield f"### `{module}.{name}`\n"
    if inspect.ismodule(value):
        yield f"See [`{value.__name__}`](#{value.__name__.replace('.', '')}).\n"
    elif not (inspect.isclass(value) or inspect.isfunction(value)):
        yield f"One of {', '.join(f'`{key}`' for key in value)}.\n"
    else:
        yield f"```\n{name}{_signature(value)}\n```\n"
        yield _markdown(inspect.getdoc(value) or "")
        if inspect.isclass(value):
            if meanings := _meanings(value):
                yield "".join(f"* `{field}`: {' '.join(meaning.split())}\n" for field, meaning in meanings.items())
            for method_name, method in vars(value).items():
                function = getattr(method, "fget", None) or getattr(method, "__func__", method)
                if not method_name.startswith("_") and inspect.isfunction(function) and inspect.getdoc(function):
                    call = "" if isinstance(method, property) else _signature(function)
                    yield f"#### `{name}.{method_name}{call}`\n"
                    yield _markdown(inspect.getdoc(function) or "")


def _signature(value: Any) -> str:
    """Returns the parameters as they are written in the source; a protocol has none."""
    if getattr(value, "_is_protocol", False):
        return ""
    if inspect.isclass(value) and is_dataclass(value):
        node = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
        assert isinstance(node, ast.ClassDef)
        return _call([ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)])
    function = value.__init__ if inspect.isclass(value) else value
    if not inspect.isfunction(function):
        return "()"
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and inspect.isfunction(value) else ""
    return _call([each for each in _parameters(node.args) if each not in ("self", "cls")]) + returns


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    yield from map(_parameter, positional, [*missing, *arguments.defaults])
    if arguments.vararg:
        yield f"*{_parameter(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    yield from map(_parameter, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        yield f"**{_parameter(arguments.kwarg, None)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    return text if default is None else f"{text} = {ast.unparse(default)}"


def _call(parameters: list[str]) -> str:
    line = f"({', '.join(parameters)})"
    return line if len(line) <= 90 else "(\n" + "".join(f"    {each},\n" for each in parameters) + ")"


def _markdown(docstring: str) -> str:
    """Returns a docstring as Markdown: its sections by their names, their items as lists."""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        found = _SECTION.fullmatch(line)
        if found:
            section = found[1]
            lines.append(f"**{section}**" + (f": {found[2]}" if found[2] else ""))
            lines += [] if found[2] else [""]
            continue
        if not section or not line.startswith("    "):
            section = section if line.startswith("    ") or not line else ""
            lines.append(line)
            continue
        item = _ITEM.fullmatch(line[4:])
        if item and section not in ("Returns", "Yields"):
            lines.append(f"* `{item[1]}`: {item[2]}")
        else:
            lines.append(line.strip())
    return "\n".join(lines) + "\n"


def settings() -> str:
    """Returns the page of keys."""
    pages = [
        NOTE,
        "# Settings\n",
        "Each key can stand in a run's YAML file, or anywhere after a command as `key=value`. `???` has to be given.\n",
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
    """Writes or compares the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = []
    for name, text in (("reference.md", reference()), ("settings.md", settings())):
        path = DOCS / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not options.check:
            path.write_text(text, encoding="utf-8")
    if options.check and stale:
        print(
            f"not of the docstrings as they are: {', '.join(stale)}; run python scripts/reference.py", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
