"""Copies between the host and a device for which neither waits, and every wait of the host for what ranks exchange.

NCCL's kernels know no time-out: those of a rank whose peer died never end. So the host asks whether the device has come
that far, and gives up after a while.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from embedtrain.errors import DeviceTimeoutError

_SPIN_SECONDS = 0.001
_NAP_SECONDS = 0.0001


class _Patience:
    """How long the host waits for a device; None for any time. A process takes part in one job."""

    seconds: float | None = None


_patience = _Patience()


def wait_at_most(seconds: float | None) -> None:
    """Bounds each later wait of this process for a device; None takes the bound away."""
    _patience.seconds = seconds


def wait_for(event: torch.cuda.Event) -> None:
    """Waits until a device has come to an event.

    Raises:
        DeviceTimeoutError: it did not in the time that `wait_at_most` gave.
    """
    if _patience.seconds is None:
        event.synchronize()
        return
    # Not in the driver, which would not let go while a kernel hangs.
    began = time.monotonic()
    while not event.query():
        waited = time.monotonic() - began
        if waited > _patience.seconds:
            raise DeviceTimeoutError(
                f"another rank did not take part in a collective: the GPU did not get on for {_patience.seconds:g} s"
            )
        if waited > _SPIN_SECONDS:
            time.sleep(_NAP_SECONDS)


def catch_up(device: torch.device) -> None:
    """Waits until the current stream has done what it was given, as `wait_for` does; on the CPU it has.

    What follows may ask the device for numbers in torch's own ways, which would wait for any time.
    """
    if device.type == "cuda":
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        wait_for(event)


def to_host(values: Tensor) -> Tensor:
    """Returns values in the host's memory, once the current stream has computed them; waits as `wait_for` does."""
    catch_up(values.device)
    return values.cpu()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Returns values on a device; the host goes on while they are copied."""
    if values.device == device:
        return values
    # Only what lies in pinned memory is copied without the host.
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


class HostCopy:
    """Numbers of a device on their way to the host, which goes on meanwhile.

    Args:
        values: any shape.

    Attributes:
        arrived: when they are there; None for numbers of the host.
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
        """Returns the numbers on the host; waits for the device if it has not come that far, as `wait_for` does."""
        if self.arrived is not None:
            wait_for(self.arrived)
        return self._values

    def item(self) -> float:
        """Returns the number, if it is only one."""
        return self.values().item()
