"""The site shows the sentences of docstrings whole."""

from __future__ import annotations

import importlib.util

import pytest

from tests.blocks import ROOT


@pytest.mark.parametrize("what", ["attribute", "data", "property"])
def test_a_colon_in_the_text_of_an_attribute_does_not_part_it(what: str) -> None:
    napoleon = pytest.importorskip("sphinx.ext.napoleon")
    found = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs/conf.py")
    assert found is not None and found.loader is not None
    conf = importlib.util.module_from_spec(found)
    found.loader.exec_module(conf)
    text = "Seed of all random draws: initial values, the order of the data."
    lines = [text]
    conf._as_restructured_text(None, what, "embedtrain.Config.seed", None, None, lines)
    shown = napoleon.GoogleDocstring(lines, napoleon.Config(), what=what, name="embedtrain.Config.seed").lines()
    assert text in shown
    assert not any(line.startswith(":type") for line in shown)
