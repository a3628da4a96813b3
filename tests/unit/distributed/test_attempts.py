"""Ranks that are started again on the store of a failed attempt."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from embedtrain.distributed.runtime import agree_on_attempt


def attempt(store: dist.Store, world_size: int) -> set[str]:
    with ThreadPoolExecutor(world_size) as pool:
        return set(pool.map(lambda rank: agree_on_attempt(store, rank, world_size, 30.0), range(world_size)))


def test_attempts_share_a_word_of_their_own_whatever_their_size() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    words = [attempt(store, world_size) for world_size in (1, 2, 2, 3, 1, 4)]
    assert [len(each) for each in words] == [1] * 6
    assert len(set().union(*words)) == 6


def test_a_rank_that_died_before_does_not_answer_for_its_successor() -> None:
    store = dist.HashStore()
    attempt(store, 3)
    with pytest.raises(TimeoutError, match=r"these of 3 ranks did not join in 0\.2 s: \[1, 2\]"):
        agree_on_attempt(store, 0, 3, 0.2)
