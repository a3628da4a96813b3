"""A source tree without a native library says which installed one it hides, and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedtrain.ops._backend import dispatch, library


@pytest.fixture(autouse=True)
def _unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tree = tmp_path / "clone" / "embedtrain"
    monkeypatch.setattr(library, "_PACKAGE", tree)
    monkeypatch.setattr(library, "PATH", tree / "ops" / "_backend" / library.PATH.name)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    for cached in (library.find, library.get, dispatch.cpu_backend):
        cached.cache_clear()
    yield
    for cached in (library.find, library.get, dispatch.cpu_backend):
        cached.cache_clear()


def test_an_installed_library_that_is_hidden_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed = tmp_path / "site-packages" / "embedtrain" / "ops" / "_backend"
    installed.mkdir(parents=True)
    (installed / library.PATH.name).write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    monkeypatch.syspath_prepend(str(tmp_path / "clone"))
    assert dispatch.cpu_backend() == "reference"
    assert f"and not from {tmp_path}/site-packages, which has one" in caplog.text
    assert "start from another folder, or run pip install -e . in the source tree" in caplog.text
    shutil.rmtree(tmp_path / "site-packages")


def test_without_an_installed_library_a_compiler_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.path", [])
    assert dispatch.cpu_backend() == "reference"
    assert "install a C++ compiler (g++), then run pip install again" in caplog.text
