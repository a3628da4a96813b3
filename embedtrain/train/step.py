"""One training step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from embedtrain.config.sections import TrainConfig
from embedtrain.distributed.stages import stage
from embedtrain.errors import UserError
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.optim.optimizer import SparseOptimizer
from embedtrain.train.task import DivisibleBatch, Model, Objective


@dataclass(frozen=True)
class StepOptions:
    """Holds the options of a training step.

    Attributes:
        accumulate_steps: micro-batches per step.
        precision: dtype of the matrix products in forward and backward, through `torch.autocast`. It does not change
            the dtype of parameters, optimizer states or rows.
        tf32: whether GPUs multiply float32 matrices in TF32.
        reset_state_from_step: number of steps after which the state of the tables' optimizer is reset; None for never.
        device_type: device type of the model, "cpu" or "cuda".
    """

    accumulate_steps: int = 1
    precision: torch.dtype = torch.float32
    tf32: bool = False
    reset_state_from_step: int | None = None
    device_type: str = "cpu"

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the context manager for a forward pass."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, self.precision)

    def products(self) -> AbstractContextManager[object]:
        """Returns the context manager for forward and backward."""
        return _products_in_tf32() if self.tf32 else nullcontext()


DEFAULT_OPTIONS = StepOptions()
"""One batch per step, in float32."""


def step_options(
    section: TrainConfig, device: torch.device, *, reset_state_from_step: int | None = None
) -> StepOptions:
    """Returns the step options of a configuration.

    Raises:
        UserError: the device does not support TF32 or bfloat16, and the configuration requires it.
    """
    is_old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if section.tf32 and (device.type != "cuda" or is_old_gpu):
        has = f"{torch.cuda.get_device_name(device)} has none" if is_old_gpu else "this run is on the CPU"
        raise UserError(f"train.tf32=true needs a GPU with TF32, of compute capability 8.0 or more, and {has}")
    if section.precision == "bfloat16" and is_old_gpu:
        raise UserError(
            f"train.precision=bfloat16 needs a GPU of compute capability 8.0 or more, which "
            f"{torch.cuda.get_device_name(device)} is not"
        )
    return StepOptions(
        section.accumulate_steps,
        getattr(torch, section.precision),
        section.tf32,
        reset_state_from_step,
        device.type,
    )


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether a device has bfloat16 instructions; a CPU without them is slower in bfloat16 than in float32.

    True for any GPU, because `step_options` rejects GPUs without them.
    """
    if device.type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def _products_in_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def micro_batches(batch: Any, accumulate_steps: int) -> Sequence[Any]:
    """Returns the micro-batches of this rank's batch.

    Raises:
        UserError: the batches of this model cannot be split.
    """
    if accumulate_steps == 1:
        return [batch]
    if not isinstance(batch, DivisibleBatch):
        raise UserError(
            f"train.accumulate_steps={accumulate_steps}: the batches of this model cannot be divided, because "
            f"{type(batch).__name__} has no method split(num_parts)"
        )
    return batch.split(accumulate_steps)


def train_step(
    model: Model,
    optimizer: SparseOptimizer,
    batch: Any,
    dense: DenseOptimizer | None = None,
    dense_factor: float = 1.0,
    meanwhile: Callable[[], None] | None = None,
    further: Iterable[Any] = (),
    options: StepOptions = DEFAULT_OPTIONS,
) -> Objective:
    """Trains on this rank's batch and returns its objective.

    Collective: every rank, with the same number of micro-batches; a batch may be empty.

    Args:
        model: takes the batch.
        optimizer: the optimizer of the tables; its parameter groups hold the learning rates.
        batch: this rank's batch, or its first micro-batch.
        dense: the optimizer of the dense parameters, which steps only if the tables do; None if there are none.
        dense_factor: multiplies the learning rate of `dense`.
        meanwhile: called while a GPU still works on the step, after forward and backward or after the update.
        further: the other micro-batches. Each is requested while a GPU still works on the one before it.
        options: options of the step.

    Raises:
        NonFiniteError: the loss or a gradient is not finite on some rank; see `SparseOptimizer`.
    """
    objectives = []
    for part in itertools.chain([batch], further):
        with options.products():
            with stage("forward"), options.autocast():
                objective = model(part)
            with stage("backward"):
                objective.loss.backward()
        objectives.append(objective)
    objective = _sum_of(objectives)
    # On several ranks, `meanwhile` waits for the sizes that the ranks exchange. It runs after the update, so that the
    # device has work during this wait. One rank waits for nothing, so it runs earlier: its numbers then reach the host
    # together with the verdict of the previous step.
    is_before = not optimizer.looks_later or optimizer.stores[0].ranks.size == 1
    if meanwhile is not None and is_before:
        optimizer.settle()
        meanwhile()
    if dense is not None:
        averaged = dense.average_gradients()
        optimizer.watch(averaged.values, averaged.fault)
    optimizer.watch(objective.total)
    with stage("update"):
        num_skipped = optimizer.num_skipped
        optimizer.step()
        optimizer.zero_grad()
        if dense is not None:
            if optimizer.looks_later:
                dense.step(dense_factor, optimizer.found_inf)
            elif optimizer.num_skipped == num_skipped:
                dense.step(dense_factor)
            dense.zero_grad()
    if meanwhile is not None and not is_before:
        meanwhile()
    return objective


def _sum_of(objectives: Sequence[Objective]) -> Objective:
    """Returns the objective of a batch, given the objectives of its micro-batches (at least one)."""
    first, *others = objectives
    if not others:
        return first
    sums = [objective.sums for objective in objectives if objective.sums is not None]
    return Objective(
        loss=torch.stack([objective.loss.detach() for objective in objectives]).sum(),
        total=torch.stack([objective.total for objective in objectives]).sum(),
        num_predictions=sum(objective.num_predictions for objective in objectives),
        sums=torch.stack(sums).sum(dim=0) if sums else None,
    )
