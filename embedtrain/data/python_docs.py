"""The documentation of the Python installation itself, as text that every machine with Python has.

That is the topics of `help()` and the docstrings of the standard library and of the installed packages,
read from their source with `ast`; nothing is imported.
"""

from __future__ import annotations

import ast
import gc
import os
import re
import sys
import sysconfig
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata

import xxhash

from embedtrain.distributed.ranks import Ranks

PYTHON_DOCS = "python-docs"

_FORMAT_VERSION = 1
# Tests document themselves rather than the library; vendored packages are copies of others.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "_vendor", "_vendored"}
)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# reStructuredText whose letters are not part of a sentence: `:math:` formulas, the `:class:` before a name,
# the `.. note::` before a paragraph, the `:param x:` before a parameter's description.
_MARKUP = (
    (re.compile(r":math:`[^`]*`"), " "),
    (re.compile(r":[a-z:]+:(?=`)"), ""),
    (re.compile(r"^\s*\.\. [\w:-]+::", re.MULTILINE), ""),
    (re.compile(r"^\s*:(?:param|type|arg|keyword|return|rtype|raise)s?\b([^:\n]*):", re.MULTILINE), r"\1:"),
)
_DOCTEST = re.compile(r"^\s*>>>.*", re.MULTILINE | re.DOTALL)
_BLANK_LINES = re.compile(r"\n\s*\n")


def write_python_docs(
    cache_path: str,
    ranks: Ranks,
    on_progress: Callable[[str, float], None] | None = None,
) -> str:
    """Writes the documentation of this Python installation into a text file, unless it is there already.

    The file's name is a hash of the Python version and of the installed distributions with their versions;
    a line is a paragraph; the text does not depend on the number of ranks.

    Collective: every rank calls; each reads its share of the modules.

    Args:
        cache_path: local folder, which exists and which all ranks share.
        on_progress: called with what is done and the fraction of this rank's share that is.

    Returns:
        The path of the text.
    """
    path = os.path.join(cache_path, f"{PYTHON_DOCS}-{ranks.run_on_first(_installation_hash)}.txt")
    if ranks.run_on_first(lambda: os.path.exists(path)):
        return path
    modules: list[str] = ranks.run_on_first(lambda: list(python_modules(_roots())))
    rank, size = ranks.rank, ranks.size

    def read_share() -> list[list[str]]:
        mine: list[list[str]] = []
        with _garbage_collection_off():
            for done, module in enumerate(modules[rank::size]):
                mine.append(docstrings(module))
                if on_progress is not None and done % 100 == 0:
                    on_progress("read docstrings", done * size / len(modules))
        return mine

    shares = ranks.all_gather(ranks.run_on_each(read_share))
    found = [shares[number % size][number // size] for number in range(len(modules))]
    ranks.run_on_first(lambda: _write_text(found, path))
    return path


def python_modules(roots: Sequence[str]) -> Iterator[str]:
    """Yields the paths of the Python sources below some folders: root by root, sorted, tests left out."""
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
            yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith(".py"))


def docstrings(path: str) -> list[str]:
    """Returns the docstrings of a module and of what it defines, in its order; none if it does not parse.

    Of `pydoc_data/topics.py`, which holds the text of `help()` as a dict, the values.
    """
    try:
        with open(path, "rb") as file:
            source = file.read()
        if b'"""' not in source and b"'''" not in source and not _is_topics(path):
            return []  # A fifth of the modules, with next to no docstrings in other quotes.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning: an invalid escape in somebody's string.
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    if _is_topics(path):
        values = (node.values for node in ast.walk(tree) if isinstance(node, ast.Dict))
        return [text for value in next(values, []) if isinstance(text := ast.literal_eval(value), str)]
    return list(filter(None, map(ast.get_docstring, _documented(tree))))


def paragraphs(docstring: str) -> list[str]:
    """Returns the paragraphs of a docstring, each on one line, without examples and markup."""
    for pattern, replacement in _MARKUP:
        docstring = pattern.sub(replacement, docstring)
    blocks = _BLANK_LINES.split(docstring.replace("\0", " "))
    blocks = [" ".join(_DOCTEST.sub("", block).split()) for block in blocks]
    return [block for block in blocks if any(map(str.isalpha, block))]


def _documented(node: ast.AST) -> Iterator[Documented]:
    """Yields what can have a docstring, in the order of the source, without a visit to expressions."""
    if isinstance(node, Documented):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, field, None)
        for child in children if isinstance(children, list) else ():
            yield from _documented(child)


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """A syntax tree is many objects without a cycle: searching them for one takes 60 % of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _is_topics(path: str) -> bool:
    return path.endswith(os.path.join("pydoc_data", "topics.py"))


def _write_text(found: list[list[str]], path: str) -> None:
    """Writes each distinct paragraph once: much is said word for word of many functions."""
    distinct = dict.fromkeys(line for module in found for text in module for line in paragraphs(text))
    temporary_path = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    with open(temporary_path, "w", encoding="utf-8", errors="replace") as file:
        file.writelines(f"{line}\n" for line in distinct)
    os.replace(temporary_path, path)


def _roots() -> list[str]:
    """The folders of the standard library and of the installed packages, each once."""
    names = ("stdlib", "purelib", "platlib")
    return list(dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in names))


def _installation_hash() -> str:
    found = metadata.distributions(path=_roots())
    distributions = sorted({f"{each.name}=={each.version}" for each in found})
    return xxhash.xxh3_64_hexdigest(repr((_FORMAT_VERSION, sys.version, distributions)).encode())
