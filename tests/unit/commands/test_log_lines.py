"""Which lines of loggers a command shows."""

from __future__ import annotations

import logging

import pytest

from embedtrain.cli import main


def test_lines_of_libraries_are_shown_if_they_warn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    level = logging.root.level
    monkeypatch.setattr(logging.root, "handlers", [])
    logging.root.setLevel(logging.NOTSET)
    try:
        assert main(["publish"]) == 2
        capsys.readouterr()
        for name in ("faiss.loader", "embedtrain.serve"):
            logging.getLogger(name).info(f"told by {name}")
            logging.getLogger(name).warning(f"warned by {name}")
    finally:
        logging.root.setLevel(level)
    assert capsys.readouterr().err.splitlines() == [
        "warned by faiss.loader",
        "told by embedtrain.serve",
        "warned by embedtrain.serve",
    ]
