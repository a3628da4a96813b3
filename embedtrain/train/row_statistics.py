"""Statistics of table rows, from frequent to rare ids: effective learning rates, and rows that were never touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from embedtrain.distributed.ranks import Ranks
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.embedding.table_group import TableShard
from embedtrain.metrics.sinks import Histogram
from embedtrain.ops._backend.transfer import to_host
from embedtrain.optim.optimizer import SparseOptimizer

NUM_DECILES = 10
_BINS_PER_DECADE = 10
_SMALLEST, _LARGEST = -9, 3
"""Range of the histogram of effective rates, as powers of ten; rates outside count in the first or last bin."""
_CHUNK_ROWS = 1 << 18


@dataclass(frozen=True)
class TableStatistics:
    """Holds the statistics of one table's rows over all ranks.

    Attributes:
        rates: histograms of the effective learning rates, one per decile of frequency, most frequent ids first. One
            histogram of all rows if the frequencies are not known.
        mean_state: mean of the second moments, for Adagrad of the accumulators.
        never_touched: fraction of rows whose second moment still has its initial value.
    """

    rates: list[Histogram]
    mean_state: float
    never_touched: float


class RowStatistics:
    """Measures the rows of a collection's tables.

    Args:
        tables: the collection.
        optimizer: the optimizer of the tables.
        frequencies: by table, [num_rows]; how often each id occurs in the data. Tables may be left out.
        ranks: the ranks that share the tables.
    """

    def __init__(
        self,
        tables: EmbeddingCollection,
        optimizer: SparseOptimizer,
        frequencies: Mapping[str, Tensor],
        ranks: Ranks,
    ) -> None:
        self._tables = tables
        self._optimizer = optimizer
        self._ranks = ranks
        self._deciles = {
            name: _deciles(shard, frequencies[name]) if name in frequencies else None
            for name, shard in tables.shards.items()
        }

    def measure(self) -> dict[str, TableStatistics]:
        """Returns the statistics by table, without tables whose optimizer has no effective rates.

        Collective: every rank.
        """
        found = {}
        for group in self._tables.table_groups:
            group.access.write_back()
        shards = self._tables.shards
        # `effective_rates` numbers the table groups in the optimizer's order, which can differ from the collection's.
        for number, settings in enumerate(self._optimizer.param_groups):
            for table in settings["tables"]:
                first = shards[table].first_row
                rows = range(first, first + len(shards[table].weight))
                if (statistics := self._measure(number, table, rows)) is not None:
                    found[table] = statistics
        return found

    def _measure(self, number: int, table: str, rows: range) -> TableStatistics | None:
        deciles = self._deciles[table]
        num_bins = (_LARGEST - _SMALLEST) * _BINS_PER_DECADE
        num_parts = 1 if deciles is None else NUM_DECILES
        counts = torch.zeros(num_parts * num_bins, dtype=torch.float64)
        totals = torch.zeros(3, dtype=torch.float64)  # rows, sum of their mean states, rows never touched
        for start in range(rows.start, rows.stop, _CHUNK_ROWS):
            chunk = slice(start, min(start + _CHUNK_ROWS, rows.stop))
            read = self._optimizer.effective_rates(number, chunk)
            if read is None:
                return None
            bins = ((read.rates.log10() - _SMALLEST) * _BINS_PER_DECADE).floor().clamp(0, num_bins - 1).long()
            if deciles is not None:
                bins += num_bins * deciles[chunk.start - rows.start : chunk.stop - rows.start]
            counts += to_host(torch.bincount(bins, minlength=len(counts)).double())
            sums = [float(len(bins)), float(read.mean_states.double().sum()), float(read.is_untouched.sum())]
            totals += torch.tensor(sums, dtype=torch.float64)
        summed = self._ranks.all_reduce(torch.cat([totals, counts]))
        num_rows, states, untouched = summed[:3].tolist()
        edges = [10 ** (_SMALLEST + bin / _BINS_PER_DECADE) for bin in range(num_bins + 1)]
        histograms = [Histogram(edges, part.tolist()) for part in summed[3:].view(num_parts, num_bins)]
        return TableStatistics(histograms, states / num_rows, untouched / num_rows)


def _deciles(shard: TableShard, frequencies: Tensor) -> Tensor:
    """Returns the frequency decile of each row of this rank's shard, [num_local_rows] int64; 0 is the most frequent."""
    num_rows = shard.spec.num_rows
    order = torch.argsort(frequencies, descending=True, stable=True)
    decile = torch.empty(num_rows, dtype=torch.int64)
    decile[order] = torch.arange(num_rows) * NUM_DECILES // num_rows
    ids = shard.layout.id_of(torch.arange(*shard.slots))
    return decile[ids].to(shard.weight.device)
