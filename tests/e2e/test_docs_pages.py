"""The pages of the docs: their links lead somewhere, their reference is of the code, what cannot be run is sound."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from embedtrain.recipes.loading import load_config, shipped_names
from tests.blocks import MADE, PAGES, ROOT, Block, blocks, redirected
from tests.unit.commands.parsing import parse

BLOCKS = [block for page in PAGES if page.name not in MADE for block in blocks(page)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Markdown viewers name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


def test_every_page_can_be_found() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for path in [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "docs").rglob("*.rst"),
        *(ROOT / "docs/examples").glob("*.py"),
    ]:
        linking = [page for page, text in texts.items() if page != path and path.name in text]
        assert linking or path == ROOT / "docs/index.md", path
    assert "docs/index.md" in texts[ROOT / "README.md"]


def test_every_page_is_in_a_table_of_contents() -> None:
    """Sphinx refuses a page that is in none; this says so before the site is built."""
    docs = ROOT / "docs"
    listed = {docs / "index.md"}
    for page in docs.rglob("*.md"):
        for entries in re.findall(
            r"^:::\{toctree\}\n(.*?)^:::$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            for entry in (line for line in entries.splitlines() if line and not line.startswith(":")):
                name = re.sub(r".*<(.+)>", r"\1", entry)
                listed |= {path.resolve() for suffix in (".md", ".rst") for path in page.parent.glob(name + suffix)}
    assert sorted({*docs.rglob("*.md"), *docs.rglob("*.rst")} - listed) == []


def test_the_page_of_settings_is_of_the_code_as_it_is() -> None:
    # In a process of its own: torch adds methods to an optimizer's class when the first one is made.
    script = [sys.executable, str(ROOT / "scripts" / "settings_page.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_public_module_has_a_page_of_reference() -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.rst")}
    assert pages.keys() >= {
        "embedtrain",
        "embedtrain.optim",
        "embedtrain.recipes.api",
        "embedtrain.checkpoint",
        "embedtrain.export",
        "embedtrain.metrics",
    }
    for module, text in pages.items():
        assert f".. automodule:: {module}\n   :members:\n" in text
        # Without this line names that a package takes from its modules are left out.
        assert (":imported-members:" in text) == hasattr(importlib.import_module(module), "__all__"), module


def test_settings_of_every_kind_are_on_their_page() -> None:
    settings = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    for key in ("run.path", "init_from", "items.init_from", "data.features.NAME.bag", "optimizer.betas"):
        assert f"\n| `{key}` |" in settings


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_a_block_is_run_or_checked(block: Block) -> None:
    if block.language == "python":
        compile(block.text, str(block.page), "exec")
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text)
    for words in block.commands:
        check(words, is_run=not block.not_run)


def check(words: list[str], *, is_run: bool) -> None:
    """Checks a command without running it: its programs read it, and the files that it names are there."""
    program, *arguments = redirected(words)[0]
    if program == "torchrun":
        parsed = get_args_parser().parse_args(arguments)
        if parsed.module:
            check([parsed.training_script, *parsed.training_script_args], is_run=is_run)
        else:
            check(["python", parsed.training_script], is_run=is_run)
    elif program == "embedtrain":
        options = parse(arguments).params
        config = options.get("config")
        if config in shipped_names() or (config is not None and (ROOT / config).exists()):
            path = config if config in shipped_names() else str(ROOT / config)
            assert load_config(path, ["data.path=x", *options["settings"]]).run.path
        elif config is not None:
            assert is_run, f"{words}: no such configuration"
    elif program == "python":
        assert is_run or all((ROOT / name).exists() for name in arguments if "/" in name), words
    else:
        assert not is_run, f"{words}: nobody runs this; say why in a comment before the block"
        for name in arguments:
            if name.startswith(("scripts/", "docker/", "configs/")):
                assert (ROOT / name).exists(), words
            if name.endswith(".sh"):
                subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


def test_every_setting_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs/settings.md").read_text().splitlines() if line[:3] == "| `"]
    assert len(rows) > 150
    # What stands in brackets at the end are the choices.
    assert not [row[0] for row in rows if not re.sub(r"\(`.*`\)|\|", "", row[-1]).strip()]
