"""Prepares the batches of the next steps while a GPU works on the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from embedtrain.distributed.stages import stage
from embedtrain.embedding.table_group import TableGroup
from embedtrain.train.calendar import Calendar
from embedtrain.train.step import micro_batches
from embedtrain.train.task import Batches, StreamedBatches, Task


@runtime_checkable
class PreparesBatches(Protocol):
    """A model that can do part of a step before the previous step has ended."""

    def prepare(self, batch: Any) -> Any:
        """Returns an input for the model in place of the batch: on its device, without reading any row.

        Collective: every rank, in the order of the steps.
        """

    def bring_rows(self, prepared: Any) -> None:
        """Copies the step's rows from host memory to the device, for tables that lie in host memory."""


@dataclass(frozen=True)
class Prepared:
    """Holds the input of a step.

    Attributes:
        batch: the model's input: this rank's batch, or its first micro-batch.
        num_examples: number of examples of this rank's batch, over all micro-batches.
        further: the other micro-batches, each prepared when it is requested.
    """

    batch: Any
    num_examples: int
    further: Iterable[Any] = ()


class BatchesAhead:
    """Prepares the batches of a task ahead of their steps, on a GPU or if rows lie in host memory.

    Elsewhere it would save no time, and each batch is prepared when its step begins.

    On a GPU, preparation uses its own CUDA stream, so that waiting for it does not wait for the current step. It runs
    two steps ahead. Then one wait of the host covers both the preparation of a batch and the numbers that the step
    before it needs.

    Args:
        task: the model, its tables and its batches, which must not be a stream.
        accumulate_steps: micro-batches per step. The first is prepared during the previous step, each other one during
            the micro-batch before it.

    Attributes:
        depth: number of steps that are prepared ahead.
    """

    def __init__(self, task: Task, accumulate_steps: int = 1) -> None:
        assert not isinstance(task.batches, StreamedBatches)
        self._batches: Batches = task.batches
        self._calendar = Calendar(task.batches)
        self._optimizer = task.optimizer
        tables = task.tables
        is_on_gpu = tables.device.type == "cuda"
        pays = is_on_gpu or any(group.access.is_on_host for group in tables.table_groups)
        self._model = task.model if pays and isinstance(task.model, PreparesBatches) else None
        self._stream = torch.cuda.Stream(tables.device) if is_on_gpu else None
        self.depth = 2 if is_on_gpu else 1
        self._prepared: dict[tuple[int, int], Prepared] = {}
        self._accumulate_steps = accumulate_steps

    def take(self, epoch: int, step: int) -> Prepared:
        """Returns the input of a step; prepares it now if that was not done ahead. Collective: every rank."""
        prepared = self._prepared.pop((epoch, step), None)
        if prepared is not None:
            return prepared
        self._prepared = {}
        return self._prepare(epoch, step)

    def prepare_next(
        self,
        epoch: int,
        step: int,
        num_left: int | None = None,
        context: Callable[[int], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Prepares the next steps while the device works on the current one. Collective: every rank.

        Args:
            epoch: epoch of the first step to prepare.
            step: index of this step in the epoch.
            num_left: number of steps from this one to the end of the run; None for at least `depth`.
            context: returns the context manager in which a step is prepared, given its index in the run.
        """
        if self._model is None or num_left == 0:
            return
        number = self._calendar.first_step_of(epoch) + step
        depth = self.depth if num_left is None else min(self.depth, num_left)
        for later in range(number, number + depth):
            place = self._calendar.place_of(later)
            if place not in self._prepared:
                with context(later):
                    self._prepared[place] = self._prepare(*place)
        self._model.bring_rows(self._prepared[epoch, step].batch)

    def _prepare(self, epoch: int, step: int) -> Prepared:
        with stage("sample"), self._apart():
            batch = self._batches.batch(epoch, step)
            first, *others = micro_batches(batch, self._accumulate_steps)
        return Prepared(self._ready(first), batch.num_examples, map(self._ready_with_rows, others))

    def _ready(self, batch: Any) -> Any:
        """Returns the model's input for a batch."""
        if self._model is None:
            return batch
        with stage("prepare"):
            return self._on_stream(self._model, batch)

    def _ready_with_rows(self, batch: Any) -> Any:
        ready = self._ready(batch)
        if self._model is not None:
            self._model.bring_rows(ready)
        return ready

    def _apart(self) -> AbstractContextManager[object]:
        """Returns the context manager of the preparation stream; batches may be created on the device too."""
        if self._stream is None or self._model is None:
            return nullcontext()
        return torch.cuda.stream(self._stream)

    def _on_stream(self, model: PreparesBatches, batch: Any) -> Any:
        if self._stream is None:
            return model.prepare(batch)
        main = torch.cuda.current_stream(self._stream.device)
        if self._optimizer.decided is not None:
            # Then a wait for this stream is also a wait for the verdict of the last step.
            self._stream.wait_event(self._optimizer.decided)
        with self._apart():
            prepared = model.prepare(batch)
        main.wait_stream(self._stream)
        for tensor in tensors_of(prepared):
            if tensor.is_cuda:
                # Otherwise the allocator could reuse the memory on the preparation stream before the step has read it.
                tensor.record_stream(main)
        return prepared


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in mappings, sequences, dataclasses and objects of this package, except in table groups."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, TableGroup):
        return
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from tensors_of(part)
    elif is_dataclass(value):
        for each in fields(value):
            yield from tensors_of(getattr(value, each.name))
    elif type(value).__module__.startswith("embedtrain."):
        names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
        yield from tensors_of([getattr(value, name) for name in names])
