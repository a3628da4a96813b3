"""Copies between the host and a device for which neither waits."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Returns values on a device; the host goes on while they are copied."""
    if values.device == device:
        return values
    # Only what lies in pinned memory is copied without the host.
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


class HostCopy:
    """A number of a device on its way to the host, which goes on meanwhile.

    Args:
        value: of one element.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._arrived: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(value.device))

    def item(self) -> float:
        """Returns the number; waits for the device if it has not come that far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value.item()
