"""Rows that live in the host's memory, with the hot ones on the device: for tables larger than a GPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from embedtrain.embedding.row_changes import RowChanges
from embedtrain.ops._backend.transfer import to_device
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.optim.stores import RowsToUpdate

WEIGHT = "weight"


@dataclass
class TouchedRows:
    """Copies of some rows and their state on the device, compact, for an optimizer to update.

    Attributes:
        rows: [n] int64, ascending; the local rows.
        weight: [n, dim].
        state: name -> [n] or [n, dim] float32.
        keys_of: local rows and step -> keys for stochastic rounding; see `TableGroup.rounding_keys`.
    """

    rows: Tensor
    weight: Tensor
    state: dict[str, Tensor]
    keys_of: Callable[[Tensor, int], Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weight and the states by name."""
        return {WEIGHT: self.weight, **self.state}

    def rounding_keys(self, gradient: RowGradient, step: int) -> Tensor | None:
        """Returns the keys of the rows at the gradient's places; None for float32 rows."""
        return self.keys_of(self.rows[gradient.rows], step) if self.weight.dtype == torch.bfloat16 else None


class RowAccess(Protocol):
    """How a step reads and updates the rows of a group of tables, wherever they live.

    Attributes:
        is_on_host: whether the rows live in host memory, though the device computes on them.
    """

    is_on_host: bool

    def look_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights on the device that hold the local rows [n], and the rows' places in them; rows may repeat."""

    def bring_ahead(self, rows: Tensor) -> None:
        """Copies rows that the next step reads to the device, if they are not there anyway; rows may repeat."""

    def open(self, gradient: RowGradient) -> tuple[RowsToUpdate, RowGradient]:
        """Returns what holds the gradient's rows for an update, and the gradient by their places in it.

        `close` follows the update.
        """

    def close(self) -> None:
        """Ends an update of rows that were opened."""

    def write_back(self) -> None:
        """Brings the rows where they live up to date with the device's copies, which it lets go of."""


class RowsOnDevice:
    """Rows that live where they are computed on: nothing is copied.

    Args:
        changes: the tensors, the optimizer's states as they are added, and who wants to know of changes.
        state: name -> [num_rows] or [num_rows, dim] float32; the same as in `changes`, without the weight.
        keys_of: see `TouchedRows`.
    """

    is_on_host = False

    def __init__(self, changes: RowChanges, state: dict[str, Tensor], keys_of: Callable[[Tensor, int], Tensor]) -> None:
        self.weight, self.state = changes.tensors[WEIGHT], state
        self._changes, self._keys_of = changes, keys_of

    def rounding_keys(self, gradient: RowGradient, step: int) -> Tensor | None:
        """Returns the keys of the gradient's rows; None for float32 rows."""
        return self._keys_of(gradient.rows, step) if self.weight.dtype == torch.bfloat16 else None

    def look_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowAccess`."""
        return self.weight, rows

    def bring_ahead(self, rows: Tensor) -> None:
        """Does nothing."""

    def open(self, gradient: RowGradient) -> tuple[RowsToUpdate, RowGradient]:
        """See `RowAccess`."""
        if self._changes.is_watched:
            self._changes.before_update(gradient.rows)
        return self, gradient

    def close(self) -> None:
        """Does nothing."""

    def write_back(self) -> None:
        """Does nothing."""


class RowCache:
    """Reads and writes of rows in host memory, by way of a cache of hot rows on the device.

    While there is a cache, it holds the truth of its rows, and the host's copies are old: `write_back` brings them up
    to date. Rows brought ahead of their step are kept up to date with the updates in between.

    Args:
        changes: the tensors in host memory, the optimizer's states as they are added, and who wants to know of changes.
        device: where rows are computed on.
        hot_rows: returns the local rows to keep on the device, ascending, given the bytes of a row with its state.
        keys_of: see `TouchedRows`.
    """

    is_on_host = True

    def __init__(
        self,
        changes: RowChanges,
        device: torch.device,
        hot_rows: Callable[[int], Tensor],
        keys_of: Callable[[Tensor, int], Tensor],
    ) -> None:
        self._changes = changes
        self._device = device
        self._choose_hot_rows = hot_rows
        self._keys_of = keys_of
        self._hot = torch.zeros(0, dtype=torch.int64)
        self._cache: dict[str, Tensor] | None = None
        self._is_dirty = torch.zeros(0, dtype=torch.bool)
        self._copies: list[TouchedRows] = []  # of this step's rows and the next one's
        self._open: TouchedRows | None = None

    def look_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights on the device that hold the local rows [n], and the rows' places in them."""
        for copies in self._copies:
            if _all_in(rows, copies.rows):
                break
        else:
            copies = self._keep(self._fetch(torch.unique(rows)))
        return copies.weight, torch.searchsorted(copies.rows, rows)

    def bring_ahead(self, rows: Tensor) -> None:
        """Copies rows that the next step reads to the device; rows may repeat."""
        self._keep(self._fetch(torch.unique(rows)))

    def open(self, gradient: RowGradient) -> tuple[RowsToUpdate, RowGradient]:
        """Returns copies of the gradient's rows, which are ascending and unique, and the gradient by their places."""
        rows = gradient.rows
        there = [copies for copies in self._copies if torch.equal(copies.rows, rows)]
        self._open = there[0] if there else self._fetch(rows)
        places = torch.arange(rows.numel(), device=rows.device)
        return self._open, RowGradient.of_rows(places, gradient.values, rows.numel())

    def close(self) -> None:
        """Writes the rows that were opened to where they live."""
        opened, self._open = self._open, None
        assert opened is not None
        self._put(opened.rows, opened.tensors)
        for copies in self._copies:
            if copies is not opened:
                _overwrite(copies, opened)

    def write_back(self) -> None:
        """Brings the rows in host memory up to date, and lets go of all copies: others may read and write them."""
        cache, self._cache, self._copies = self._cache, None, []
        if cache is None:
            return
        dirty = self._is_dirty.nonzero().squeeze(1)
        rows = self._hot[dirty].cpu()
        self._changes.before_update(rows)
        for name, values in cache.items():
            self._changes.tensors[name][rows] = values[dirty].cpu()

    def _keep(self, copies: TouchedRows) -> TouchedRows:
        self._copies = [*self._copies[-1:], copies]
        return copies

    def _fetch(self, rows: Tensor) -> TouchedRows:
        cache = self._filled_cache()
        place, is_hot = _find(rows, self._hot)
        cold = (~is_hot).nonzero().squeeze(1)
        cold_rows = rows[cold].cpu()
        fetched = {}
        for name, host in self._changes.tensors.items():
            values = torch.empty((rows.numel(), *host.shape[1:]), dtype=host.dtype, device=self._device)
            values[is_hot] = cache[name][place[is_hot]]
            values[cold] = to_device(_rows_of(host, cold_rows), self._device)
            fetched[name] = values
        return TouchedRows(rows, fetched.pop(WEIGHT), fetched, self._keys_of)

    def _put(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        cache = self._filled_cache()
        place, is_hot = _find(rows, self._hot)
        hot, cold = is_hot.nonzero().squeeze(1), (~is_hot).nonzero().squeeze(1)
        cold_rows = rows[cold].cpu()
        self._changes.before_update(cold_rows)
        self._is_dirty[place[hot]] = True
        for name, new in values.items():
            cache[name][place[hot]] = new[hot]
            self._changes.tensors[name][cold_rows] = new[cold].cpu()

    def _filled_cache(self) -> dict[str, Tensor]:
        tensors = self._changes.tensors
        if self._cache is not None and self._cache.keys() != tensors.keys():
            self.write_back()  # an optimizer was made in between
        if self._cache is None:
            row_bytes = sum(host[:1].nbytes for host in tensors.values())
            hot = self._choose_hot_rows(row_bytes)
            self._cache = {name: to_device(_rows_of(host, hot), self._device) for name, host in tensors.items()}
            self._hot = hot.to(self._device)
            self._is_dirty = torch.zeros(hot.numel(), dtype=torch.bool, device=self._device)
        return self._cache


def _find(rows: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where each of the rows lies among ascending ones, and whether it does."""
    if among.numel() == 0:
        return torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
    place = torch.searchsorted(among, rows).clamp_(max=among.numel() - 1)
    return place, among[place] == rows


def _all_in(rows: Tensor, among: Tensor) -> bool:
    return bool(_find(rows, among)[1].all())


def _overwrite(older: TouchedRows, newer: TouchedRows) -> None:
    """Takes over the values of the rows that both have."""
    place, is_shared = _find(older.rows, newer.rows)
    for name, values in older.tensors.items():
        values[is_shared] = newer.tensors[name][place[is_shared]]


def _rows_of(host: Tensor, rows: Tensor) -> Tensor:
    return gather_rows(host, rows) if host.dim() == 2 else host[rows]
