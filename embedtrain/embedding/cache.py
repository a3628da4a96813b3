"""Access to rows in host memory through a cache of hot rows on the device, for tables larger than a GPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from embedtrain.embedding.copy_stream import CopyStream
from embedtrain.embedding.row_changes import RowChanges
from embedtrain.ops._backend.transfer import HostCopy, to_device
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.optim.stores import RowsToUpdate

WEIGHT = "weight"
_CHUNK_BYTES = 16 << 20
"""Size of the rows that one copy writes to host memory."""


@dataclass
class TouchedRows:
    """Holds copies of some rows and their state on the device, which an optimizer updates.

    Attributes:
        rows: [n] int64, ascending; the local rows.
        weight: [n, dim].
        state: optimizer state by name, [n] or [n, dim] float32.
        keys_of: returns keys for stochastic rounding for local rows and a step; see `TableGroup.rounding_keys`.
    """

    rows: Tensor
    weight: Tensor
    state: dict[str, Tensor]
    keys_of: Callable[[Tensor, int], Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights and states by name."""
        return {WEIGHT: self.weight, **self.state}

    def rounding_keys(self, gradient: RowGradient, step: int) -> Tensor | None:
        """Returns a key for stochastic rounding per row of the gradient; None for float32 rows."""
        return self.keys_of(self.rows[gradient.rows], step) if self.weight.dtype == torch.bfloat16 else None


class RowAccess(Protocol):
    """Reads and updates the rows of a table group, on the device or in host memory.

    Attributes:
        is_on_host: whether the rows are stored in host memory and copied to the device for each step.
    """

    is_on_host: bool

    def look_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights on the device that contain the local rows [n], and the index of each row in them.

        Rows may repeat.
        """

    def bring_ahead(
        self, rows: Tensor, on_host: HostCopy, parts: Sequence[Tensor], distinct: Tensor | None = None
    ) -> None:
        """Copies rows that a coming step reads and updates to the device; no-op if rows are stored on the device.

        Args:
            rows: [n] int64; may repeat. A gradient with exactly these rows reuses the copies.
            on_host: `rows` in a copy to the host.
            parts: the arguments of the coming calls of `look_up`; concatenated they are `rows`.
            distinct: the distinct rows, ascending, if `look_up` may get them instead.
        """

    def open(self, gradient: RowGradient) -> tuple[RowsToUpdate, RowGradient]:
        """Returns the rows to update, and the gradient with row numbers that index them; `close` ends the update."""

    def close(self) -> None:
        """Ends the update that `open` began."""

    def join_copies(self) -> None:
        """Makes the device's current stream wait for copies of rows to the host.

        A later sync with the stream then guarantees that these copies have finished.
        """

    def write_back(self) -> None:
        """Writes changed rows from the device's cache to host memory, so that other code can read them."""

    def let_go(self) -> None:
        """Calls `write_back` and drops all copies on the device, so that other code may write to the rows."""


class RowsOnDevice:
    """Accesses rows that are stored on the device, without copies.

    Args:
        changes: has the tensors, including later states, and gets the updates.
        state: optimizer state by name, [num_rows] or [num_rows, dim] float32; as in `changes`, without the weights.
        keys_of: see `TouchedRows`.
    """

    is_on_host = False

    def __init__(self, changes: RowChanges, state: dict[str, Tensor], keys_of: Callable[[Tensor, int], Tensor]) -> None:
        self.weight, self.state = changes.tensors[WEIGHT], state
        self._changes, self._keys_of = changes, keys_of

    def rounding_keys(self, gradient: RowGradient, step: int) -> Tensor | None:
        """Returns a key for stochastic rounding per row of the gradient; None for float32 rows."""
        return self._keys_of(gradient.rows, step) if self.weight.dtype == torch.bfloat16 else None

    def look_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowAccess`."""
        return self.weight, rows

    def bring_ahead(
        self, rows: Tensor, on_host: HostCopy, parts: Sequence[Tensor], distinct: Tensor | None = None
    ) -> None:
        """Does nothing."""

    def open(self, gradient: RowGradient) -> tuple[RowsToUpdate, RowGradient]:
        """See `RowAccess`."""
        if self._changes.is_watched:
            self._changes.before_update(gradient.rows)
        return self, gradient

    def close(self) -> None:
        """Does nothing."""

    def join_copies(self) -> None:
        """Does nothing."""

    def write_back(self) -> None:
        """Does nothing."""

    def let_go(self) -> None:
        """Does nothing."""


class _Split(NamedTuple):
    """Splits rows into hot rows, which are in the cache, and cold rows. The host knows both without a device sync.

    Attributes:
        rows: [n] int64 on the host, ascending; the local rows.
        hot: indices of the hot rows in `rows`, on the device.
        hot_places: indices of the hot rows in the cache, on the host and on the device.
        cold: indices of the cold rows in `rows`, on the device.
        cold_rows: local rows of the cold rows, on the host.
    """

    rows: Tensor
    hot: Tensor
    hot_places: tuple[Tensor, Tensor]
    cold: Tensor
    cold_rows: Tensor


@dataclass
class _Copies:
    """Holds copies of rows, and the requests that they serve.

    Attributes:
        touched: the copies.
        split: the hot and the cold rows.
        asked: per expected argument of `look_up`, the argument and the indices of its rows in the copies.
        homes: tensors of rows by which a gradient is matched with these copies.
    """

    touched: TouchedRows
    split: _Split
    asked: list[tuple[Tensor, Tensor]]
    homes: list[Tensor]


class _Put(NamedTuple):
    """Holds updated rows that are being copied to host memory, where rows are out of date until the copy ends.

    Attributes:
        copies: the updated rows.
        values: values of the cold rows by name.
    """

    copies: _Copies
    values: dict[str, HostCopy]


class RowCache:
    """Accesses rows in host memory through a cache of hot rows on the device.

    The cache has the current values of its rows, and host memory has old values until `write_back`. Prefetched rows get
    the updates of the steps in between.

    The host decides which rows are hot. Cold rows are copied on a stream of their own. The next step's rows may be
    fetched before the updates of this step have reached host memory: rows that both steps use are then taken from the
    copies on the device.

    Args:
        changes: has the tensors in host memory, including later states, and gets the updates.
        device: the device that computes.
        hot_rows: returns the local rows to cache, ascending, for a number of bytes per row with its state.
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
        self._stream = CopyStream(device)
        self._choose_hot_rows = hot_rows
        self._keys_of = keys_of
        self._hot = torch.zeros(0, dtype=torch.int64)
        self._cache: dict[str, Tensor] | None = None
        self._is_dirty = torch.zeros(0, dtype=torch.bool)
        self._num_overwritten = changes.num_overwritten
        self._copies: list[_Copies] = []  # the rows of this step and of the next step
        self._puts: list[_Put] = []
        self._open: _Copies | None = None

    def look_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights on the device that contain the local rows [n], and the index of each row in them."""
        self._check_overwritten()
        for copies in self._copies:
            for asked, places in copies.asked:
                if asked is rows:
                    return copies.touched.weight, places
        copies = self._bring(rows, HostCopy(rows), [rows])
        return copies.touched.weight, copies.asked[0][1]

    def bring_ahead(
        self, rows: Tensor, on_host: HostCopy, parts: Sequence[Tensor], distinct: Tensor | None = None
    ) -> None:
        """Copies rows of a coming step to the device; see `RowAccess`."""
        self._check_overwritten()
        copies = self._bring(rows, on_host, parts)
        if distinct is not None:
            copies.asked.append((distinct, torch.arange(distinct.numel(), device=self._device)))
            copies.homes.append(distinct)

    def open(self, gradient: RowGradient) -> tuple[RowsToUpdate, RowGradient]:
        """Returns copies of the gradient's rows, which are ascending and unique, and the gradient indexed by copies."""
        self._check_overwritten()
        self._open = self._copies_of(gradient)
        places = torch.arange(gradient.rows.numel(), device=gradient.rows.device)
        return self._open.touched, RowGradient.of_rows(places, gradient.values, places.numel())

    def close(self) -> None:
        """Writes the updated rows to the cache, and starts to write cold rows to host memory."""
        opened, self._open = self._open, None
        assert opened is not None and self._cache is not None
        split = opened.split
        self._is_dirty[split.hot_places[0]] = True
        values: dict[str, HostCopy] = {}
        for name, new in opened.touched.tensors.items():
            if split.hot.numel():
                self._cache[name].index_copy_(0, split.hot_places[1], new.index_select(0, split.hot))
            if split.cold.numel():
                values[name] = self._stream.to_host(new.index_select(0, split.cold))
        for copies in self._copies:
            if copies is not opened:
                self._overwrite(copies, opened)
        self._puts.append(_Put(opened, values))
        if self._device.type == "cpu":
            self._settle_puts()

    def join_copies(self) -> None:
        """See `RowAccess`."""
        self._stream.join()

    def write_back(self) -> None:
        """Writes changed rows of the cache to host memory, in chunks, and keeps the cache."""
        self._settle_puts()
        if self._cache is None:
            return
        dirty = self._is_dirty.nonzero().squeeze(1)
        self._is_dirty.fill_(False)
        rows = self._hot[dirty]
        self._changes.before_update(rows)
        for name, cached in self._cache.items():
            host = self._changes.tensors[name]
            chunk_rows = max(1, _CHUNK_BYTES // max(1, host[:1].nbytes))
            self._write(host, cached, list(zip(rows.split(chunk_rows), dirty.split(chunk_rows), strict=True)))

    def let_go(self) -> None:
        """Calls `write_back` and drops the cache and all copies."""
        self.write_back()
        self._cache, self._copies = None, []

    def _write(self, host: Tensor, cached: Tensor, chunks: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copies rows of the cache to host memory; a chunk is copied while the previous chunk is written."""
        under_way: list[tuple[Tensor, HostCopy]] = []
        for rows, places in chunks:
            values = cached.index_select(0, to_device(places, self._device))
            under_way.append((rows, self._stream.to_host(values)))
            if len(under_way) > 1:
                written, copy = under_way.pop(0)
                host[written] = copy.values()
        for written, copy in under_way:
            host[written] = copy.values()

    def _check_overwritten(self) -> None:
        """Drops cache and copies if other code has overwritten the rows, which requires an earlier `write_back`."""
        if self._num_overwritten != self._changes.num_overwritten:
            self._num_overwritten = self._changes.num_overwritten
            assert not self._is_dirty.any() and not self._puts, "rows were written to before the cache was written back"
            self._cache, self._copies = None, []

    def _bring(self, rows: Tensor, on_host: HostCopy, parts: Sequence[Tensor]) -> _Copies:
        self._settle_puts(but=1)  # before `on_host` is waited for, because these copies are older
        host = on_host.values()
        distinct = torch.unique(host)
        places = torch.searchsorted(distinct, host).split([part.numel() for part in parts])
        asked = [(part, to_device(place, self._device)) for part, place in zip(parts, places, strict=True)]
        copies = self._fetch(distinct, asked, [rows])
        self._copies = [*self._copies[-1:], copies]
        return copies

    def _copies_of(self, gradient: RowGradient) -> _Copies:
        for copies in self._copies:
            if any(each is gradient.rows_of_values for each in copies.homes):
                return copies
        rows = HostCopy(gradient.rows).values()
        there = [copies for copies in self._copies if torch.equal(copies.split.rows, rows)]
        return there[0] if there else self._fetch(rows, [], [])

    def _fetch(self, rows: Tensor, asked: list[tuple[Tensor, Tensor]], homes: list[Tensor]) -> _Copies:
        cache = self._filled_cache()
        split = self._split(rows)
        fetched: dict[str, Tensor] = {}
        for name, host in self._changes.tensors.items():
            values = torch.empty((rows.numel(), *host.shape[1:]), dtype=host.dtype, device=self._device)
            if split.hot.numel():
                values.index_copy_(0, split.hot, cache[name].index_select(0, split.hot_places[1]))
            if split.cold.numel():
                values.index_copy_(0, split.cold, self._stream.gather(host, split.cold_rows))
            fetched[name] = values
        touched = TouchedRows(to_device(rows, self._device), fetched.pop(WEIGHT), fetched, self._keys_of)
        copies = _Copies(touched, split, asked, homes)
        for put in self._puts:
            self._overwrite(copies, put.copies)
        return copies

    def _split(self, rows: Tensor) -> _Split:
        place, is_hot = _find(rows, self._hot)
        hot, cold = is_hot.nonzero().squeeze(1), (~is_hot).nonzero().squeeze(1)
        hot_places = place[hot]
        on_device = [to_device(each, self._device) for each in (hot, hot_places, cold)]
        return _Split(rows, on_device[0], (hot_places, on_device[1]), on_device[2], rows[cold])

    def _overwrite(self, older: _Copies, newer: _Copies) -> None:
        """Copies the values of shared rows from `newer` to `older`."""
        place, is_shared = _find(older.split.rows, newer.split.rows)
        shared = is_shared.nonzero().squeeze(1)
        if not shared.numel():
            return
        target, source = to_device(shared, self._device), to_device(place[shared], self._device)
        for name, values in older.touched.tensors.items():
            values.index_copy_(0, target, newer.touched.tensors[name].index_select(0, source))

    def _settle_puts(self, *, but: int = 0) -> None:
        """Writes updated rows to host memory, except the latest `but` updates."""
        while len(self._puts) > but:
            put = self._puts.pop(0)
            rows = put.copies.split.cold_rows
            if put.values:
                self._changes.before_update(rows)
            for name, values in put.values.items():
                self._changes.tensors[name][rows] = values.values()

    def _filled_cache(self) -> dict[str, Tensor]:
        tensors = self._changes.tensors
        if self._cache is not None and self._cache.keys() != tensors.keys():
            self.let_go()  # a new optimizer has added states, which the cache must hold too
        if self._cache is None:
            row_bytes = sum(host[:1].nbytes for host in tensors.values())
            self._hot = self._choose_hot_rows(row_bytes)
            self._cache = {name: self._stream.gather_chunks(host, self._hot) for name, host in tensors.items()}
            self._is_dirty = torch.zeros(self._hot.numel(), dtype=torch.bool)
        return self._cache


def _find(rows: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the index of each row in the ascending rows `among`, and whether it occurs there."""
    if among.numel() == 0:
        return torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
    place = torch.searchsorted(among, rows).clamp_(max=among.numel() - 1)
    return place, among[place] == rows
