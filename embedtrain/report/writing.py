"""Writes the page about a run, and the page that compares several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from embedtrain import storage
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.config.secrets import without_secrets
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import CheckpointError, UserError, counted
from embedtrain.export.storage import refuse_packed_name
from embedtrain.metrics.figures import Bars, Part, Section, Table, Text
from embedtrain.recipes.registry import recipe_of
from embedtrain.recipes.trained import checkpoint_of, require_config
from embedtrain.report.advice import advice
from embedtrain.report.curves import charts_of
from embedtrain.report.facts import RunFacts, read_facts
from embedtrain.report.headline import cards_of, last_values
from embedtrain.report.page import Page, render
from embedtrain.report.rows import is_complete_on_first, row_sections
from embedtrain.train.run_folder import RunFolder

MAX_TABLE_BYTES = 8 << 30
"""Of the tables of a rank: a run with larger ones is told of without what its model would have to be loaded for."""

_logger = logging.getLogger(__name__)


def write_report(
    run_path: str,
    output: str | None,
    words: Sequence[str],
    runtime: Runtime,
    analogies: Sequence[str] = (),
    table: str | None = None,
) -> str:
    """Writes a page of HTML about a run, which needs no other file, and returns its path.

    The run may be going on, and may have no checkpoint yet.

    Collective: every rank; rank 0 writes the page.

    Args:
        run_path: the run folder, any fsspec URL.
        output: the page, which replaces an earlier one; None for `report.html` in the run folder.
        words: names of the rows whose neighbours to show; some frequent rows if there are none.
        runtime: of this process.
        analogies: files of questions on words; see `evaluate_analogies`.
        table: the table whose rows to show in neighbours and map; None for the default one.

    Raises:
        UserError: there is no run, no such table or word, or a file of questions cannot be used.
    """
    if output is not None:
        refuse_packed_name(output, "HTML")
    ranks = runtime.ranks
    facts = ranks.run_on_each(lambda: read_facts(run_path) if ranks.rank == 0 else None)
    sections = _sections(run_path, runtime, lambda path: row_sections(run_path, words, analogies, runtime, path, table))
    path = output or f"{run_path.rstrip('/')}/report.html"

    def write() -> None:
        if facts is not None:
            storage.replace(path, render(run_page(facts, sections)).encode(), f"{path}.tmp")

    ranks.run_on_each(write)
    return path


def _sections(run_path: str, runtime: Runtime, of_rows: Callable[[str | None], list[Section]]) -> list[Section]:
    """Returns the sections of the run's recipe and of its rows. Collective: every rank."""
    while True:
        # Ranks that looked for themselves might find different checkpoints, because the run may be saving one.
        path = runtime.ranks.run_on_first(lambda: _chosen_checkpoint(run_path))
        try:
            of_recipe = recipe_sections(run_path, runtime, path)
            return [*of_recipe, *of_rows(path)]
        except (CheckpointError, UserError):
            if path is None or is_complete_on_first(path, runtime.ranks):
                raise
            # The training of the run has saved another one meanwhile, and deleted this one.


def _chosen_checkpoint(run_path: str) -> str | None:
    """Returns the path of the checkpoint to read; None if there is none."""
    is_there = latest_checkpoint(RunFolder(run_path).checkpoints_path) is not None
    return checkpoint_of(run_path, None) if is_there else None


def recipe_sections(run_path: str, runtime: Runtime, path: str | None) -> list[Section]:
    """Returns what the run's recipe has to say of a checkpoint; nothing without one. Collective: every rank."""
    config = require_config(run_path)
    report = recipe_of(config.model).report
    if report is None or path is None:
        return []
    per_rank = runtime.ranks.run_on_first(lambda: _bytes_of_tables(path)) / runtime.world_size
    if per_rank > MAX_TABLE_BYTES:
        _logger.warning(
            f"the report is without the measures of {config.model}: its tables take {per_rank / 2**30:.0f} GiB per "
            f"rank, and at most {MAX_TABLE_BYTES >> 30} are loaded for it: run it by torchrun on more ranks"
        )
        return []
    try:
        return list(report(config, runtime, path))
    except UserError as error:
        _logger.warning(f"the report is without the measures of {config.model}: {error}")
        return []


def _bytes_of_tables(path: str) -> int:
    with CheckpointReader(path) as reader:
        weights = [info for name, info in reader.tensors.items() if name.endswith("/weight")]
    return sum(info.shape[0] * info.shape[1] * info.dtype.itemsize for info in weights)


def run_page(facts: RunFacts, sections: Sequence[Section] = ()) -> Page:
    """Returns the page about a run.

    Args:
        facts: of the run.
        sections: what its recipe and its rows say, in order.
    """
    charts = charts_of({facts.name: facts.logged})
    extra = {name: value for section in sections for name, value in section.measures.items()}
    of_quality = [Section("Quality", charts.quality)] if charts.quality else []
    of_progress = [Section("Speed and learning rate", charts.progress)] if charts.progress else []
    return Page(
        title=facts.name,
        summary=_summary(facts),
        badge=_state(facts),
        cards=cards_of(facts.logged, facts.settings, extra),
        advice=advice(facts),
        sections=[*of_quality, *sections, *of_progress],
        folded=[*_tables(facts), *_machinery(facts, charts.plumbing), *_origin(facts)],
    )


def _state(facts: RunFacts) -> str:
    return str(facts.status.get("state", "not finished"))


def _summary(facts: RunFacts) -> str:
    parts = [f"{_state(facts)} at step {facts.step:,}"]
    if facts.world_size is not None:
        parts.append(counted(facts.world_size, "rank"))
    if 0 < facts.epochs < float("inf"):
        parts.append(f"{facts.epochs:.4g} {'epoch' if facts.epochs == 1 else 'epochs'}")
    parts.append(f"{_duration(facts.seconds)} of training")
    model = facts.settings.get("model")
    summary = f"{'' if model is None else f'{model}: '}{', '.join(parts)}."
    return summary if facts.world_size is not None else f"{summary} There is no checkpoint yet."


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} minutes"


def _tables(facts: RunFacts) -> list[Section]:
    rows = [
        (table.name, table.num_rows, table.dim, "not known" if table.num_untouched is None else table.num_untouched)
        for table in facts.tables
    ]
    last = Table("Last values", ("measure", "value"), [(name, value) for name, value in last_values(facts.logged)])
    parts: list[Part] = [last] if last.rows else []
    if rows:
        parts.append(Table("Tables", ("table", "rows", "dim", "rows never trained"), rows))
    return [Section("All measures and tables", parts)] if parts else []


def _machinery(facts: RunFacts, charts: Sequence[Part]) -> list[Section]:
    stages = facts.stage_seconds
    parts: list[Part] = [*charts]
    if stages:
        note = (
            "Mean over the ranks, as their hosts see it. Stages lie inside others: exchange is waiting for other ranks "
            "and copying their rows, wherever in the step."
        )
        milliseconds = [1000 * seconds for seconds in stages.values()]
        parts.insert(0, Bars("Stages", list(stages), milliseconds, note, "stage", "milliseconds per step", ".3f"))
    parts += [Text(rank, text) for rank, text in facts.profile.items()]
    return [Section("Where the time went: stages, bytes and ids", parts)] if parts else []


def _origin(facts: RunFacts) -> list[Section]:
    rows = [("run folder", storage.shown(facts.path))]
    if facts.starts:
        first, last = facts.starts[0], facts.starts[-1]
        rows.append(("started", str(first.get("time"))))
        if len(facts.starts) > 1:
            rows.append(("started again", f"{len(facts.starts) - 1} times, the last on {last.get('time')}"))
        rows += [
            (label, without_secrets(str(last[key])))
            for key, label in (
                ("command", "command"),
                ("commit", "git commit"),
                ("version", "embedtrain"),
                ("torch", "PyTorch"),
                ("python", "Python"),
                ("ranks", "ranks"),
            )
            if last.get(key) is not None
        ]
    return [
        Section("Origin", [Table("", ("what", "value"), rows)]),
        Section("Settings", [Text("", without_secrets(facts.config))]),
    ]
