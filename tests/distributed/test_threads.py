"""run_threads: ranks that are threads communicate as processes do, take turns, and never wait for what cannot come."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.errors import UserError
from embedtrain.ops.sort_unique import OrderedKeys
from embedtrain.testing.ranks import run_ranks
from embedtrain.testing.threads import RankGone, outcomes_on_threads, run_threads


def talk(ranks: Ranks) -> list[object]:
    """Calls every collective once; returns what came."""
    own = torch.arange(3.0 * ranks.size).view(-1, 1) + 100 * ranks.rank
    send, receive = [1, *[3] * (ranks.size - 1)], [3 if ranks.rank else 1] * ranks.size
    first = torch.full((2,), float(ranks.rank))
    ranks.broadcast(first)
    leaf = torch.full((1 + ranks.rank, 2), 1.0 + ranks.rank, requires_grad=True)
    gathered = ranks.all_gather_rows(leaf, [1 + rank for rank in range(ranks.size)])
    (gathered.square().sum() * (1 + ranks.rank)).backward()
    # As many keys for each rank as its number.
    keys = torch.tensor([10 * owner + place for owner in range(ranks.size) for place in range(owner)])
    counts = torch.zeros(ranks.size, 2, 2, dtype=torch.int64)
    counts[:, 0, 0], counts[:, 0, 1], counts[:, 1, 0] = torch.arange(ranks.size), 1, ranks.rank
    both, wanted = ranks.ask(counts, [OrderedKeys(keys)], [10])
    return [
        ranks.all_to_all(own[: sum(send)], send, receive),
        torch.cat(ranks.all_to_all_split(own[: sum(send)], send, receive, torch.float64)[0]),
        *split(ranks, own, send, receive),
        *(torch.cat(written(ranks, own, send, receive, is_kept)) for is_kept in (True, False)),
        ranks.all_to_all_gather(own, torch.arange(sum(send)), send, receive, torch.bfloat16, torch.float32),
        ranks.all_reduce(torch.tensor(float(ranks.rank))),
        ranks.sum(0.5 + ranks.rank, torch.device("cpu")),
        first,
        leaf.grad,
        both,
        wanted,
        ranks.all_gather(("rank", ranks.rank)),
        ranks.broadcast_object({"from": ranks.rank}),
        ranks.run_on_first(lambda: ranks.rank),
        list(ranks.lockstep([ranks.rank] * (ranks.rank + 1))),
    ]


class Keeper:
    """Holds rows that other ranks sent, through later calls."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor | None] = []

    def keep(self, ranks: Ranks) -> None:
        self.rows = ranks.kept(self.rows)


def split(ranks: Ranks, own: torch.Tensor, send: list[int], receive: list[int]) -> list[torch.Tensor]:
    """Sends rows with numbers, and reads them after three more calls."""
    keeper, rows = Keeper(), own[: sum(send)]
    came, numbers = ranks.all_to_all_split(rows, send, receive, rows.dtype, rows[:, 0].float(), keeper.keep)
    keeper.rows = [*came]
    assert numbers is not None
    for _ in range(3):
        ranks.all_to_all_split(rows + 1, send, receive, rows.dtype, rows[:, 0].float() + 1)
    return [*(part for part in keeper.rows if part is not None), numbers]


def written(ranks: Ranks, own: torch.Tensor, send: list[int], receive: list[int], is_kept: bool) -> list[torch.Tensor]:
    """Sends rows that are written where they travel from; if they are kept, reads them after two more exchanges."""

    def write(rooms: Sequence[torch.Tensor]) -> None:
        for room, rows in zip(rooms, own[: sum(send)].split(send), strict=True):
            room.copy_(rows)

    came = ranks.all_to_all_written(write, own[:0], send, receive, is_kept=is_kept)
    for _ in range(2 * is_kept):
        ranks.all_to_all(own[: sum(send)] + 1, send, receive)
    return came


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_comes_is_what_comes_to_processes(world_size: int) -> None:
    for on_threads, on_processes in zip(run_threads(world_size, talk), run_ranks(world_size, talk), strict=True):
        for found, expected in zip(on_threads, on_processes, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0) if isinstance(found, torch.Tensor) else None
            assert isinstance(found, torch.Tensor) or str(found) == str(expected)


def draw_in_turns(ranks: Ranks, order: list[int]) -> list[float]:
    torch.manual_seed(7)
    drawn = []
    for _ in range(3):
        order.append(ranks.rank)
        drawn.append(float(torch.rand(())))
        ranks.all_gather(None)
    return drawn


def test_ranks_take_turns_and_have_generators_of_their_own() -> None:
    order: list[int] = []
    alone = draw_in_turns(ONE_PROCESS, [])
    before = torch.get_rng_state()
    assert run_threads(3, draw_in_turns, order) == [alone] * 3
    assert order == [0, 1, 2] * 3
    assert torch.equal(torch.get_rng_state(), before)


def refuse_on_rank_1(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise UserError("not here")
    ranks.all_gather(None)


def test_what_a_rank_raises_is_raised_and_the_others_do_not_wait() -> None:
    with pytest.raises(UserError, match="not here"):
        run_threads(3, refuse_on_rank_1)
    kinds = [type(outcome) for outcome in outcomes_on_threads(3, refuse_on_rank_1)]
    assert kinds == [RankGone, UserError, RankGone]


def call_different_collectives(ranks: Ranks) -> None:
    ranks.all_gather(None) if ranks.rank else ranks.all_reduce(torch.zeros(1))


def test_ranks_that_call_different_collectives_are_told_so() -> None:
    with pytest.raises(RankGone, match=r"different collectives: \['all_reduce', 'all_gather'\]"):
        run_threads(2, call_different_collectives)
