"""Agreement on errors: if one rank fails, every rank raises, so that no rank waits in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import CheckpointError, UserError

T = TypeVar("T")


def on_every_rank(doing: str, action: Callable[[], T], ranks: Ranks) -> list[T]:
    """Runs `action` on every rank and returns the results of all ranks, in rank order.

    Collective: every rank.

    Args:
        doing: start of the error message, for example "step 100 was not saved".

    Raises:
        UserError, CheckpointError: `action` failed on at least one rank; every rank raises.
    """
    return ranks.all_gather(ranks.run_on_each(lambda: _named(doing, action, ranks)))


def on_first_rank(doing: str, action: Callable[[], T], ranks: Ranks) -> T:
    """Runs `action` on rank 0 and returns its result on every rank; raises like `on_every_rank`.

    Collective: every rank.
    """
    return ranks.run_on_first(lambda: _named(doing, action, ranks))


def _named(doing: str, action: Callable[[], T], ranks: Ranks) -> T:
    """Runs `action` and prefixes any error with `doing` and the rank."""
    where = f"rank {ranks.rank}: " if ranks.size > 1 else ""
    try:
        return action()
    except (UserError, CheckpointError) as error:
        kind = UserError if isinstance(error, UserError) else CheckpointError
        raise kind(f"{doing}: {where}{error}") from error
    except Exception as error:
        raise CheckpointError(f"{doing}: {where}{type(error).__name__}: {error}") from error
