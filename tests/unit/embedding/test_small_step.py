"""A small step is Python more than anything else: how many functions it calls is held, since its time cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

import embedtrain as et
from embedtrain.ops._backend import dispatch

MOST_CALLS = 130
"""Of functions of this package and of `torch.nn`; a step of one table made 151 before they were counted."""
FOLDERS = (str(Path(et.__file__).parent), str(Path(torch.nn.__file__).parent))


@pytest.mark.skipif(dispatch.cpu_backend() != "native", reason="the native library was not built")
def test_a_step_of_one_table_calls_few_functions() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("item", 50, 8)], [et.FeatureSpec("item", pooling="sum")])
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
    batch = {"item": et.Jagged(torch.arange(4), torch.ones(4, dtype=torch.int64))}
    called: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(FOLDERS):
            called.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")

    for is_counted in (False, True):
        sys.setprofile(note if is_counted else None)
        try:
            vectors = tables(batch)["item"]
            vectors.backward(torch.ones_like(vectors))
            optimizer.step()
            optimizer.zero_grad()
        finally:
            sys.setprofile(None)
    assert len(called) <= MOST_CALLS, called
    assert len(called) > MOST_CALLS * 0.8, "fewer calls: lower the bound"
    assert not any("__setattr__" in name for name in called), "a module takes microseconds to set an attribute"
