"""The page itself."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any

import jinja2

from embedtrain import storage
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import printable
from embedtrain.export.storage import refuse_packed_name
from embedtrain.report.advice import advice
from embedtrain.report.facts import STAGE, RunFacts, read_facts
from embedtrain.report.plots import curve_svgs, map_svg


def write_report(run_path: str, output: str | None, words: Sequence[str], runtime: Runtime) -> str:
    """Writes a page of HTML about a run, which needs no other file, and returns its path.

    Collective: every rank; rank 0 writes the page.

    Args:
        run_path: the run folder, any fsspec URL.
        output: the page, which replaces an earlier one; None for `report.html` in the run folder.
        words: the words whose neighbours to show; some frequent words if there are none.
        runtime: of this process.

    Raises:
        UserError: there is no run, no complete checkpoint, no such word, or no matplotlib.
    """
    if output is not None:
        refuse_packed_name(output, "HTML")
    facts = read_facts(run_path, words, runtime)
    page = render(facts, map_svg(facts.frequent_rows, facts.frequent_words) if facts.frequent_words else "")
    path = output or f"{run_path.rstrip('/')}/report.html"
    if runtime.rank == 0:
        storage.replace(path, page.encode(), f"{path}.tmp")
    return path


def render(facts: RunFacts, row_map: str) -> str:
    """Returns the page; `row_map` is SVG, or empty."""
    source = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_printable)
    return environment.from_string(source).render(
        facts=facts,
        curves=curve_svgs(facts.curves),
        last={name: values[-1] for name, (_, values) in facts.curves.items() if not name.startswith(STAGE)},
        row_map=row_map,
        advice=advice(facts),
    )


def _printable(value: Any) -> Any:
    """Shows control characters of names and paths as escapes; HTML cannot hold them."""
    return printable(value, keep="\n") if type(value) is str else value
