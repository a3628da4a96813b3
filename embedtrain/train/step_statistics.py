"""Statistics of training steps: seconds per stage, bytes between ranks, memory, and counts of distinct and hot ids."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.stages import bytes_sent, seconds_by_stage
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.ops.sort_unique import sort_unique

_OUTER_STAGES = ("sample", "prepare", "forward", "backward", "update")
_STAGES = (*_OUTER_STAGES, "unique", "exchange", "kernel", "agree", "save", "evaluate")
_HOTTEST = 100
"""One in this many distinct ids, the most frequent ones, counts as hot."""


class StepStatistics:
    """Measures the cost and the lookups of the steps since the last call of `measure`, over all ranks.

    Args:
        tables: the tables of the model.
        ranks: the ranks of the run.
    """

    def __init__(self, tables: EmbeddingCollection, ranks: Ranks) -> None:
        self._tables = tables
        self._ranks = ranks
        # By step, the keys of each lookup by table group: for the current step, and for later steps prepared ahead.
        self._keys: dict[int, list[Mapping[int, torch.Tensor]]] = {}
        self._step = 0
        tables.watch(self._note)
        self._seen = self._costs()

    def begin_step(self, step: int) -> None:
        """Starts a step: lookups from now on, and lookups made ahead for this step, belong to it."""
        self._keys = {later: keys for later, keys in self._keys.items() if later >= step}
        self._step = step

    @contextmanager
    def ahead(self, step: int) -> Iterator[None]:
        """Assigns the lookups in this context to a later step."""
        begun, self._step = self._step, step
        try:
            yield
        finally:
            self._step = begun

    def measure(self, num_steps: int) -> dict[str, float]:
        """Returns the statistics of the steps since the last call, and of the ids of the last step.

        Collective: every rank.

        Args:
            num_steps: number of steps since the last call.

        Returns:
            `stage/NAME`: host seconds per step, mean over the ranks. Stages can be nested.
            `stage/busiest_rank`: largest working time of a rank, without waiting, divided by the mean.
            `exchange/bytes`: bytes sent to other ranks per step, summed over the ranks.
            `ids/looked_up`, `ids/distinct`: ids in the last step. Each rank counts its distinct ids, and the counts are
                added.
            `ids/hottest_share`: fraction of the looked-up ids that belong to the most frequent 1 % of distinct ids.
            `memory/host_bytes`, `memory/device_bytes`: peak memory of the rank with the highest peak.
        """
        costs = self._costs()
        spent, self._seen = costs - self._seen, costs
        own = torch.cat([spent / max(num_steps, 1), self._ids(), _memory(self._tables.device)])
        # Each rank fills one row and leaves zeros elsewhere, so the sum holds all rows.
        by_rank = torch.zeros(self._ranks.size, len(own), dtype=torch.float64)
        by_rank[self._ranks.rank] = own
        by_rank = self._ranks.all_reduce(by_rank)
        seconds, sent, ids, memory = by_rank.split([len(_STAGES), 1, 3, 2], dim=1)
        means = dict(zip(_STAGES, seconds.mean(dim=0).tolist(), strict=True))
        found = {f"stage/{name}": mean for name, mean in means.items() if mean > 0}
        if self._ranks.size > 1:
            work = seconds[:, : len(_OUTER_STAGES)].sum(dim=1) - seconds[:, _STAGES.index("exchange")]
            found["stage/busiest_rank"] = float(work.max() / work.mean().clamp(min=1e-12))
            found["exchange/bytes"] = float(sent.sum())
        looked_up, distinct, hottest = ids.sum(dim=0).tolist()
        found |= {"ids/looked_up": looked_up, "ids/distinct": distinct}
        if looked_up:
            found["ids/hottest_share"] = hottest / looked_up
        on_host, on_device = memory.max(dim=0).values.tolist()
        return {**found, "memory/host_bytes": on_host, **({"memory/device_bytes": on_device} if on_device else {})}

    def _note(self, keys: Mapping[int, torch.Tensor]) -> None:
        # Lookups without gradients belong to evaluations.
        if torch.is_grad_enabled():
            self._keys.setdefault(self._step, []).append(keys)

    def _costs(self) -> torch.Tensor:
        """Returns [stages + 1] float64: seconds per stage and bytes sent, since the process started."""
        seconds = seconds_by_stage()
        costs = [seconds.get(name, 0.0) for name in _STAGES]
        return torch.tensor([*costs, float(bytes_sent())], dtype=torch.float64)

    def _ids(self) -> torch.Tensor:
        """Returns [3] float64 for the last step: number of ids, of distinct ids, and of occurrences of hot ids."""
        found = torch.zeros(3, dtype=torch.float64)
        noted = self._keys.get(self._step, [])
        for group in sorted({group for keys in noted for group in keys}):
            looked_up = torch.cat([keys[group] for keys in noted if group in keys])
            counts = sort_unique(looked_up, with_inverse=False).starts.diff()
            hottest = counts.sort(descending=True).values[: -(-len(counts) // _HOTTEST)]
            found += torch.tensor([len(looked_up), len(counts), int(hottest.sum())], dtype=torch.float64)
        return found


def _memory(device: torch.device) -> torch.Tensor:
    """Returns [2] float64: the peak of this process's host memory and of its device memory, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    on_device = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return torch.tensor([on_host, on_device], dtype=torch.float64)
