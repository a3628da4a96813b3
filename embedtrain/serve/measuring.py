"""Measures a trained ranking model on any file of rows with labels, as a whole and by groups of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import UserError
from embedtrain.metrics.classification import ClassificationMeter
from embedtrain.serve.scoring import Scored


@dataclass(frozen=True)
class Group:
    """The rows that share a value.

    Attributes:
        name: the value.
        num_rows: how many.
        auc: area under the ROC curve of these rows; NaN if they are of one class.
    """

    name: str
    num_rows: int
    auc: float


@dataclass(frozen=True)
class Measures:
    """Measures of a model on rows.

    Attributes:
        num_rows: how many were scored.
        values: by name.
        groups: the largest first; empty without a column to group by.
    """

    num_rows: int
    values: Mapping[str, float]
    groups: Sequence[Group]


def measure_scores(scored: Iterable[Scored], by: str | None = None) -> Measures:
    """Returns AUC, log loss, normalised entropy and calibration, and the AUC by groups.

    `gauc` is the mean of the groups' AUC, weighted by their rows, without groups of one class. Thirteen bytes per row
    are kept for it.

    Args:
        scored: the rows.
        by: a kept column, by whose values rows are grouped.

    Source of the grouped measure: Zhu et al. 2017, "Optimized cost per click in Taobao display advertising".
    """
    meter = ClassificationMeter()
    groups = _Groups()
    for part in scored:
        probabilities, labels = torch.from_numpy(part.probabilities), torch.from_numpy(part.labels)
        meter.add(torch.from_numpy(part.logits), labels, scores=probabilities)
        if by is not None:
            groups.add(part.kept.column(by), part.probabilities, part.labels)
    report = meter.report(ONE_PROCESS)
    values = report.as_record()
    if by is None:
        return Measures(report.num_examples, values, [])
    found = groups.measure()
    of_both = [group for group in found if not math.isnan(group.auc)]
    weight = sum(group.num_rows for group in of_both)
    values["gauc"] = sum(group.auc * group.num_rows for group in of_both) / weight if weight else math.nan
    return Measures(report.num_examples, values, found)


class _Groups:
    """Keeps the scores of rows by the value of a column."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}
        self._parts: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]] = []

    def add(self, column: pa.Array, scores: NDArray[np.float32], labels: NDArray[np.float32]) -> None:
        if pa.types.is_nested(column.type):
            raise UserError(f"--by: rows are grouped by texts and numbers, and the column holds {column.type}")
        values = column.cast(pa.large_string()).fill_null("").dictionary_encode()
        codes = [self._codes.setdefault(value, len(self._codes)) for value in values.dictionary.to_pylist()]
        self._parts.append((np.array(codes, np.int64)[np.asarray(values.indices)], scores, labels > 0))

    def measure(self) -> list[Group]:
        """Returns the groups, the largest first."""
        if not self._parts:
            return []
        codes, scores, labels = (np.concatenate(each) for each in zip(*self._parts, strict=True))
        order = np.lexsort((scores, codes))
        codes, scores, labels = codes[order], scores[order], labels[order]
        sizes = np.bincount(codes)
        positives = np.bincount(codes, labels)
        # Mann-Whitney: of the rows of a group in order of their scores, the ranks of the positives; ties share theirs.
        is_first = np.append(True, (codes[1:] != codes[:-1]) | (scores[1:] != scores[:-1]))
        first = np.flatnonzero(is_first)
        last = np.append(first[1:], len(codes)) - 1
        ranks = ((first + last) / 2 + 1)[is_first.cumsum() - 1] - (sizes.cumsum() - sizes)[codes]
        above = np.bincount(codes, ranks * labels) - positives * (positives + 1) / 2
        pairs = positives * (sizes - positives)
        areas = np.where(pairs > 0, above / np.maximum(pairs, 1), np.nan)
        names = list(self._codes)
        largest = np.argsort(-sizes, kind="stable").tolist()
        return [Group(names[code], int(sizes[code]), float(areas[code])) for code in largest]
