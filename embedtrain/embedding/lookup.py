"""What owners do for a look-up: rows are found where they live."""

from __future__ import annotations

from embedtrain.embedding.input_dist import Asked
from embedtrain.embedding.requests import Found


def lookup(asked: Asked) -> list[Found]:
    """Returns what this rank has for the ranks that asked, per table group."""
    if asked.check is not None:
        asked.check.run()
    return [
        Found(
            *part.group.access.look_up(part.rows),
            None if part.sums is None else part.group.access.look_up(part.sums.rows),
        )
        for part in asked.parts
    ]
