from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path

import pytest

from embedtrain.data import python_docs
from embedtrain.data.python_docs import docstrings, paragraphs, python_modules, write_python_docs
from embedtrain.distributed.ranks import ONE_PROCESS

MODULE = '''"""Reads files."""

def outer():
    """Opens a file."""
    if True:
        async def inner():
            """Waits for a file."""
    try:
        pass
    except OSError:
        def handler():
            """Closes a file."""
    pattern = "\\d"
    return lambda: """not a docstring"""

class Reader:
    """Holds a file.

    More of it.
    """
    size = 1
    """not a docstring either"""

    def read(self):
        """Opens a file."""
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python installation in miniature, the only one that `python_docs` sees."""
    files = {
        "lib/pydoc_data/topics.py": "topics = {'if': 'The if statement.\\n\\n  if x:', 'for': 'Loops.'}",
        "lib/site-packages/ignored.py": '"""Seen as a root of its own or not at all."""',
        "site/pack/__init__.py": MODULE,
        "site/pack/again.py": '"""Reads files."""',
        "site/pack/broken.py": '"""Does not parse."""\ndef (:',
        "site/pack/nul.py": '"""Does not parse."""\0',
        "site/pack/latin.py": b'# coding: latin-1\n"""Caf\xe9."""',
        "site/pack/tests/test_it.py": '"""A test."""',
        "site/pack/data.json": '"""Not Python."""',
        "site/fake_pack-1.0.dist-info/METADATA": "Name: fake-pack\nVersion: 1.0\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    paths = {"stdlib": tmp_path / "lib", "purelib": tmp_path / "site", "platlib": tmp_path / "site"}
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(paths[name]))
    (tmp_path / "cache").mkdir()
    return tmp_path


def test_the_text_of_an_installation(site: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = Path(write_python_docs(str(site / "cache"), ONE_PROCESS))
    assert path.read_text(encoding="utf-8").split("\n") == [
        "The if statement.",
        "if x:",
        "Loops.",
        "Reads files.",
        "Opens a file.",
        "Waits for a file.",
        "Closes a file.",
        "Holds a file.",
        "More of it.",
        "Café.",
        "",
    ]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert gc.isenabled()


def test_is_written_once_per_set_of_distributions(site: Path) -> None:
    cache = str(site / "cache")
    first = write_python_docs(cache, ONE_PROCESS)
    Path(first).write_text("kept\n")
    assert write_python_docs(cache, ONE_PROCESS) == first
    assert Path(first).read_text() == "kept\n"
    metadata = site / "site" / "fake_pack-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    assert write_python_docs(cache, ONE_PROCESS) != first


def test_progress_is_told(site: Path) -> None:
    told: list[tuple[str, float]] = []
    write_python_docs(str(site / "cache"), ONE_PROCESS, lambda *progress: told.append(progress))
    assert told[0] == ("read docstrings", 0.0)


def test_modules_come_in_order_without_tests(site: Path) -> None:
    found = python_modules([str(site / "site"), str(site / "lib")])
    assert [Path(path).relative_to(site).as_posix() for path in found] == [
        "site/pack/__init__.py",
        "site/pack/again.py",
        "site/pack/broken.py",
        "site/pack/latin.py",
        "site/pack/nul.py",
        "lib/pydoc_data/topics.py",
    ]


def test_an_unreadable_module_is_skipped(tmp_path: Path) -> None:
    assert docstrings(str(tmp_path / "nothing.py")) == []


def test_this_installation_documents_itself() -> None:
    topics = next(path for path in python_modules(python_docs._roots()) if path.endswith("topics.py"))
    assert any('The "if" statement' in text for text in docstrings(topics))
    assert docstrings(json.__file__)[0].startswith("JSON (JavaScript Object Notation)")


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One\ntwo.\n\nThree.", ["One two.", "Three."]),
        ("Adds.\n\n>>> 1 + 1\n2\n\nMore.", ["Adds.", "More."]),
        ("Example::\n    >>> f(1)\n    x\n", ["Example::"]),
        (".. note::\n   Uses :class:`Tensor` and :py:func:`add`.", ["Uses `Tensor` and `add`."]),
        (r"Is :math:`\frac{a}{b}` of it.", ["Is of it."]),
        (":param size: bytes.\n:returns: text.", ["size: bytes. : text."]),
        ("-----\n\n* * *", []),
    ],
)
def test_paragraphs_are_lines_without_markup(docstring: str, expected: list[str]) -> None:
    assert paragraphs(docstring) == expected
