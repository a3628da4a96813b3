"""The optimizer of what is not rows of tables: parameters that every rank holds whole."""

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
"""Beginnings of the names in a checkpoint: "dense/layer.weight", "dense_optimizer/layer.weight/exp_avg"."""


@dataclass
class DenseOptions:
    """The choices that there are for a `DenseOptimizer`, with their defaults."""

    name: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    """Which optimizer of torch."""
    lr: float = 1e-3
    """Base of the learning rate, which falls with the same schedule as the tables'."""
    weight_decay: float = 0.0
    """As the optimizer of torch has it."""


def weights_in(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters and buffers, by name, among what `DenseOptimizer.tensors` returned."""
    return {name.removeprefix(_WEIGHTS): tensor for name, tensor in saved.items() if name.startswith(_WEIGHTS)}


def load_module(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Gives a module the parameters and buffers that `DenseOptimizer.tensors` returned.

    Raises:
        CheckpointError: a parameter or buffer is missing, is too many, or has another shape; names all.
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
    """The gradients of dense parameters, averaged over the ranks.

    Attributes:
        values: [n]; all of them.
        sizes: elements of each parameter, in order.
    """

    values: Tensor
    sizes: Mapping[str, int]

    def fault(self) -> str | None:
        """Returns what is not finite, or None; waits for the device."""
        if bool(self.values.isfinite().all()):
            return None
        parts = zip(self.sizes, self.values.split(list(self.sizes.values())), strict=True)
        bad = next(name for name, grad in parts if not bool(grad.isfinite().all()))
        return f"the gradient of the dense parameter {bad} is not finite"


class DenseOptimizer:
    """Trains a module's parameters alike on every rank, with an optimizer of torch.

    The ranks sum their gradients in one all-reduce of one flat buffer. (The buckets of torch's
    `DistributedDataParallel` differ between a first step and later ones, and with them, on three ranks or
    more, the order of the sums: a resumed run would not be bit for bit the one that went on.)

    Collective: every rank makes one, with the same module; rank 0's values are taken over by all.

    Args:
        module: its parameters and buffers; it holds no rows of tables.
        name: "adam", "adamw", "adagrad" or "sgd".
        ranks: those of the job.
        lr: learning rate.
        weight_decay: as the optimizer of torch has it.

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
        # Fused optimizers learn from the device itself whether a step is to be left out. Adagrad's is for CPUs alone.
        is_on_gpu = all(parameter.is_cuda for parameter in self._parameters.values())
        options = {"fused": True} if is_on_gpu and name != "adagrad" else {}
        self._optimizer: torch.optim.Optimizer = make(
            self._parameters.values(), lr=lr, weight_decay=weight_decay, **options
        )
        for tensor in self._module.state_dict().values():
            ranks.broadcast(tensor)

    @property
    def name(self) -> str:
        """The name of torch's optimizer."""
        return type(self._optimizer).__name__

    @property
    def takes_found_inf(self) -> bool:
        """Whether `step` leaves out a step that only the device knows to be not finite."""
        return getattr(self._optimizer, "_step_supports_amp_scaling", False)

    def average_gradients(self) -> Averaged:
        """Averages the gradients over the ranks.

        The loss is a mean over the local batch: the average is the gradient of the mean over the global batch.

        Collective: every rank; the averages are the same on all.
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
        """Applies the averaged gradients with `factor` times the learning rate.

        Args:
            factor: of the learning rate.
            found_inf: scalar float32 on the device; nothing is applied if it is 1. See `takes_found_inf`.
        """
        for settings in self._optimizer.param_groups:
            settings["lr"] = self._lr * factor
        if found_inf is not None:
            assert self.takes_found_inf
            self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self._optimizer.step()

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self._optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Returns parameters, buffers and the optimizer's state by their names in a checkpoint."""
        named = {_WEIGHTS + name: tensor for name, tensor in self._module.state_dict().items()}
        for name, parameter in self._parameters.items():
            for kind, value in self._optimizer.state[parameter].items():
                # Momentum that has not begun is None: its absence says so.
                if isinstance(value, Tensor):
                    named[f"{_STATE}{name}/{kind}"] = value
        return named

    def load_tensors(self, saved: Mapping[str, Tensor], *, with_state: bool = True) -> None:
        """Takes over what `tensors` returned.

        Args:
            saved: by name.
            with_state: whether the optimizer's state is taken over too, not started anew.

        Raises:
            CheckpointError: a parameter or buffer is missing, is too many, or has another shape; names all.
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
