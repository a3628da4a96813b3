"""The second stage of a look-up: owners locate the rows that were asked for."""

from __future__ import annotations

from embedtrain.embedding.input_dist import Asked
from embedtrain.embedding.requests import Found


def lookup(asked: Asked) -> list[Found]:
    """Returns, per table group, the rows that this rank owes to the ranks that asked."""
    if asked.check is not None:
        asked.check.run()
    return [
        Found(
            *part.group.access.look_up(part.rows),
            None if part.sums is None else part.group.access.look_up(part.sums.rows),
        )
        for part in asked.parts
    ]
