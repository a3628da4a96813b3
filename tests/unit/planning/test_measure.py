"""Measuring, at a size that takes no time: that every rate is found, not what it is."""

from __future__ import annotations

import pytest
import torch

from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.planning import measure, measure_models, timing
from embedtrain.sharding.machine import Machine


def test_every_rate_is_a_positive_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "REPEATS", 1)
    for module, sizes in {
        measure: {"_ROWS": 1 << 10, "_TOUCHED": 1 << 8},
        measure_models: {"_WORDS": 64, "_EXAMPLES": 64, "_USERS": 8, "_CANDIDATES": 16},
    }.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
    machine = measure.measure_machine(Runtime(ONE_PROCESS, 0, torch.device("cpu")))
    assert Machine.from_json(machine.to_json(), "machine.json") == machine
    assert all(getattr(machine, name) > 0 for name in Machine.rates() if name != "network_bytes_per_second")
    assert machine.num_ranks == 1
