"""Every implementation against autograd on a plain loop over centres and contexts."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from embedtrain.ops._backend import library
from embedtrain.ops.skipgram_block import TextBlock, count_predictions, native, reference, skipgram_block

SHAPES = [
    # positions, rows, dim, negatives, window
    (1, 3, 1, 5, 5),
    (2, 1, 3, 2, 1),  # one row: the same word everywhere
    (7, 5, 3, 5, 2),
    (40, 30, 100, 5, 5),
    (33, 4, 129, 7, 4),
    (18, 6, 300, 2, 9),  # a band of more than 32 words, rows of three parts
    (20, 30, 17, 0, 3),
    (25, 60, 16, 13, 5),
    (0, 4, 5, 5, 5),
    (0, 0, 3, 5, 5),
]


def make(num_positions: int, num_rows: int, dim: int, k: int, window: int) -> tuple[torch.Tensor, TextBlock]:
    generator = torch.Generator().manual_seed(num_positions + dim)
    vectors = torch.randn(num_rows, dim, generator=generator) * 0.5
    inputs = torch.randint(0, max(num_rows, 1), (num_positions,), generator=generator)
    targets = torch.randint(0, max(num_rows, 1), (num_positions, 1 + k), generator=generator)
    is_centre = torch.rand(num_positions, 1 + k, generator=generator) < 0.2
    targets = torch.where(is_centre, targets[:, :1], targets)  # negatives that are left out
    positions = torch.arange(num_positions)
    left, right = torch.randint(0, window + 1, (2, num_positions), generator=generator)
    starts, stops = (positions - left).clamp(min=0), (positions + right + 1).clamp(max=num_positions)
    return vectors, TextBlock(inputs, targets, starts, stops)


def plain_loss(vectors: torch.Tensor, block: TextBlock, architecture: str) -> torch.Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for centre in range(block.num_positions):
        around = [p for p in range(int(block.starts[centre]), int(block.stops[centre])) if p != centre]
        contexts = [vectors[block.inputs[p]] for p in around]
        if architecture == "cbow" and contexts:
            contexts = [torch.stack(contexts).mean(dim=0)]
        for context in contexts:
            own, *negatives = block.targets[centre].tolist()
            loss = loss - F.logsigmoid(context @ vectors[own])
            for negative in negatives:
                if negative != own:
                    loss = loss - F.logsigmoid(-(context @ vectors[negative]))
    return loss


@pytest.mark.parametrize("architecture", ["skipgram", "cbow"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_autograd_on_a_plain_loop(backend: str, shape: tuple[int, ...], architecture: str) -> None:
    vectors, block = make(*shape)
    exact = vectors.double().requires_grad_()
    expected = plain_loss(exact, block, architecture)
    if expected.requires_grad:
        expected.backward()
    expected_grad = torch.zeros_like(exact) if exact.grad is None else exact.grad
    loss, grad = skipgram_block(vectors, block, architecture)
    assert loss.dtype == torch.float64
    assert grad.dtype == torch.float32
    # float32 sums of up to a few hundred terms of order one
    torch.testing.assert_close(loss, expected.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_large_logits_neither_overflow_nor_vanish(backend: str, scale: float) -> None:
    vectors, block = make(7, 5, 3, 5, 2)
    exact = (vectors * scale).double().requires_grad_()
    expected = plain_loss(exact, block, "skipgram")
    expected.backward()
    loss, grad = skipgram_block(vectors * scale, block)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    assert exact.grad is not None
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-4, atol=1e-4 * scale)


def test_a_factor_multiplies_loss_and_gradient(backend: str) -> None:
    vectors, block = make(40, 30, 100, 5, 5)
    loss, grad = skipgram_block(vectors, block)
    doubled = skipgram_block(vectors, block, factor=2.0)
    assert torch.equal(doubled[0], loss * 2)  # a power of two changes no digit
    assert torch.equal(doubled[1], grad * 2)


@pytest.mark.skipif(not library.PATH.exists(), reason="only the native kernel writes to a buffer")
def test_the_gradient_is_written_to_the_buffer() -> None:
    vectors, block = make(40, 30, 100, 5, 5)
    buffer = torch.full_like(vectors, float("nan"))
    (loss, grad), (same_loss, expected) = skipgram_block(vectors, block, buffer=buffer), skipgram_block(vectors, block)
    assert grad.data_ptr() == buffer.data_ptr()
    assert torch.equal(grad, expected) and torch.equal(loss, same_loss)
    for wrong in (buffer[1:], buffer.double(), buffer.T.contiguous().T):
        with pytest.raises(ValueError, match=r"expected a contiguous buffer \[30, 100\] float32"):
            skipgram_block(vectors, block, buffer=wrong)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows_in_the_loss(backend: str, bad: float) -> None:
    vectors, block = make(40, 30, 100, 5, 5)
    vectors[block.inputs[0]] = bad
    loss, grad = skipgram_block(vectors, block)
    assert not loss.isfinite()
    assert not grad[block.targets[block.starts[0] : block.stops[0]]].isfinite().all()


def test_predictions_are_counted() -> None:
    index = torch.zeros(3, dtype=torch.int64)
    block = TextBlock(index, index.view(3, 1), torch.tensor([0, 0, 2]), torch.tensor([2, 2, 3]))
    assert int(count_predictions(block)) == 2
    assert int(count_predictions(block, "cbow")) == 2


@pytest.mark.parametrize("field", ["inputs", "targets", "starts", "stops"])
def test_an_index_outside_is_refused(backend: str, field: str) -> None:
    vectors, block = make(7, 5, 3, 5, 2)
    getattr(block, field).view(-1)[3] = 99
    with pytest.raises(ValueError, match="must"):
        skipgram_block(vectors, block)


@pytest.mark.slow  # compiles for seconds
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_kernel_for_avx512_computes_the_same_on_other_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, wide = "add_block<float8v, 2, 4, 2>", "add_block<float16v, 4, 2, 2>"
    backend = Path(library.__file__).parent
    source = (backend.parent / "skipgram_block" / "kernel.cpp").read_text()
    assert narrow in source and wide in source
    (tmp_path / "kernel.cpp").write_text(source.replace(narrow, wide))
    library_path = tmp_path / "wide.so"
    sources = [str(tmp_path / "kernel.cpp"), str(backend / "parallel.cpp")]
    flags = ["-O1", "-fPIC", "-shared", "-std=c++17", "-fopenmp-simd", "-pthread", "-Wno-psabi", f"-I{backend}"]
    subprocess.run(["g++", *flags, *sources, "-o", str(library_path)], check=True)
    loaded = ctypes.CDLL(str(library_path))
    built = library.get().embedtrain_skipgram_block
    loaded.embedtrain_skipgram_block.argtypes, loaded.embedtrain_skipgram_block.restype = built.argtypes, None
    monkeypatch.setattr(library, "get", lambda: loaded)
    for shape in SHAPES:
        vectors, block = make(*shape)
        found = native.skipgram_block(vectors, block, 1.0, None)
        assert found is not None
        loss, grad = reference.skipgram_block(vectors, block, "skipgram", 1.0)
        torch.testing.assert_close(found[0], loss, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(found[1], grad, rtol=2e-5, atol=5e-5)
