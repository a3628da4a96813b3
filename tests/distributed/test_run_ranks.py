"""run_ranks: results come back in order, and every way to fail is told apart and named."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from embedtrain.distributed.ranks import OneProcess, Ranks
from embedtrain.testing.ranks import RankError, run_ranks


def _sum_of_ranks(ranks: Ranks, offset: int) -> tuple[int, int, int]:
    value = torch.tensor([ranks.rank + offset])
    dist.all_reduce(value)
    return ranks.rank, int(value), torch.get_num_threads()


def _describe_one_process(ranks: Ranks) -> tuple[bool, bool, int]:
    return isinstance(ranks, OneProcess), dist.is_initialized(), os.getpid()


def _add_one_in_place(ranks: Ranks, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.add_(1)


def _environment_variable(ranks: Ranks, name: str) -> str | None:
    return os.environ.get(name)


def _raise_on_rank_1_while_others_wait(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise KeyError("lost on rank 1")
    dist.barrier()


def _raise_everywhere(ranks: Ranks) -> None:
    dist.barrier()
    raise ValueError(f"refused on rank {ranks.rank}")


def _kill_rank_1(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hang_on_rank_0(ranks: Ranks) -> None:
    if ranks.rank == 0:
        time.sleep(60)


def _die_after_returning(ranks: Ranks) -> None:
    multiprocessing.util.Finalize(None, os._exit, args=(7,), exitpriority=1)


def _return_a_lambda(ranks: Ranks) -> object:
    return lambda: None


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_come_back_in_rank_order(world_size: int) -> None:
    total = sum(range(world_size)) + 10 * world_size
    assert run_ranks(world_size, _sum_of_ranks, 10) == [(rank, total, 1) for rank in range(world_size)]


def test_one_rank_is_a_process_without_a_group() -> None:
    [(is_one, is_initialized, process_id)] = run_ranks(1, _describe_one_process)
    assert is_one
    assert not is_initialized
    assert process_id != os.getpid()


def test_tensors_are_copied_to_and_from_the_ranks() -> None:
    tensor = torch.zeros(3)
    for result in run_ranks(2, _add_one_in_place, tensor):
        assert result.tolist() == [1, 1, 1]
        assert not result.is_shared()
    assert tensor.tolist() == [0, 0, 0]


def test_ranks_see_the_environment_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDTRAIN_TEST_VARIABLE", "set")
    assert run_ranks(1, _environment_variable, "EMBEDTRAIN_TEST_VARIABLE") == ["set"]
    monkeypatch.delenv("EMBEDTRAIN_TEST_VARIABLE")
    assert run_ranks(1, _environment_variable, "EMBEDTRAIN_TEST_VARIABLE") == [None]


def test_a_rank_that_raises_fails_the_caller_with_its_own_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 2 raised KeyError: 'lost on rank 1'") as caught:
        run_ranks(2, _raise_on_rank_1_while_others_wait)
    assert time.monotonic() - start < 30
    assert caught.value.rank == 1
    assert caught.value.errors == {1: ("KeyError", "'lost on rank 1'")}
    assert caught.value.unfinished == [0]
    assert 'raise KeyError("lost on rank 1")' in str(caught.value)


def test_the_errors_of_all_ranks_are_collected() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(3, _raise_everywhere)
    assert caught.value.errors == {rank: ("ValueError", f"refused on rank {rank}") for rank in range(3)}
    assert caught.value.unfinished == []


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 died: SIGKILL") as caught:
        run_ranks(2, _kill_rank_1)
    assert caught.value.died == {1: "SIGKILL"}


def test_a_rank_that_dies_after_it_returned_is_named() -> None:
    with pytest.raises(RankError, match="rank 0 of 1 died: exit status 7 after it returned"):
        run_ranks(1, _die_after_returning)


def test_a_rank_that_hangs_is_named_with_the_line_it_hangs_in() -> None:
    run_ranks(1, _describe_one_process)  # The fork server is up: what follows need not wait for its imports.
    with pytest.raises(RankError, match=r"(?s)no end after 4 s.*rank 0 of 2 did not finish") as caught:
        run_ranks(2, _hang_on_rank_0, timeout_seconds=4)
    assert caught.value.unfinished == [0]
    assert "_hang_on_rank_0" in str(caught.value)


def test_a_result_that_cannot_be_pickled_is_the_error_of_its_rank() -> None:
    with pytest.raises(RankError, match=r"rank 0 of 1 raised .*lambda"):
        run_ranks(1, _return_a_lambda)


def test_a_function_that_ranks_cannot_import_is_refused_at_once() -> None:
    with pytest.raises((AttributeError, TypeError), match="local object"):
        run_ranks(1, lambda group: None)
