"""What a part of a model computes on whole tensors, counted by running it at a small size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from embedtrain.planning.plan import Arithmetic

_FEW, _MANY = 8, 24


def count(run: Callable[[], object]) -> Arithmetic:
    """Runs a computation and counts what it does, all of it as for the examples."""
    counter = _Counter()
    with FlopCounterMode(display=False) as flops, counter:
        run()
    # Of each product there are a multiplication and an addition.
    products, found = flops.get_total_flops() / 2, flops.get_flop_counts().get("Global", {})
    batched = sum(found.get(op, 0) for op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)) / 2
    return Arithmetic(0.0 + counter.ops, 0.0, counter.values, products - batched, batched)


def count_step(run: Callable[[int], object], num_examples: float) -> Arithmetic:
    """Counts what a step does for so many examples, by steps of a few.

    Args:
        run: computes a step of so many examples; what it does grows with them in proportion, but for a part that is
            the same for every step.
        num_examples: of the step asked for, over all ranks.
    """
    run(_FEW)  # what is done only once, such as allocating an optimizer's state, is no part of a step
    few, many = count(lambda: run(_FEW)), count(lambda: run(_MANY))
    values, products, batched = (
        (larger - smaller) / (_MANY - _FEW)
        for smaller, larger in (
            (few.values, many.values),
            (few.products, many.products),
            (few.batched_products, many.batched_products),
        )
    )
    of_step = few.values - _FEW * values
    return Arithmetic(few.ops, of_step, num_examples * values, num_examples * products, num_examples * batched)


class _Counter(TorchDispatchMode):
    """Counts what torch computes, operations on lists by the tensors in them; views compute nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            # Operations in place on lists return nothing: what they change is their first argument.
            changed = tree_leaves(args[0] if found is None else found)
            sizes = [leaf.numel() for leaf in changed if isinstance(leaf, Tensor)]
            self.ops += max(1, len(sizes))
            self.values += sum(sizes)
        return found
