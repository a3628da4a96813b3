"""The optimizers by their names in a configuration."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points

from embedtrain.errors import UserError
from embedtrain.optim.optimizer import SparseOptimizer

ENTRY_POINTS = "embedtrain.optimizers"
"""The group of entry points by which an installed package offers optimizers of its own."""


class Optimizers(Mapping[str, type[SparseOptimizer]]):
    """The optimizers of this package, and those that installed packages offer.

    Args:
        own: the optimizers of this package by their names.

    Raises:
        UserError: an installed package offers a name that is taken, or something that is no optimizer.
    """

    def __init__(self, own: Mapping[str, type[SparseOptimizer]]) -> None:
        self._own = dict(own)

    def __getitem__(self, name: str) -> type[SparseOptimizer]:
        return self._own[name] if name in self._own else _load(self._offered[name])

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._offered

    def __len__(self) -> int:
        return len(self._own) + len(self._offered)

    # Looking through what is installed takes some 30 ms: `import embedtrain` does not wait for it.
    @functools.cached_property
    def _offered(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=ENTRY_POINTS):
            if point.name in self._own or (point.name in found and found[point.name] != point):
                raise UserError(
                    f"{_origin(point)} offers an optimizer {point.name!r}, and there is another of that name"
                )
            found[point.name] = point
        return found


def _load(point: EntryPoint) -> type[SparseOptimizer]:
    try:
        kind = point.load()
    except Exception as error:  # a foreign module may raise anything when it is imported
        raise UserError(f"the optimizer {point.name} of {_origin(point)} cannot be loaded: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, SparseOptimizer)):
        raise UserError(f"{_origin(point)} offers {point.value} as the optimizer {point.name}, not a SparseOptimizer")
    return kind


def _origin(point: EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist is not None else "an installed package"
