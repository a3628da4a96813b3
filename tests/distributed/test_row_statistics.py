from __future__ import annotations

from pathlib import Path

import pytest
import torch

import embedtrain as et
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.metrics.sinks import Histogram, TensorBoardSink
from embedtrain.testing.threads import run_threads
from embedtrain.train.row_statistics import RowStatistics, TableStatistics

ROWS = 40


def measure(ranks: Ranks) -> TableStatistics:
    """Trains id 0 for 20 steps and ids 1 to 9 once, of 40, whose frequencies fall with the id."""
    tables = et.EmbeddingCollection([et.TableSpec("t", ROWS, 4)], ranks=ranks)
    optimizer = et.optim.Adagrad(tables, lr=0.1, initial_accumulator_value=1.0)
    for step in range(20):
        ids = [0, *(range(1, 10) if step == 0 and ranks.rank == 0 else ())]
        tables({"t": et.Jagged.from_ids(torch.tensor(ids))})["t"].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return RowStatistics(tables, optimizer, {"t": torch.arange(ROWS, 0, -1)}, ranks).measure()["t"]


def filled(histogram: Histogram) -> list[tuple[float, float]]:
    """Returns the lower edge and the count of each bin that holds anything."""
    return [(low, n) for low, n in zip(histogram.edges, histogram.counts, strict=False) if n]


@pytest.mark.parametrize("world_size", [1, 2])
def test_hot_rows_have_smaller_rates_than_rare_ones(world_size: int) -> None:
    for found in run_threads(world_size, measure):
        assert found.never_touched == 30 / 40
        assert len(found.rates) == 10
        assert [sum(histogram.counts) for histogram in found.rates] == [4] * 10
        hot, rare = filled(found.rates[0]), filled(found.rates[-1])
        # Untouched rows keep the whole rate, 0.1 / sqrt(1); id 0 has 0.1 / sqrt(21), in the bin from 0.02.
        assert hot[0] == (pytest.approx(10**-1.7), 1)
        assert rare == [(pytest.approx(0.1), 4)]


def test_tables_without_frequencies_have_one_histogram() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("t", ROWS, 4)])
    optimizer = et.optim.Adam(tables, lr=0.1)
    found = RowStatistics(tables, optimizer, {}, ONE_PROCESS).measure()["t"]
    assert [sum(histogram.counts) for histogram in found.rates] == [ROWS]
    assert found.never_touched == 1.0


def test_an_optimizer_without_a_divisor_has_no_statistics() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("t", ROWS, 4)])
    assert RowStatistics(tables, et.optim.SGD(tables), {}, ONE_PROCESS).measure() == {}


def test_tensorboard_reads_the_histograms(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(str(tmp_path))
    sink.log_histogram("rates", Histogram([0.001, 0.01, 0.1, 1.0, 10.0], [0, 3, 5, 0]), step=7)
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Histograms("rates")
    assert event.step == 7
    assert event.histogram_value.num == 8
    assert list(event.histogram_value.bucket) == [3, 5]
