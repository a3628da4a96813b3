"""The optimizer of dense parameters, which every rank holds in full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import CheckpointError

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}

_WEIGHTS, _STATE = "dense/", "dense_optimizer/"
"""Prefixes of the names in a checkpoint: "dense/layer.weight", "dense_optimizer/layer.weight/exp_avg"."""


@dataclass
class DenseOptions:
    """Holds the options of a `DenseOptimizer`."""

    name: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    """The optimizer, from `torch.optim`."""
    lr: float = 1e-3
    """Base learning rate; it follows the same schedule as the learning rate of the tables."""
    weight_decay: float = 0.0
    """The `weight_decay` of the torch optimizer."""


def weights_in(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters and buffers, by name, from a result of `DenseOptimizer.tensors`."""
    return {name.removeprefix(_WEIGHTS): tensor for name, tensor in saved.items() if name.startswith(_WEIGHTS)}


def load_module(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Loads a module's parameters and buffers from a result of `DenseOptimizer.tensors`.

    Raises:
        CheckpointError: a parameter or buffer is missing, unexpected, or differs in shape or dtype. The message names
            all of them.
    """
    weights = weights_in(saved)
    expected = module.state_dict()
    differing = [
        f"{name} ({_shape(weights.get(name))} in the checkpoint, {_shape(expected.get(name))} in the model)"
        for name in sorted(weights.keys() | expected.keys())
        if _shape(weights.get(name)) != _shape(expected.get(name))
    ]
    if differing:
        raise CheckpointError(f"the dense part does not fit the model: {', '.join(differing)}")
    module.load_state_dict(weights)


@dataclass(frozen=True)
class Averaged:
    """Holds the gradients of the dense parameters, averaged over the ranks.

    Attributes:
        values: [n]; all gradients, flat.
        sizes: number of elements by parameter name, in order.
    """

    values: Tensor
    sizes: Mapping[str, int]

    def fault(self) -> str | None:
        """Returns a message that names a parameter whose gradient is not finite, or None; waits for the device."""
        if bool(self.values.isfinite().all()):
            return None
        parts = zip(self.sizes, self.values.split(list(self.sizes.values())), strict=True)
        bad = next(name for name, grad in parts if not bool(grad.isfinite().all()))
        return f"the gradient of the dense parameter {bad} is not finite"


class DenseOptimizer:
    """Trains a module's dense parameters identically on every rank, with an optimizer from `torch.optim`.

    The ranks sum their gradients in one all-reduce of a flat buffer. torch's `DistributedDataParallel` does not fit,
    because its buckets change after the first step. On three or more ranks this changes the order of summation, so a
    resumed run would not match an uninterrupted one bit for bit.

    Collective: every rank constructs one with the same module. All ranks take over the parameters of rank 0.

    Args:
        module: the module; it must not contain tables.
        name: "adam", "adamw", "adagrad" or "sgd".
        ranks: the ranks of the job.
        lr: learning rate.
        weight_decay: the `weight_decay` of the torch optimizer.

    Raises:
        ValueError: the name is unknown, a value is out of range, or the module has no parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str = DenseOptions.name,
        ranks: Ranks,
        lr: float = DenseOptions.lr,
        weight_decay: float = DenseOptions.weight_decay,
    ) -> None:
        if name not in _OPTIMIZERS:
            raise ValueError(f"there is no dense optimizer {name!r}; there are {', '.join(_OPTIMIZERS)}")
        self._module = module
        self._parameters = dict(module.named_parameters())
        self._ranks = ranks
        self._lr = lr
        make: Any = _OPTIMIZERS[name]  # the base class does not know the hyperparameters
        # A fused optimizer reads `found_inf` on the device and skips the step there. Fused Adagrad supports CPUs only.
        is_on_gpu = all(parameter.is_cuda for parameter in self._parameters.values())
        options = {"fused": True} if is_on_gpu and name != "adagrad" else {}
        self._optimizer: torch.optim.Optimizer = make(
            self._parameters.values(), lr=lr, weight_decay=weight_decay, **options
        )
        for tensor in self._module.state_dict().values():
            ranks.broadcast(tensor)

    @property
    def name(self) -> str:
        """The class name of the torch optimizer."""
        return type(self._optimizer).__name__

    @property
    def takes_found_inf(self) -> bool:
        """Whether `step` supports `found_inf`, which skips a step on the device without a host sync."""
        return getattr(self._optimizer, "_step_supports_amp_scaling", False)

    def average_gradients(self) -> Averaged:
        """Averages the gradients over the ranks, in place.

        Each rank's loss is a mean over its local batch, so the average is the gradient of the mean over the global
        batch.

        Collective: every rank; all get the same averages.
        """
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = {name: parameter.grad for name, parameter in self._parameters.items() if parameter.grad is not None}
        flat = self._ranks.all_reduce(torch.cat([grad.flatten() for grad in grads.values()]))
        flat /= self._ranks.size
        for grad, averaged in zip(grads.values(), flat.split([g.numel() for g in grads.values()]), strict=True):
            grad.copy_(averaged.view_as(grad))
        return Averaged(flat, {name: grad.numel() for name, grad in grads.items()})

    def step(self, factor: float, found_inf: Tensor | None = None) -> None:
        """Applies the averaged gradients.

        Args:
            factor: multiplies the learning rate.
            found_inf: scalar float32 on the device; 1 skips the step. Requires `takes_found_inf`.
        """
        for settings in self._optimizer.param_groups:
            settings["lr"] = self._lr * factor
        if found_inf is not None:
            assert self.takes_found_inf
            self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self._optimizer.step()

    def zero_grad(self) -> None:
        """Clears the gradients."""
        self._optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Returns parameters, buffers and the optimizer's state by their names in a checkpoint."""
        named = {_WEIGHTS + name: tensor for name, tensor in self._module.state_dict().items()}
        for name, parameter in self._parameters.items():
            for kind, value in self._optimizer.state[parameter].items():
                # Momentum is None before the first step; then the checkpoint has no entry for it.
                if isinstance(value, Tensor):
                    named[f"{_STATE}{name}/{kind}"] = value
        return named

    def load_tensors(self, saved: Mapping[str, Tensor], *, with_state: bool = True) -> None:
        """Loads a result of `tensors`.

        Args:
            saved: tensors by name.
            with_state: whether to load the optimizer state too; if False, the state stays as it is.

        Raises:
            CheckpointError: a parameter or buffer is missing, unexpected, or differs in shape or dtype. The message
                names all of them.
        """
        load_module(self._module, saved)
        if not with_state:
            return
        state: dict[int, dict[str, Tensor]] = {}
        for position, name in enumerate(self._parameters):
            own = f"{_STATE}{name}/"
            kinds = {key.removeprefix(own): value for key, value in saved.items() if key.startswith(own)}
            if kinds:
                state[position] = kinds
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
