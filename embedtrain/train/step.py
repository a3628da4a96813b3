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
    """How the steps of a run are computed.

    Attributes:
        accumulate_steps: micro-batches of a step.
        precision: the dtype in which matrices are multiplied in the forward and the backward pass, as `torch.autocast`
            chooses them. Parameters, optimizers and rows are not affected.
        tf32: whether GPUs multiply float32 matrices in TF32.
        reset_state_from_step: when this many steps are done, the tables' optimizer starts its state anew.
        device_type: of the model, "cpu" or "cuda".
    """

    accumulate_steps: int = 1
    precision: torch.dtype = torch.float32
    tf32: bool = False
    reset_state_from_step: int | None = None
    device_type: str = "cpu"

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the context of a forward pass."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, self.precision)

    def products(self) -> AbstractContextManager[object]:
        """Returns the context of forward and backward."""
        return _products_in_tf32() if self.tf32 else nullcontext()


DEFAULT_OPTIONS = StepOptions()
"""One batch a step, in float32."""


def step_options(
    section: TrainConfig, device: torch.device, *, reset_state_from_step: int | None = None
) -> StepOptions:
    """Returns the options that a configuration gives.

    Raises:
        UserError: the device cannot do what is asked.
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
    """Returns whether a device has instructions that multiply in bfloat16; a processor without them is slower with it.

    GPUs that have none are refused by `step_options`.
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
        UserError: the batches of this model cannot be divided.
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

    Collective: every rank, with equally many micro-batches; a batch may be empty.

    Args:
        model: takes the batch.
        optimizer: of the tables, at the rates of its parameter groups.
        batch: this rank's, or the first of its micro-batches.
        dense: the optimizer of the other parameters, which are updated where the tables are; None without any.
        dense_factor: factor of its learning rate.
        meanwhile: called once the device has work, which on a GPU is long before it is done: forward and backward, or
            the whole step.
        further: the other micro-batches. Each is asked for when the device has the one before it to work on.
        options: how the step is computed.

    Raises:
        NonFiniteError: the loss or a gradient is not finite on any rank; see `SparseOptimizer`.
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
    # Several ranks wait for each other's sizes meanwhile: the device then has the update to do. One rank waits for
    # nothing, and has what it prepared known to the host by the wait for the step before.
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
    """Returns the objective of a batch from those of its micro-batches, of which there is at least one."""
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
