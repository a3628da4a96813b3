"""A new kind of table is a new layout and nothing else: one that maps ids by a dictionary trains like any other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import embedtrain as et
from embedtrain.checkpoint import CheckpointReader, load_shards, save_checkpoint
from embedtrain.distributed.ranks import Ranks
from embedtrain.sharding.layout import LAYOUTS, KeyMap, layout_of, read_layout
from embedtrain.testing.threads import run_threads
from tests.distributed import test_sharded_equals_unsharded as promise

KIND = "dictionary"


@dataclass(frozen=True)
class DictionaryLayout:
    """Looks slots up one by one: ids by their remainder of 3, falling."""

    num_rows: int
    world_size: int = 1

    @property
    def _slots(self) -> dict[int, int]:
        rows = sorted(range(self.num_rows), key=lambda row: (row % 3, -row))
        return {row: slot for slot, row in enumerate(rows)}

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": KIND}

    @property
    def rows_per_rank(self) -> int:
        return max(stop - start for start, stop in map(self.shard_range, range(self.world_size)))

    def slot_of(self, ids: Tensor) -> Tensor:
        slots = self._slots
        return torch.tensor([slots[row] for row in ids.flatten().tolist()], dtype=torch.int64).view(ids.shape)

    def id_of(self, slots: Tensor) -> Tensor:
        ids = {slot: row for row, slot in self._slots.items()}
        return torch.tensor([ids[slot] for slot in slots.flatten().tolist()], dtype=torch.int64).view(slots.shape)

    def shard_range(self, rank: int) -> tuple[int, int]:
        chunk = -(-self.num_rows // self.world_size)
        return min(rank * chunk, self.num_rows), min((rank + 1) * chunk, self.num_rows)

    @classmethod
    def key_map(cls, layouts: Sequence[Any], first_rows: Sequence[int], num_local_rows: int) -> KeyMap:
        def key_of(table: int, row: int) -> int:
            layout, slot = layouts[table], layouts[table]._slots[row]
            for owner in range(layout.world_size):
                start, stop = layout.shard_range(owner)
                if start <= slot < stop:
                    return owner * num_local_rows + first_rows[table] + slot - start
            raise AssertionError(f"no rank owns slot {slot}")

        def keys_of(numbers: Sequence[int], ids: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
            keys, num_outside = [], []
            for table, own in zip(numbers, ids, strict=True):
                is_row = [0 <= row < layouts[table].num_rows for row in own.tolist()]
                pairs = zip(own.tolist(), is_row, strict=True)
                keys += [key_of(table, row) if is_inside else 0 for row, is_inside in pairs]
                num_outside.append(is_row.count(False))
            return torch.tensor(keys, dtype=torch.int64), num_outside

        return keys_of


@pytest.fixture(autouse=True)
def _layout() -> Iterator[None]:
    with mock.patch.dict(LAYOUTS, {KIND: DictionaryLayout}):
        yield


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table of the promise but the large one is of the other kind."""
    tables = [table if table.name == "url" else replace(table, layout=KIND) for table in promise.TABLES]
    monkeypatch.setattr(promise, "TABLES", tables)
    monkeypatch.setattr(promise, "with_dtype", lambda dtype: [replace(table, dtype=dtype) for table in promise.TABLES])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_and_accumulators_equal_the_oracle(world_size: int) -> None:
    promise.test_weights_and_accumulators_equal_the_oracle(world_size, "plain")


def rows_of(ranks: Ranks, path: str, seed: int) -> dict[str, Tensor]:
    """Loads what is saved there, or saves if nothing is."""
    tables = et.EmbeddingCollection(promise.TABLES[:2], ranks=ranks, seed=seed)
    if seed == 0:
        save_checkpoint(path, 1, tables.shard_views(), {}, ranks)
    else:
        with CheckpointReader(f"{path}/step-000000001") as reader:
            load_shards(reader, tables.shard_views())
    return {table.name: tables.gather_table(table.name) for table in promise.TABLES[:2]}


def test_a_checkpoint_of_it_loads_on_another_number_of_ranks(tmp_path: Any) -> None:
    saved = run_threads(2, rows_of, str(tmp_path), 0)[0]
    for loaded in run_threads(3, rows_of, str(tmp_path), 5):
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_a_saved_layout_is_read_by_its_name() -> None:
    assert isinstance(read_layout({"kind": KIND}, 7, "item"), DictionaryLayout)
    with pytest.raises(ValueError, match="layout must be one of spread, dictionary, got 'hashed'"):
        layout_of(7, kind="hashed")
