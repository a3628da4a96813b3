"""Arithmetic is counted as it is done: by hand for layers of known sizes."""

from __future__ import annotations

import torch
from torch import nn

from embedtrain.planning.counting import count, count_step


def test_operations_their_results_and_products_are_counted() -> None:
    left, right = torch.rand(3, 5), torch.rand(5, 7)
    work = count(lambda: torch.relu(left @ right).view(7, 3))
    # A view computes nothing.
    assert (work.ops, work.step_values, work.values, work.products) == (2, 0, 42, 3 * 5 * 7)


def test_many_small_products_are_counted_apart() -> None:
    vectors = torch.rand(4, 3, 2)
    work = count(lambda: (vectors @ vectors.transpose(1, 2)).sum(dim=0) @ torch.rand(3, 5))
    assert (work.products, work.batched_products) == (3 * 3 * 5, 4 * 3 * 3 * 2)


def test_operations_in_place_on_lists_count_each_tensor() -> None:
    tensors = [torch.ones(4), torch.ones(6)]
    work = count(lambda: torch._foreach_add_(tensors, 1.0))
    assert (work.ops, work.values) == (2, 10)


def test_a_step_has_a_part_for_its_examples_and_one_of_its_own() -> None:
    layer = nn.Linear(5, 7)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)

    def step(num: int) -> None:
        layer(torch.ones(num, 5, requires_grad=True)).relu().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    work = count_step(step, 1000.0)
    # Output and gradients of input and weights, for each example.
    assert work.products == 1000 * 3 * 5 * 7
    assert work.values >= 1000 * (5 + 7 + 5 + 7 + 7)  # input, two outputs, and the gradients of input and output
    assert work.step_values >= 2 * 5 * 7  # the gradient of the weights, and the weights
    assert count_step(step, 10.0).step_values == work.step_values
    assert work.ops < 40
