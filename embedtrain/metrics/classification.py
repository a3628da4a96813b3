"""Measures of predicted probabilities over the examples of all ranks: AUC, log loss and calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedtrain.distributed.ranks import Ranks
from embedtrain.ops._backend.transfer import to_host

EXACT_EXAMPLES = 1 << 20
"""Default number of examples up to which the AUC is exact."""
NUM_BINS = 1 << 16
"""Default number of bins that count the logits of held-out examples."""
TRAINING_BINS = 1 << 12
"""Number of bins for training batches. Fewer than for held-out examples, because ranks sum them every few steps."""

_LARGEST_LOGIT = 16.0
_BETWEEN = 0.5
"""Threshold between a negative label, 0, and a positive one, 1."""
_EXAMPLES, _NUM_TOTALS = 0, 4
"""`classification_sums` begins with 4 totals: examples, positives, log loss and predicted probabilities."""

RECORDED = ("auc", "log_loss", "normalised_entropy", "calibration")
"""Names of the measures of held-out examples that are logged."""

TRAINED = ("auc", "normalised_entropy", "calibration")
"""Names of the measures of training batches that are logged."""


@dataclass(frozen=True)
class ClassificationReport:
    """Holds the measures of predicted probabilities; a measure is NaN if it is not defined, as without examples.

    Attributes:
        num_examples: number of predicted examples.
        auc: area under the ROC curve: probability that a positive has a higher score than a negative. Ties count half.
        auc_error: maximum difference between `auc` and the exact area; 0 if `auc` is exact.
        log_loss: mean cross-entropy, in nats.
        normalised_entropy: log loss divided by the log loss of always predicting the mean label; below 1 is better.
        calibration: sum of the predicted probabilities divided by the number of positives.

    Source of the normalised entropy: He et al. 2014, "Practical lessons from predicting clicks on ads at Facebook".
    """

    num_examples: int
    auc: float
    auc_error: float
    log_loss: float
    normalised_entropy: float
    calibration: float

    def as_record(self, prefix: str = "") -> dict[str, float]:
        """Returns the measures by name, with `prefix` before each name, for a metric sink."""
        record = {prefix + name: getattr(self, name) for name in RECORDED}
        return record | ({f"{prefix}auc_error": self.auc_error} if self.auc_error > 0 else {})


class ClassificationMeter:
    """Collects predictions batch by batch in bounded memory, and reports their measures.

    The AUC is exact for up to `exact_examples` examples over all ranks. For more examples it is computed from counts of
    logits in bins. A positive and a negative in the same bin then count half, so the error of the AUC is at most half
    the share of such pairs.

    Args:
        exact_examples: number of examples up to which the logits are kept.
        num_bins: number of bins, of equal width between logits of -16 and 16.
    """

    def __init__(self, exact_examples: int = EXACT_EXAMPLES, num_bins: int = NUM_BINS) -> None:
        self._exact_examples = exact_examples
        self._num_bins = num_bins
        self.reset()

    def reset(self) -> None:
        """Removes all predictions."""
        self._sums = classification_sums(torch.zeros(0), torch.zeros(0), self._num_bins)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._num_kept = 0

    def add(self, logits: Tensor, labels: Tensor, *, scores: Tensor | None = None) -> None:
        """Adds predictions.

        Args:
            logits: [n], on any device.
            labels: [n], 0 or 1.
            scores: [n]; order of the examples in the exact AUC; None for the logits. Probabilities have more ties than
                logits, because two logits may round to one probability.
        """
        logits, labels = to_host(logits.detach().float()), to_host(labels.detach().float())
        self._sums += classification_sums(logits, labels, self._num_bins)
        self._num_kept += labels.numel()
        if self._num_kept <= self._exact_examples:
            self._kept.append((logits if scores is None else to_host(scores.detach().float()), labels > _BETWEEN))
        else:
            self._kept = []

    def report(self, ranks: Ranks) -> ClassificationReport:
        """Returns the measures over all ranks. Collective: every rank."""
        sums = ranks.all_reduce(self._sums.clone())
        if sums[_EXAMPLES] > self._exact_examples:
            return report_of(sums)
        kept = [pair for theirs in ranks.all_gather(self._kept) for pair in theirs]
        return report_of(sums, _counts_by_logit(kept))


def classification_sums(logits: Tensor, labels: Tensor, num_bins: int) -> Tensor:
    """Returns sums from which `report_of` computes the measures; [4 + 2 * num_bins] float64.

    Sums of several batches or ranks are added. The 4 totals come first, then the negatives and the positives per bin.

    Args:
        logits: [n].
        labels: [n], 0 or 1.
        num_bins: number of bins, of equal width between logits of -16 and 16. Logits outside this range count in the
            first and the last bin.
    """
    wide, labels = logits.detach().double(), labels.double()
    loss = F.binary_cross_entropy_with_logits(wide, labels, reduction="sum")
    totals = torch.stack([torch.full_like(loss, labels.numel()), labels.sum(), loss, wide.sigmoid().sum()])
    bins = ((wide / _LARGEST_LOGIT + 1) * (num_bins / 2)).nan_to_num().long().clamp(0, num_bins - 1)
    places = bins + (labels > _BETWEEN) * num_bins
    # `bincount` would need a device sync for the largest index.
    counts = torch.zeros(2 * num_bins, dtype=torch.int64, device=places.device)
    counts.scatter_add_(0, places, torch.ones_like(places))
    return torch.cat([totals, counts.double()])


def report_of(sums: Tensor, counts: Tensor | None = None) -> ClassificationReport:
    """Returns the measures that belong to sums.

    Args:
        sums: result of `classification_sums`, added up over all batches and ranks.
        counts: [2, n] negatives and positives at each distinct logit, for an exact AUC; None to compute the AUC from
            the bins.
    """
    num_examples, positives, loss, probabilities = sums[:_NUM_TOTALS].tolist()
    is_exact = counts is not None
    negative, positive = counts if counts is not None else sums[_NUM_TOTALS:].view(2, -1)
    auc, tied = area_under_curve(negative, positive)
    log_loss = _ratio(loss, num_examples)
    return ClassificationReport(
        num_examples=int(num_examples),
        auc=auc,
        auc_error=0.0 if is_exact else tied / 2,
        log_loss=log_loss,
        normalised_entropy=_ratio(log_loss, _entropy(_ratio(positives, num_examples))),
        calibration=_ratio(probabilities, positives),
    )


def training_measures(sums: Tensor) -> dict[str, float]:
    """Returns the logged measures of training batches from `classification_sums`.

    Each batch is predicted before the model is trained on it.
    """
    report = report_of(sums)
    return {name: getattr(report, name) for name in TRAINED}


def area_under_curve(negatives: Tensor, positives: Tensor) -> tuple[float, float]:
    """Returns the area under the ROC curve of binned scores, and the share of tied pairs.

    Args:
        negatives: [num_bins] int64; count of negatives per bin, in order of score.
        positives: [num_bins] int64; count of positives per bin.

    Returns:
        The share of pairs of a positive and a negative whose positive is in a higher bin, plus half the share of pairs
        in the same bin; and the share of pairs in the same bin. Both are NaN if there are no pairs.
    """
    below = negatives.double().cumsum(0) - negatives.double()
    pairs = float(positives.sum()) * float(negatives.sum())
    above = float((positives.double() * below).sum())
    tied = float((positives.double() * negatives.double()).sum())
    return _ratio(above + tied / 2, pairs), _ratio(tied, pairs)


def _counts_by_logit(kept: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns the counts of negatives and positives at each distinct logit, in order: [2, num_distinct]."""
    logits = torch.cat([torch.zeros(0), *(logits for logits, _ in kept)])
    is_positive = torch.cat([torch.zeros(0, dtype=torch.bool), *(positive for _, positive in kept)])
    distinct, place = torch.unique(logits, return_inverse=True)
    counts = torch.zeros(2, distinct.numel(), dtype=torch.int64)
    return counts.index_put_((is_positive.long(), place), torch.ones_like(place), accumulate=True)


def _entropy(share: float) -> float:
    if not 0 < share < 1:
        return math.nan
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
