"""Copies between the host and a device for which neither waits."""

from __future__ import annotations

import time

import torch
from torch import Tensor

_SPIN_SECONDS = 0.001
_NAP_SECONDS = 0.0001


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

    def values(self, timeout_seconds: float | None = None) -> Tensor:
        """Returns the numbers on the host; waits for the device if it has not come that far.

        Args:
            timeout_seconds: how long to wait; None for any time.

        Raises:
            TimeoutError: the device has not come that far in time.
        """
        if self.arrived is not None and timeout_seconds is None:
            self.arrived.synchronize()
        elif self.arrived is not None and timeout_seconds is not None:
            _await(self.arrived, timeout_seconds)
        return self._values

    def item(self) -> float:
        """Returns the number, if it is only one."""
        return self.values().item()


def _await(event: torch.cuda.Event, timeout_seconds: float) -> None:
    """Waits for an event without blocking in the driver, which would not let go while a kernel hangs."""
    began = time.monotonic()
    while not event.query():
        waited = time.monotonic() - began
        if waited > timeout_seconds:
            raise TimeoutError(f"the device did not get on for {timeout_seconds:g} s")
        if waited > _SPIN_SECONDS:
            time.sleep(_NAP_SECONDS)
