"""`embedtrain plan --probe`: both bandwidths are found, and all ranks agree on them."""

from __future__ import annotations

import torch

from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import Runtime
from embedtrain.planning import probe
from embedtrain.planning.plan import Bandwidths
from embedtrain.testing.ranks import run_ranks


def probe_on(ranks: Ranks) -> Bandwidths:
    probe.COPY_BYTES = probe.EXCHANGE_BYTES = 1 << 16
    return probe.probe(Runtime(ranks, 0, torch.device("cpu")))


def test_ranks_agree_on_both_bandwidths() -> None:
    first, second, third = run_ranks(3, probe_on)
    assert first == second == third
    assert first.memory is not None
    assert first.exchange is not None
    assert min(first.memory, first.exchange) > 0
