"""Scores rows of files with a trained model, in file order, on any number of ranks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedtrain.data.click_batches import ClickBatch
from embedtrain.data.click_schema import ClickSchema
from embedtrain.errors import UserError
from embedtrain.export.storage import refuse_input
from embedtrain.recipes.base import RowScorer
from embedtrain.serve.reading import Round, RowFiles, Unit, schema_of_file

_SHOWN = 3

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreOptions:
    """Says which rows to score and how to read them.

    Attributes:
        path: path of the files, as in `expand_sources`; or "-" for standard input.
        keep: columns of the files to copy to the output.
        has_label: whether to read the label.
        max_bad_lines: maximum number of bad lines to skip; one more is an error.
        is_format_given: whether the user set the format of the files; otherwise their suffixes may choose another.
        output: path of the output file, which must not be an input file; None if there is none.
    """

    path: str | Sequence[str]
    keep: Sequence[str] = ()
    has_label: bool = False
    max_bad_lines: int = 0
    is_format_given: bool = False
    output: str | None = None


@dataclass(frozen=True)
class Scored:
    """Holds the scores of consecutive rows of the files, without bad lines.

    Attributes:
        probabilities: [n] float32.
        logits: [n] float32.
        labels: [n] float32; zeros if labels are not read.
        kept: the columns to copy to the output.
    """

    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32]
    labels: NDArray[np.float32]
    kept: pa.RecordBatch


def score_rows(scorer: RowScorer, options: ScoreOptions) -> Iterator[Scored]:
    """Yields the scored rows on rank 0, in file order; yields nothing on other ranks.

    Rank 0 reads the files. Each rank scores and holds up to `UNIT_ROWS` rows at a time.

    Collective: every rank must exhaust the iterator.

    Raises:
        UserError: on every rank; a file cannot be read, lacks a column, or there are too many bad lines.
    """
    ranks = scorer.ranks
    schema = _schema_of(scorer, options)
    files = ranks.run_on_each(lambda: _open_files(options, schema) if ranks.rank == 0 else None)
    rounds = iter(()) if files is None else files.rounds(ranks.size)
    bad = _BadLines(options.max_bad_lines, files)
    while (found := ranks.run_on_first(lambda: next(rounds, None))) is not None:
        unit = found.units[ranks.rank] if ranks.rank < len(found.units) else None
        batch, own_wrong = ranks.run_on_each(functools.partial(_encode, scorer, schema, unit))
        logits = scorer.logits(batch)
        # One rank computes a whole unit at once, so that results do not depend on the number of ranks.
        results = ranks.all_gather((logits.sigmoid().numpy(), logits.numpy(), batch.labels.numpy(), own_wrong))
        wrong = [each for *_, each in results]
        if found.num_bad or any(wrong):
            ranks.run_on_first(functools.partial(bad.add, found, wrong))
        if files is not None:
            for each, (probabilities, of_unit, labels, left_out) in zip(found.units, results, strict=False):
                yield Scored(probabilities, of_unit, labels, _kept(each, options.keep, left_out))
    bad.tell()


def _open_files(options: ScoreOptions, schema: ClickSchema) -> RowFiles:
    files = RowFiles(options.path, schema, options.keep)
    if options.output is not None:
        refuse_input(options.output, files.urls, "--data")
    return files


def _schema_of(scorer: RowScorer, options: ScoreOptions) -> ClickSchema:
    schema = schema_of_file(scorer.schema, path=options.path, is_given=options.is_format_given)
    return schema if options.has_label else replace(schema, label=None, positive=None)


def _encode(scorer: RowScorer, schema: ClickSchema, unit: Unit | None) -> tuple[ClickBatch, dict[int, str]]:
    return (scorer.nothing(), {}) if unit is None else scorer.encode(unit.rows, schema, unit.where)


def _kept(unit: Unit, names: Sequence[str], wrong: Mapping[int, str]) -> pa.RecordBatch:
    """Returns the columns to copy to the output, without bad lines."""
    kept = unit.batch.select(list(names))
    return kept.filter(pa.array(~np.isin(unit.lines, list(wrong)))) if wrong else kept


class _BadLines:
    """Counts bad lines on rank 0."""

    def __init__(self, max_bad_lines: int, files: RowFiles | None) -> None:
        self._max_bad_lines = max_bad_lines
        self._files = files
        self._num_bad = 0
        self._shown: list[str] = []

    def add(self, found: Round, wrong: Sequence[Mapping[int, str]]) -> None:
        """Counts the bad lines of a round.

        Raises:
            UserError: there are more bad lines than allowed.
        """
        assert self._files is not None
        self._num_bad += found.num_bad + sum(map(len, wrong))
        self._shown += found.shown
        for unit, of_unit in zip(found.units, wrong, strict=False):
            for line, reason in islice(of_unit.items(), _SHOWN):
                self._shown.append(f"{self._files.place(unit, line)}: {reason}")
        del self._shown[_SHOWN:]
        if self._num_bad > self._max_bad_lines:
            raise UserError(
                f"{'; '.join(self._shown)}. At least {self._num_bad} bad lines exceed data.max_bad_lines="
                f"{self._max_bad_lines}: correct them, or raise data.max_bad_lines to skip them"
            )

    def tell(self) -> None:
        """Warns of the number of skipped lines, if any."""
        if self._num_bad:
            shown = "; ".join(self._shown)
            _logger.warning(f"skipped {self._num_bad} bad lines, for example {shown}")
