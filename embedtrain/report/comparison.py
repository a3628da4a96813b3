"""The page that compares several runs: their measures, their curves and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from embedtrain import storage
from embedtrain.config.resolved import settings_in
from embedtrain.config.secrets import hide_secrets
from embedtrain.errors import UserError
from embedtrain.export.storage import refuse_packed_name
from embedtrain.metrics.figures import Section, Table
from embedtrain.metrics.names import as_words
from embedtrain.report.curves import charts_of
from embedtrain.report.facts import RunFacts, read_facts
from embedtrain.report.headline import headline_names, mode_of
from embedtrain.report.page import Card, Page, number, render

OUTPUT_NAME = "comparison.html"

_ALWAYS_OTHER = ("run.path",)


def write_comparison(run_paths: Sequence[str], output: str | None) -> str:
    """Writes a page of HTML that compares runs, which needs no other file, and returns its path.

    Args:
        run_paths: the run folders, any fsspec URLs; at least two.
        output: the page, which replaces an earlier one; None for `comparison.html` in the current folder.

    Raises:
        UserError: there is no run in a folder, or a run is named twice.
    """
    path = output or OUTPUT_NAME
    refuse_packed_name(path, "HTML")
    facts = [read_facts(run_path) for run_path in run_paths]
    if len({each.path for each in facts}) < len(facts):
        raise UserError(f"a run is named twice: {', '.join(storage.shown(each.path) for each in facts)}")
    storage.replace(path, render(comparison_page(facts)).encode(), f"{path}.tmp")
    return path


def comparison_page(runs: Sequence[RunFacts]) -> Page:
    """Returns the page that compares runs."""
    named = dict(zip(run_names(runs), runs, strict=True))
    charts = charts_of({name: facts.logged for name, facts in named.items()})
    sections = [Section("Measures", [_measures(named)])]
    if charts.quality:
        sections.append(Section("Quality", charts.quality))
    differing = list(_differing(named))
    if differing:
        sections.append(Section("Settings that differ", [Table("", ("setting", *named), differing)]))
    if charts.progress:
        sections.append(Section("Speed and learning rate", charts.progress))
    plumbing = [Section("Stages, bytes and ids", charts.plumbing)] if charts.plumbing else []
    return Page(
        title=f"{len(runs)} runs compared",
        summary=", ".join(named),
        cards=list(_cards(named)),
        sections=sections,
        folded=plumbing,
    )


def run_names(runs: Sequence[RunFacts]) -> list[str]:
    """Returns the names of the runs; their paths if two runs have one name."""
    names = [facts.name for facts in runs]
    return names if len(set(names)) == len(names) else [storage.shown(facts.path) for facts in runs]


def _cards(named: Mapping[str, RunFacts]) -> Iterator[Card]:
    """Yields the last value of the measure that stands out most in the first run, for each run."""
    first = next(iter(named.values()))
    judged = next(iter(headline_names(first.logged, first.settings)), "loss")
    for name, facts in named.items():
        values = facts.curves.get(judged, ([], []))[1]
        yield Card(name, number(values[-1]) if values else "none", as_words(judged))


def _measures(named: Mapping[str, RunFacts]) -> Table:
    measures = list(dict.fromkeys(m for facts in named.values() for m in headline_names(facts.logged, facts.settings)))
    rows: list[list[str | float | int | None]] = []
    for measure in measures:
        last = [facts.curves[measure][1][-1] if measure in facts.curves else None for facts in named.values()]
        mode = mode_of(measure, next(iter(named.values())).settings)
        known = [value for value in last if value is not None]
        best = None if mode is None or len(known) < 2 else (min if mode == "min" else max)(known)
        rows.append(
            [
                as_words(measure),
                *(None if value is None else number(value) + (" ★" if value == best else "") for value in last),
            ]
        )
    rows.append(["steps", *(f"{facts.step:,}" for facts in named.values())])
    rows.append(["epochs", *(f"{facts.epochs:.4g}" for facts in named.values())])
    rows.append(["seconds of training", *(f"{facts.seconds:,.0f}" for facts in named.values())])
    return Table("", ("last value", *named), rows, "★ marks the best of the runs.")


def _differing(named: Mapping[str, RunFacts]) -> Iterator[tuple[str, ...]]:
    settings: list[Mapping[str, Any]] = [settings_in(facts.config) for facts in named.values()]
    for key in dict.fromkeys(key for each in settings for key in each):
        values = [str(each.get(key, "")) for each in settings]
        if len(set(values)) > 1 and key not in _ALWAYS_OTHER:
            yield (key, *(hide_secrets(key, value) for value in values))
