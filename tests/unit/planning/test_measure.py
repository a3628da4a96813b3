"""Measuring, at a size that takes no time: that every rate is found, not what it is."""

from __future__ import annotations

import pytest
import torch

from embedtrain.distributed.runtime import Runtime
from embedtrain.planning import measure
from embedtrain.sharding.machine import Machine


def test_every_rate_is_a_positive_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"_ROWS": 1 << 10, "_TOUCHED": 1 << 8, "_WORDS": 64, "_REPEATS": 1}.items():
        monkeypatch.setattr(measure, name, size)
    machine = measure.measure_machine(Runtime(0, 0, 1, torch.device("cpu")))
    assert Machine.from_json(machine.to_json(), "machine.json") == machine
    assert all(getattr(machine, name) > 0 for name in Machine.rates() if name != "network_bytes_per_second")
    assert machine.num_ranks == 1
