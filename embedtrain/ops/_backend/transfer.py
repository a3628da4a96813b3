"""Asynchronous copies between host and device, and waits of the host for a device with a timeout.

NCCL kernels have no timeout: if a peer dies, the kernel of a collective never ends. So the host polls the device and
gives up after a time limit.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from embedtrain.errors import DeviceTimeoutError

_SPIN_SECONDS = 0.001
_NAP_SECONDS = 0.0001


class _Patience:
    """Holds the time limit of waits for a device; None for no limit. Global, because a process is part of one job."""

    seconds: float | None = None


_patience = _Patience()


def wait_at_most(seconds: float | None) -> None:
    """Sets the time limit of all later waits of this process for a device; None removes the limit."""
    _patience.seconds = seconds


def wait_for(event: torch.cuda.Event) -> None:
    """Waits until a device has reached an event.

    Raises:
        DeviceTimeoutError: the device did not reach it within the limit set by `wait_at_most`.
    """
    if _patience.seconds is None:
        event.synchronize()
        return
    # Poll instead of waiting in the driver, which would not return while a kernel hangs.
    began = time.monotonic()
    while not event.query():
        waited = time.monotonic() - began
        if waited > _patience.seconds:
            raise DeviceTimeoutError(
                f"another rank did not take part in a collective: the GPU made no progress for {_patience.seconds:g} s"
            )
        if waited > _SPIN_SECONDS:
            time.sleep(_NAP_SECONDS)


def catch_up(device: torch.device) -> None:
    """Waits until the current stream is idle, with the time limit of `wait_for`; no-op for a CPU.

    Call it before torch functions that wait for the device, because these have no time limit.
    """
    if device.type == "cuda":
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        wait_for(event)


def to_host(values: Tensor) -> Tensor:
    """Copies values to host memory after the current stream has computed them; waits as `wait_for` does."""
    catch_up(values.device)
    return values.cpu()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Returns values on a device; the host does not wait for the copy."""
    if values.device == device:
        return values
    # Only pinned memory can be copied asynchronously.
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


class HostCopy:
    """Copies values from a device to the host asynchronously.

    Args:
        values: the values, of any shape.

    Attributes:
        arrived: the event at the end of the copy; None if the values are in host memory already.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(values.device))

    def values(self) -> Tensor:
        """Returns the values on the host; waits for the copy if necessary, as `wait_for` does."""
        if self.arrived is not None:
            wait_for(self.arrived)
        return self._values

    def item(self) -> float:
        """Returns the value as a Python number, if there is only one."""
        return self.values().item()
