from __future__ import annotations

from collections.abc import Iterator

import pytest

from embedtrain.ops import dispatch
from embedtrain.ops.native import library


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once per implementation of the ops."""
    if request.param == "native" and library.find() is None:
        pytest.skip(f"the native library was not built: {library.HOW_TO_BUILD}")
    monkeypatch.setenv(dispatch.VARIABLE, request.param)
    dispatch.cpu_backend.cache_clear()
    yield request.param
    dispatch.cpu_backend.cache_clear()
