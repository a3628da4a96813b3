from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from embedtrain.ops._backend import dispatch, library


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once per implementation of the ops; Triton's kernels under its interpreter."""
    yield from run_on(request.param, monkeypatch)


@pytest.fixture(params=["reference", "native", "native on 3 threads", "triton"])
def threaded_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As `backend`, for ops that divide their work among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3 if request.param.endswith("3 threads") else 1)
    yield from run_on(request.param.partition(" ")[0], monkeypatch)
    torch.set_num_threads(before)


def run_on(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if name == "native" and library.find() is None:
        pytest.skip(f"the native library was not built: {library.how_to_build()}")
    if name == "triton":
        if torch.cuda.is_available():
            pytest.skip("there is a GPU: tests/gpu runs the kernels themselves, and a process can do one of the two")
        pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv(dispatch.VARIABLE, name)
    dispatch.cpu_backend.cache_clear()
    yield name
    dispatch.cpu_backend.cache_clear()


# Triton's interpreter takes seconds per test. An odd number of columns, a full block and more than one stay in the
# ordinary run; `--all` takes the other widths too, and bfloat16 in more than one width.
_DIMS_ONLY_WITH_ALL = (1, 16, 32, 37, 100, 128, 300)
_DIM_IN_BFLOAT16 = 64


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(item, "callspec", None)
        if parameters is None or item.path.parent != Path(__file__).parent:
            continue
        backends = (parameters.params.get("backend"), parameters.params.get("threaded_backend"))
        dim, is_bfloat16 = parameters.params.get("dim"), parameters.params.get("dtype") == torch.bfloat16
        if "triton" in backends and (
            dim in _DIMS_ONLY_WITH_ALL or (is_bfloat16 and dim not in (None, _DIM_IN_BFLOAT16))
        ):
            item.add_marker(pytest.mark.slow)
