"""Writes the documentation of this Python installation into a text file: a real text that every machine has.

python scripts/python_docs.py OUTPUT

The text holds the topics of `help()` and the docstrings of the standard library and of the installed packages. They are
read from source with `ast`; nothing is imported. Each paragraph is one line, and occurs once.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import re
import sysconfig
import uuid
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Docstrings of tests describe tests, and vendored packages are copies of others.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "_vendor", "_vendored"}
)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# Markup whose letters belong to no sentence: `:math:` formulas, the `:class:` before a name, the `.. note::` before a
# paragraph, the `:param x:` before the description of a parameter.
_MARKUP = (
    (re.compile(r":math:`[^`]*`"), " "),
    (re.compile(r":[a-z:]+:(?=`)"), ""),
    (re.compile(r"^\s*\.\. [\w:-]+::", re.MULTILINE), ""),
    (re.compile(r"^\s*:(?:param|type|arg|keyword|return|rtype|raise)s?\b([^:\n]*):", re.MULTILINE), r"\1:"),
)
_DOCTEST = re.compile(r"^\s*>>>.*", re.MULTILINE | re.DOTALL)
_BLANK_LINES = re.compile(r"\n\s*\n")


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file to write; its folder is made if it is missing")
    write_python_docs(parser.parse_args().output)


def write_python_docs(path: Path) -> None:
    """Writes the text; the file appears under its name once it is complete."""
    # A syntax tree is many objects without a cycle: searching them for one takes 60 % of the time.
    with ProcessPoolExecutor(initializer=gc.disable) as processes:
        found = list(processes.map(docstrings, python_modules(installed_roots()), chunksize=64))
    # Many functions share a paragraph word for word.
    distinct = dict.fromkeys(line for module in found for text in module for line in paragraphs(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with temporary_path.open("w", encoding="utf-8", errors="replace") as file:
        file.writelines(f"{line}\n" for line in distinct)
    temporary_path.replace(path)


def installed_roots() -> list[str]:
    """Returns the folders of the standard library and of the installed packages, each once."""
    names = ("stdlib", "purelib", "platlib")
    return list(dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in names))


def python_modules(roots: Sequence[str]) -> Iterator[str]:
    """Yields the paths of the Python sources below some folders, in order, without tests."""
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
            yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith(".py"))


def docstrings(path: str) -> list[str]:
    """Returns the docstrings of a module and of what it defines, in order; none if the module does not parse.

    `pydoc_data/topics.py` holds the text of `help()` as the values of a dict, which are returned.
    """
    try:
        source = Path(path).read_bytes()
        if b'"""' not in source and b"'''" not in source and not _is_topics(path):
            return []  # A fifth of the modules, with next to no docstrings in other quotes.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning: an invalid escape in a string of the module.
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    if _is_topics(path):
        values = (node.values for node in ast.walk(tree) if isinstance(node, ast.Dict))
        return [text for value in next(values, []) if isinstance(text := ast.literal_eval(value), str)]
    return list(filter(None, map(ast.get_docstring, _documented(tree))))


def paragraphs(docstring: str) -> list[str]:
    """Returns the paragraphs of a docstring, one line each, without examples and markup."""
    for pattern, replacement in _MARKUP:
        docstring = pattern.sub(replacement, docstring)
    blocks = _BLANK_LINES.split(docstring.replace("\0", " "))
    blocks = [" ".join(_DOCTEST.sub("", block).split()) for block in blocks]
    return [block for block in blocks if any(map(str.isalpha, block))]


def _documented(node: ast.AST) -> Iterator[Documented]:
    """Yields the nodes that can have a docstring, in the order of the source; expressions are not visited."""
    if isinstance(node, Documented):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, field, None)
        for child in children if isinstance(children, list) else ():
            yield from _documented(child)


def _is_topics(path: str) -> bool:
    return path.endswith(os.path.join("pydoc_data", "topics.py"))


if __name__ == "__main__":
    main()
