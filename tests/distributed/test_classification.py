from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.metrics.classification import (
    ClassificationMeter,
    ClassificationReport,
    area_under_curve,
    classification_sums,
    training_measures,
)
from embedtrain.testing.threads import run_threads


def predictions(num: int, seed: int, has_ties: bool = False, base: float = -1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = base + 2 * torch.randn(num, generator=generator)
    if has_ties:
        logits = (logits * 2).round() / 2
    labels = (torch.rand(num, generator=generator) < (0.7 * logits).sigmoid()).float()
    return logits, labels


def report_on_ranks(ranks: Ranks, world_size: int, exact_examples: int) -> ClassificationReport:
    logits, labels = predictions(5000, seed=3)
    meter = ClassificationMeter(exact_examples)
    # Unequal shares, and one rank of three has none.
    cuts = {1: [0, 5000], 2: [0, 1200, 5000], 3: [0, 1200, 1200, 5000]}[world_size]
    start, stop = cuts[ranks.rank], cuts[ranks.rank + 1]
    for batch in range(start, stop, 700):
        meter.add(logits[batch : min(batch + 700, stop)], labels[batch : min(batch + 700, stop)])
    return meter.report(ranks)


@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_measures_equal_scikit_learns(seed: int, has_ties: bool) -> None:
    logits, labels = predictions(3000, seed, has_ties)
    meter = ClassificationMeter()
    meter.add(logits[:1000], labels[:1000])
    meter.add(logits[1000:], labels[1000:])
    report = meter.report(ONE_PROCESS)
    probabilities = logits.double().sigmoid()
    assert report.num_examples == 3000
    assert report.auc == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    assert report.auc_error == 0
    assert report.log_loss == pytest.approx(log_loss(labels, probabilities), rel=1e-6)
    constant = torch.full_like(probabilities, float(labels.double().mean()))
    assert report.normalised_entropy == pytest.approx(report.log_loss / log_loss(labels, constant), rel=1e-6)
    assert report.calibration == pytest.approx(float(probabilities.sum() / labels.sum()), rel=1e-6)


@pytest.mark.parametrize("num_bins", [16, 256, 1 << 16])
def test_the_error_of_the_binned_area_is_stated(num_bins: int) -> None:
    logits, labels = predictions(3000, seed=1)
    meter = ClassificationMeter(exact_examples=0, num_bins=num_bins)
    meter.add(logits, labels)
    report = meter.report(ONE_PROCESS)
    assert report.auc_error > 0
    assert abs(report.auc - roc_auc_score(labels, logits)) <= report.auc_error
    assert report.auc_error < 4 / num_bins
    assert report.as_record("valid_")["valid_auc_error"] == report.auc_error


def test_logits_beyond_the_bins_count_in_the_outermost() -> None:
    meter = ClassificationMeter(exact_examples=0)
    meter.add(torch.tensor([-100.0, -40.0, 40.0, 100.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert meter.report(ONE_PROCESS).auc == 1.0


@pytest.mark.parametrize("exact_examples", [1 << 20, 100])
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_number_of_ranks_measures_the_same(world_size: int, exact_examples: int) -> None:
    alone = report_on_ranks(ONE_PROCESS, 1, exact_examples)
    assert (alone.auc_error == 0) == (exact_examples > 5000)
    for report in run_threads(world_size, report_on_ranks, world_size, exact_examples):
        assert report.as_record() == pytest.approx(alone.as_record(), rel=1e-12)


def test_a_meter_keeps_no_more_than_it_may() -> None:
    meter = ClassificationMeter(exact_examples=1000)
    for seed in range(4):
        meter.add(*predictions(600, seed))
    logits, labels = (torch.cat(parts) for parts in zip(*(predictions(600, s) for s in range(4)), strict=True))
    report = meter.report(ONE_PROCESS)
    assert abs(report.auc - roc_auc_score(labels, logits)) <= report.auc_error < 1e-3
    meter.reset()
    meter.add(logits[:500], labels[:500])
    assert meter.report(ONE_PROCESS).auc == pytest.approx(roc_auc_score(labels[:500], logits[:500]), abs=1e-12)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_labels_of_one_kind_have_no_area(label: float) -> None:
    meter = ClassificationMeter()
    meter.add(torch.randn(10), torch.full((10,), label))
    report = meter.report(ONE_PROCESS)
    assert math.isnan(report.auc)
    assert math.isnan(report.normalised_entropy)
    assert math.isfinite(report.log_loss)


def test_no_example_has_no_measure() -> None:
    assert all(math.isnan(value) for value in ClassificationMeter().report(ONE_PROCESS).as_record().values())


def test_ties_count_half() -> None:
    assert area_under_curve(torch.tensor([2, 2]), torch.tensor([1, 3])) == (0.625, 0.5)


def test_training_measures_come_from_sums_that_add_up() -> None:
    logits, labels = predictions(4000, seed=5)
    sums = classification_sums(logits[:100], labels[:100], 4096) + classification_sums(logits[100:], labels[100:], 4096)
    measures = training_measures(sums)
    assert measures["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-3)
    assert measures["calibration"] == pytest.approx(float(logits.double().sigmoid().sum() / labels.sum()), rel=1e-6)
