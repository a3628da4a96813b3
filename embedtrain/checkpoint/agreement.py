"""Failing together: an error on one rank is a CheckpointError on all, and no rank waits for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import CheckpointError, UserError

T = TypeVar("T")


def on_every_rank(doing: str, action: Callable[[], T], ranks: Ranks) -> list[T]:
    """Runs `action` on each rank and returns the ranks' results on all.

    Collective: every rank.

    Args:
        doing: words for the action, the beginning of the error's message.

    Raises:
        UserError, CheckpointError: `action` failed on a rank; every rank knows that, and raises it.
    """
    return ranks.all_gather(ranks.run_on_each(lambda: _named(doing, action, ranks)))


def on_first_rank(doing: str, action: Callable[[], T], ranks: Ranks) -> T:
    """Runs `action` on rank 0 and returns its result on every rank; errors as in `on_every_rank`.

    Collective: every rank.
    """
    return ranks.run_on_first(lambda: _named(doing, action, ranks))


def _named(doing: str, action: Callable[[], T], ranks: Ranks) -> T:
    """Returns the action's result, or says in its error what was being done, and on which rank."""
    where = f"rank {ranks.rank}: " if ranks.size > 1 else ""
    try:
        return action()
    except (UserError, CheckpointError) as error:
        kind = UserError if isinstance(error, UserError) else CheckpointError
        raise kind(f"{doing}: {where}{error}") from error
    except Exception as error:
        raise CheckpointError(f"{doing}: {where}{type(error).__name__}: {error}") from error
