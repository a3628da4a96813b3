"""Failing together: an error on one rank is a CheckpointError on all, and no rank waits for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from embedtrain.distributed.collectives import all_gather_object
from embedtrain.distributed.runtime import rank_of, size_of
from embedtrain.errors import CheckpointError, UserError

T = TypeVar("T")


def on_every_rank(doing: str, action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Runs `action` on each rank and returns the ranks' results on all.

    Collective: every rank of `group`.

    Args:
        doing: words for the action, the beginning of the error's message.

    Raises:
        UserError, CheckpointError: `action` failed on a rank; every rank knows that, and raises it.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    outcomes = all_gather_object((result, _report(failure)), group)
    where = [f"rank {rank}: " if size_of(group) > 1 else "" for rank in range(len(outcomes))]
    reports = [
        (is_user_error, f"{place}{text}")
        for place, (_, report) in zip(where, outcomes, strict=True)
        if report is not None
        for is_user_error, text in [report]
    ]
    if reports:
        kind = UserError if all(is_user_error for is_user_error, _ in reports) else CheckpointError
        raise kind(f"{doing}: " + "; ".join(text for _, text in reports)) from failure
    return [value for value, _ in outcomes]  # type: ignore[misc]


def on_first_rank(doing: str, action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Runs `action` on rank 0 and returns its result on every rank; errors as in `on_every_rank`.

    Collective: every rank of `group`.
    """
    result = on_every_rank(doing, lambda: action() if rank_of(group) == 0 else None, group)[0]
    return result  # type: ignore[return-value]


def _report(failure: Exception | None) -> tuple[bool, str] | None:
    if failure is None:
        return None
    known = isinstance(failure, UserError | CheckpointError)
    return isinstance(failure, UserError), str(failure) if known else f"{type(failure).__name__}: {failure}"
