"""Reading any rows of a checkpoint that any number of ranks saved; every byte read is checked."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from embedtrain import storage
from embedtrain.checkpoint.chain import read_chain
from embedtrain.checkpoint.header import as_bytes
from embedtrain.checkpoint.layer import Layer, rows_staged
from embedtrain.checkpoint.manifest import TensorInfo
from embedtrain.errors import CheckpointError, CorruptCheckpointError

CONVERTIBLE = {torch.bfloat16, torch.float32}
"""A tensor of one of these dtypes can be read into a tensor of the other."""


class CheckpointReader:
    """Reads rows of a complete checkpoint. Not a collective: each rank reads on its own.

    A delta is read together with the checkpoints that it changes. Rows are read on demand, and every byte is
    checked against its block's checksum before it is returned. Close the reader, or use it as a context manager.

    Attributes:
        path: folder of the checkpoint, any fsspec URL.
        manifest: the checkpoint's manifest; the manifest of a delta lists all tensors but only the changed rows.

    Raises:
        CheckpointError: there is no complete checkpoint, or a newer embedtrain wrote it.
        CorruptCheckpointError: also raised by the methods; names the file, the tensors and their rows.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._layers = [Layer(link, manifest) for link, manifest in read_chain(path)]
        self.manifest = self._layers[-1].manifest

    @property
    def step(self) -> int:
        """Returns the number of optimizer steps done."""
        return self.manifest.step

    @property
    def state(self) -> Mapping[str, Any]:
        """Returns the JSON that was saved with the tensors."""
        return self.manifest.state

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Returns the descriptions of the sharded tensors, by name."""
        return self.manifest.tensors

    def table(self, name: str) -> TensorInfo:
        """Returns the description of a table's weight, the tensor "name/weight" of shape [num_rows, dim].

        Raises:
            CheckpointError: the table does not exist, has no rows, or is not two-dimensional.
        """
        info = self._info(f"{name}/weight")
        if len(info.shape) != 2 or info.shape[0] == 0:
            raise CheckpointError(f"{self.path}: table {name!r} must have the shape [rows, dim], got {info.shape}")
        return info

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows `[start, stop)` of a tensor, on the CPU."""
        info = self._info(name)
        rows = torch.empty((max(0, stop - start), *info.shape[1:]), dtype=info.dtype)
        self.read_into(name, start, rows)
        return rows

    def read_into(self, name: str, start: int, destination: Tensor) -> None:
        """Fills `destination` with rows of a tensor, beginning at row `start`; buffers tens of MiB.

        Args:
            name: the tensor.
            start: first row to read.
            destination: [rows, *shape[1:]] on any device, of the tensor's dtype. Values are also converted between
                bfloat16 and float32, rounding to nearest.

        Raises:
            ValueError: a row is out of range, or `destination` has another shape or dtype.
        """
        info = self._info(name)
        if not _fits(destination, info):
            raise ValueError(
                f"rows of {name} ({info.dtype} {info.shape}) do not fit into a tensor of "
                f"{destination.dtype} {tuple(destination.shape)}"
            )
        if not 0 <= start <= start + len(destination) <= info.shape[0]:
            raise ValueError(f"{name} has rows [0, {info.shape[0]}), got [{start}, {start + len(destination)})")
        for layer in self._layers:
            layer.lay_over(name, start, destination.detach())

    def gather(self, name: str, slots: Tensor) -> Tensor:
        """Returns rows of a tensor in any order, read from a memory map of its files.

        If the checkpoint is remote, each file needed is downloaded once per reader to a temporary folder, which
        `close` removes.

        Args:
            name: the tensor.
            slots: [n] int64; rows of the tensor in any order, duplicates allowed.

        Returns:
            [n, *shape[1:]] on the CPU.

        Raises:
            ValueError: `slots` is not [n] int64, or a row is out of range.
        """
        info = self._info(name)
        if slots.dtype != torch.int64 or slots.dim() != 1:
            raise ValueError(f"slots must be [n] int64, got {slots.dtype} {tuple(slots.shape)}")
        if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < info.shape[0]:
            raise ValueError(
                f"{name} has rows [0, {info.shape[0]}), got slots from {int(slots.min())} to {int(slots.max())}"
            )
        gathered = torch.empty((len(slots), *info.shape[1:]), dtype=info.dtype)
        if gathered.numel():
            rows = np.frombuffer(as_bytes(gathered), dtype=np.uint8).reshape(len(slots), info.row_bytes)
            step = rows_staged(info)
            for first in range(0, len(slots), step):
                part = slots[first : first + step].cpu().numpy()
                for layer in self._layers:
                    layer.lay_over_gathered(name, part, rows[first : first + step])
        return gathered

    def replicated(self) -> dict[str, Tensor]:
        """Returns the tensors that all ranks share, by name, on the CPU."""
        name = self.manifest.replicated
        if name is None:
            return {}
        data = self._layers[-1].read_file(name)
        try:
            return safetensors.torch.load(data)
        except SafetensorError as error:
            url = storage.join(self.path, name)
            raise CorruptCheckpointError(f"{url} is not a safetensors file: {error}") from error

    def close(self) -> None:
        """Closes the files, releases the memory maps and removes temporary copies of remote files."""
        for layer in self._layers:
            layer.close()

    def __enter__(self) -> CheckpointReader:
        """Returns the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the reader."""
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; it has {sorted(self.manifest.tensors)}")
        return self.manifest.tensors[name]


def _fits(destination: Tensor, info: TensorInfo) -> bool:
    is_converted = {destination.dtype, info.dtype} == CONVERTIBLE
    return tuple(destination.shape[1:]) == info.shape[1:] and (is_converted or destination.dtype == info.dtype)


def verify(path: str, known: set[str] | None = None) -> None:
    """Checks every byte of a checkpoint and, if it is a delta, of the checkpoints that it changes.

    Args:
        path: folder of the checkpoint.
        known: folders of checkpoints known to be undamaged, which are skipped; folders found undamaged are added.

    Raises:
        CorruptCheckpointError: lists the first fault of each damaged file with its tensors and rows.
    """
    known = set() if known is None else known
    faults = []
    for link, manifest in read_chain(path):
        if link not in known:
            found = Layer(link, manifest).verify()
            faults += found
            known.update([] if found else [link])
    if faults:
        raise CorruptCheckpointError("\n".join(faults))
