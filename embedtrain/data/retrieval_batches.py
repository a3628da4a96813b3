"""Training batches of interactions: users with some of their items, and items drawn as negatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.bags import Bags, spans
from embedtrain.data.negatives import alias_table, draw_rows
from embedtrain.data.partition import block_order, num_steps, random_generator, share_of_rank
from embedtrain.jagged import Jagged

MANY_KNOWN = 1 << 21
"""With more items of its users than this, a step looks for its candidates among them first: 16 MiB."""


@dataclass(frozen=True)
class RetrievalBatch:
    """One rank's part of a step; what all ranks share is the same on each.

    Attributes:
        users: [n] int64 rows.
        positives: [m] int64 rows of items, those of the first user first.
        example: [m] int64; the place among `users` of each positive's user.
        negatives: [k] int64; this rank's share of the items drawn. Without `in_batch`, its share of the candidates.
        known: the candidates that each of `users` has, which are no negatives for them.
        candidates: [c] int64; what is scored as negatives: the items drawn, rank by rank, with `in_batch` each
            rank's positives before them.
        candidate_counts: for each rank how many of the candidates are its own.
        user_counts: for each rank how many users it has.
        expected: how often each of `positives` [m] and of `candidates` [c] is expected among the candidates of a
            step, float32.
        in_batch: whether positives are among the candidates.
        num_global_positives: over all ranks.
    """

    users: Tensor
    positives: Tensor
    example: Tensor
    negatives: Tensor
    known: Jagged
    candidates: Tensor
    candidate_counts: list[int]
    user_counts: list[int]
    expected: tuple[Tensor, Tensor]
    in_batch: bool
    num_global_positives: int

    @property
    def num_examples(self) -> int:
        """This rank's interactions."""
        return self.positives.numel()

    def split(self, num_parts: int) -> list[RetrievalBatch]:
        """Returns the users as so many batches of the same step, each of which is scored against all candidates.

        So the loss is that of the step. Each part looks up this rank's candidates again, the positives among them.
        """
        own = torch.cat([self.positives, self.negatives]) if self.in_batch else self.negatives
        return [self._part(share_of_rank(self.users.numel(), part, num_parts), own) for part in range(num_parts)]

    def _part(self, share: range, own_candidates: Tensor) -> RetrievalBatch:
        start, stop = (
            int(place) for place in torch.searchsorted(self.example, torch.tensor([share.start, share.stop]))
        )
        of_positives, of_candidates = self.expected
        return replace(
            self,
            users=self.users[share.start : share.stop],
            positives=self.positives[start:stop],
            example=self.example[start:stop] - share.start,
            negatives=own_candidates,
            known=self.known.part(share.start, share.stop),
            expected=(of_positives[start:stop], of_candidates),
            in_batch=False,
        )


@dataclass(frozen=True)
class DrawOptions:
    """How interactions become examples and negatives.

    Attributes:
        global_batch_size: examples of a step over all ranks.
        items_per_example: the most positives of an example.
        num_negatives: items drawn for each step, over all ranks; all users of the step share them.
        popularity_share: how many of them, as a share, are drawn by popularity; the others uniformly.
        in_batch: whether the positives of a step, those of all ranks, are negatives for its other users.
    """

    global_batch_size: int
    items_per_example: int
    num_negatives: int
    popularity_share: float = 0.0
    in_batch: bool = False


class RetrievalBatches:
    """The batches of a rank, each a function of (seed, epoch, step): nothing to save, nothing to restore.

    An example is a user with at most `items_per_example` of their items: each user's items are cut into as many
    consecutive runs as that takes, of even length, from another beginning every epoch. So every interaction comes
    once an epoch, and the items that share an example share the work on their user's negatives.

    Args:
        known: the items of each user.
        num_items: items in all.
        options: sizes and negatives.
        seed: of the order and of every draw.
        rank: whose part of each step.
        world_size: ranks that share a step.
        on_epoch: called on every rank before an epoch's first batch, and when a run is resumed within one.
    """

    def __init__(
        self,
        known: Bags,
        num_items: int,
        options: DrawOptions,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        on_epoch: Callable[[], None] | None = None,
    ) -> None:
        self._known = known
        self._options = options
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._on_epoch = on_epoch
        self._degrees = np.diff(known.starts)
        self._num_runs = -(-self._degrees // options.items_per_example)
        self._first_example = np.concatenate([[0], np.cumsum(self._num_runs)])
        counts = np.bincount(known.values, minlength=num_items).astype(np.float64)
        self._popularity = counts / counts.sum()
        drawn = negative_shares(self._popularity, num_items, options.popularity_share)
        self._alias_table = alias_table(drawn)
        self._expected_drawn = options.num_negatives * drawn
        self._is_candidate = np.zeros(num_items, np.bool_)
        self._epoch = -1
        self._order = np.zeros(0, np.int64)
        self._turns = np.zeros(0, np.float64)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch, the same on every rank."""
        return num_steps(int(self._first_example[-1]), self._options.global_batch_size)

    @property
    def examples_per_epoch(self) -> int:
        """Interactions."""
        return len(self._known.values)

    def batch(self, epoch: int, step: int) -> RetrievalBatch:
        """Returns this rank's part of step `step` of epoch `epoch`, both from 0; it may hold no user."""
        if self._epoch != epoch:
            self._begin_epoch(epoch)
        size = self._options.global_batch_size
        examples = self._order[step * size : (step + 1) * size]
        users = np.searchsorted(self._first_example, examples, side="right") - 1
        positives, lengths = self._positives(users, examples - self._first_example[users])
        generator = random_generator(self._seed, "negatives", epoch, step)
        negatives = draw_rows(generator, self._options.num_negatives, self._alias_table)
        shares = [self._shares(rank, lengths) for rank in range(self._world_size)]
        own = [[positives[p], negatives[k]] if self._options.in_batch else [negatives[k]] for _, p, k in shares]
        candidates = np.concatenate([part for parts in own for part in parts])
        mine, my_positives, my_negatives = shares[self._rank]
        return RetrievalBatch(
            users=torch.from_numpy(users[mine]),
            positives=torch.from_numpy(positives[my_positives]),
            example=torch.from_numpy(np.repeat(np.arange(len(users[mine])), lengths[mine])),
            negatives=torch.from_numpy(negatives[my_negatives]),
            known=self._known_of(users[mine], candidates),
            candidates=torch.from_numpy(candidates),
            candidate_counts=[sum(map(len, parts)) for parts in own],
            user_counts=[len(users[share]) for share, _, _ in shares],
            expected=(
                self._expected(positives[my_positives], len(positives)),
                self._expected(candidates, len(positives)),
            ),
            in_batch=self._options.in_batch,
            num_global_positives=len(positives),
        )

    def _known_of(self, users: NDArray[np.int64], candidates: NDArray[np.int64]) -> Jagged:
        """Returns the candidates among the items of each user.

        A user of 200,000 items is in thousands of examples, of which a step may hold hundreds.
        """
        known = self._known
        if int(self._degrees[users].sum()) > MANY_KNOWN:
            distinct, users = np.unique(users, return_inverse=True)
            wanted = np.unique(candidates)
            found = [_common(wanted, known.values[known.starts[user] : known.starts[user + 1]]) for user in distinct]
            starts = np.cumsum([0, *map(len, found)])
            known = Bags(starts, np.concatenate(found))
        values, lengths = known.of(users)
        self._is_candidate[candidates] = True
        is_candidate = self._is_candidate[values]
        self._is_candidate[candidates] = False
        up_to = np.concatenate([[0], np.cumsum(is_candidate)])[np.concatenate([[0], np.cumsum(lengths)])]
        return Jagged(torch.from_numpy(values[is_candidate]), torch.from_numpy(np.diff(up_to)))

    def _begin_epoch(self, epoch: int) -> None:
        if self._on_epoch is not None:
            self._on_epoch()
        self._epoch = epoch
        self._order = block_order(int(self._first_example[-1]), self._seed, epoch)
        self._turns = random_generator(self._seed, "turns", epoch).random(len(self._known))

    def _positives(
        self, users: NDArray[np.int64], runs: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the items of the given runs of the users, one after the other, and how many each has."""
        degrees, num_runs = self._degrees[users], self._num_runs[users]
        first, last = degrees * runs // num_runs, degrees * (runs + 1) // num_runs
        lengths = last - first
        turned = first + (self._turns[users] * degrees).astype(np.int64)
        places = spans(turned, lengths) % np.repeat(degrees, lengths) + np.repeat(self._known.starts[users], lengths)
        return self._known.values[places], lengths

    def _expected(self, items: NDArray[np.int64], num_positives: int) -> Tensor:
        expected = self._expected_drawn[items]
        if self._options.in_batch:
            expected = expected + num_positives * self._popularity[items]
        return torch.from_numpy(expected.astype(np.float32))

    def _shares(self, rank: int, lengths: NDArray[np.int64]) -> tuple[slice, slice, slice]:
        """Returns a rank's share of the step's examples, of their positives, and of the negatives."""
        mine = share_of_rank(len(lengths), rank, self._world_size)
        drawn = share_of_rank(self._options.num_negatives, rank, self._world_size)
        first = int(lengths[: mine.start].sum())
        positives = slice(first, first + int(lengths[mine.start : mine.stop].sum()))
        return slice(mine.start, mine.stop), positives, slice(drawn.start, drawn.stop)


def negative_shares(popularity: NDArray[np.float64], num_items: int, popularity_share: float) -> NDArray[np.float64]:
    """Returns the probability of drawing an item as a negative, given its share of the interactions."""
    shares: NDArray[np.float64] = (1.0 - popularity_share) / num_items + popularity_share * popularity
    return shares


def _common(wanted: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the wanted items that are known; both ascend, and nothing is done for each known item."""
    if not len(known):
        return wanted[:0]
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    common: NDArray[np.int64] = wanted[known[places] == wanted]
    return common
