"""What a report shows of the rows of a table: their neighbours, a map of them, and analogies between words."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from embedtrain.checkpoint import is_complete
from embedtrain.checkpoint.manifest import step_of
from embedtrain.data.readers.blocks import read_lines
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.export import Vectors, neighbors, unit_rows
from embedtrain.export.vectors import FloatRows
from embedtrain.metrics.analogies import evaluate_analogies
from embedtrain.metrics.figures import Bars, PointMap, Section, Table
from embedtrain.recipes.trained import open_run_vectors
from embedtrain.storage import base_name

NUM_MAPPED = 1000
"""Rows on the map, the most frequent ones."""
ANALOGY_WORDS = 30_000
"""The most frequent words, among which the answers of analogies are looked for: a few seconds of work."""

_NUM_NEIGHBORS = 6
_EXAMPLE_PLACES = (100, 200, 400, 800, 1600, 3200)

_logger = logging.getLogger(__name__)


def row_sections(
    run_path: str,
    words: Sequence[str],
    analogies: Sequence[str],
    runtime: Runtime,
    path: str | None,
    table: str | None = None,
) -> list[Section]:
    """Returns on rank 0 neighbours, a map and analogies of the rows; nothing if no table is the one to look at.

    Collective: every rank.

    Args:
        run_path: the run folder, any fsspec URL.
        words: names of the rows whose neighbours to show; some frequent rows if there are none.
        analogies: files of questions; see `evaluate_analogies`.
        runtime: of this process.
        path: of the checkpoint; None if there is none.
        table: the table whose rows to show; None for the default one.

    Raises:
        UserError: there is no such table or word, or a file of questions cannot be used.
    """
    if path is None and not words and not analogies and table is None:
        return []
    ranks = runtime.ranks
    step = None if path is None else step_of(base_name(path))
    try:
        opened = ranks.run_on_each(lambda: open_run_vectors(run_path, table, runtime, step))
    except UserError as error:
        if words or analogies or table or (path is not None and not is_complete_on_first(path, ranks)):
            raise
        # Several tables, and none is said to be the one to look at; or the data of a retrieval run are gone.
        _logger.info(f"the report is without neighbours and map: {error}")
        return []
    with opened as vectors:
        return ranks.run_on_each(lambda: _sections(vectors, words, analogies) if ranks.rank == 0 else [])


def is_complete_on_first(path: str, ranks: Ranks) -> bool:
    """Returns whether the checkpoint is still there, as rank 0 sees it. Collective: every rank."""
    return ranks.run_on_first(lambda: is_complete(path))


def _sections(vectors: Vectors, words: Sequence[str], analogies: Sequence[str]) -> list[Section]:
    near = {word: neighbors(vectors, word, _NUM_NEIGHBORS) for word in words or _examples(vectors)}
    frequent = vectors.first(NUM_MAPPED)
    shown = {*near, *frequent.words, *(other for found in near.values() for other, _ in found)}
    titles = _titles(vectors, sorted(shown))
    sections = [_neighbors(near, titles, vectors.noun)] if near else []
    if frequent.num_rows:
        sections.append(_map(frequent, titles))
    return [*_analogies(vectors, analogies), *sections]


def _titles(vectors: Vectors, words: Sequence[str]) -> Mapping[str, str]:
    try:
        return vectors.titles(words)
    except UserError as error:  # the files lie where the training read them, and may be gone
        _logger.warning(f"the report is without titles: {error}")
        return {}


def _examples(vectors: Vectors) -> list[str]:
    """Returns words spread over the frequent ones, the most common left out: they stand beside everything."""
    places = list(_EXAMPLE_PLACES)
    if vectors.num_rows <= places[2]:
        places = [vectors.num_rows * tenth // 10 for tenth in (1, 2, 3, 5, 7, 9)]
    return [vectors.words[place] for place in dict.fromkeys(places) if place < vectors.num_rows]


def _name(word: str, titles: Mapping[str, str]) -> str:
    return f"{titles[word]} ({word})" if titles.get(word) else word


def _neighbors(near: Mapping[str, Sequence[tuple[str, float]]], titles: Mapping[str, str], noun: str) -> Section:
    rows = [
        (_name(word, titles), ", ".join(f"{_name(other, titles)} {cosine:.2f}" for other, cosine in found))
        for word, found in near.items()
    ]
    note = f"The {noun}s whose vectors have the largest cosine with that of the {noun}."
    return Section(f"Nearest {noun}s", [Table("", (noun, "nearest, with cosine"), rows, note)])


def _map(frequent: Vectors, titles: Mapping[str, str]) -> Section:
    points = project(frequent.rows(0, frequent.num_rows))
    counts = () if frequent.counts is None else [float(count) for count in frequent.counts]
    note = (
        f"The {frequent.num_rows:,} most frequent {frequent.noun}s: the directions of their vectors on the first two "
        "principal components. Drag to zoom, double-click to zoom out."
    )
    names = [_name(word, titles) for word in frequent.words]
    labels = ("first principal component", "second principal component")
    drawn = PointMap("", names, points[:, 0].tolist(), points[:, 1].tolist(), note, *labels, weights=counts)
    return Section(f"Map of the {frequent.noun}s", [drawn])


def project(rows: FloatRows) -> FloatRows:
    """Returns [n, 2]: the directions of rows [n, dim] on their first two principal components, signs fixed."""
    unit = unit_rows(rows)
    _, _, axes = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
    first_two = np.zeros((2, rows.shape[1]), dtype=np.float32)
    first_two[: min(2, len(axes))] = axes[:2]
    # A component is known up to its sign: its largest part is made positive, for the same picture every time.
    largest = np.take_along_axis(first_two, np.abs(first_two).argmax(axis=1, keepdims=True), axis=1)
    points: FloatRows = unit @ np.where(largest < 0, -first_two, first_two).T
    return points


def _analogies(vectors: Vectors, paths: Sequence[str]) -> Iterator[Section]:
    paths = list(dict.fromkeys(paths))
    if not paths:
        return
    frequent = vectors.first(ANALOGY_WORDS)
    unit = unit_rows(frequent.rows(0, frequent.num_rows))
    for path in paths:
        found = evaluate_analogies(unit, frequent.words, read_lines(path), ANALOGY_WORDS, True, source=path)
        answered = [section for section in found.sections if section.num_questions]
        bars = Bars(
            "",
            [section.name for section in answered],
            [section.accuracy for section in answered],
            "Share of the questions whose answer is the word nearest to b - a + c (3CosAdd).",
            "section",
            "accuracy",
            ".1%",
            [f"{section.num_correct:,} of {section.num_questions:,}" for section in answered],
        )
        # Sections and measures of several files are told apart by the file.
        of_file = f" of {path}" if len(paths) > 1 else ""
        yield Section(
            f"Analogies{of_file}",
            [bars],
            f"Questions from {path} about the {frequent.num_rows:,} most frequent words. Questions with other words "
            f"are left out: {found.num_oov:,}.",
            {f"analogies{of_file}": found.total.accuracy} if found.total.num_questions else {},
        )
