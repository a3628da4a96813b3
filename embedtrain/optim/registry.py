"""What a configuration chooses by name: the choices of this package, and those that installed packages offer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from embedtrain.errors import UserError

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class Registry(Mapping[str, T]):
    """Objects of one kind by name, those of this package first.

    An installed package offers its own by an entry point. The names are known without an import. An object is imported
    when it is asked for by its name, so a broken package disturbs nobody who does not use it.

    Args:
        noun: what an object is, for messages.
        group: the group of entry points by which installed packages offer objects.
        own: the objects of this package by name, each as "module:attribute".
        check: returns an object of an installed package; raises TypeError with what was expected if it is wrong.
    """

    def __init__(self, noun: str, group: str, own: Mapping[str, str], check: Callable[[Any], T]) -> None:
        self._noun, self._group, self._own, self._check = noun, group, own, check
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        """Returns the object of a name.

        Raises:
            KeyError: there is no such name.
            UserError: several packages offer it, or its package is broken.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name, self._entries[name])
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    # Looking through what is installed takes some 30 ms: `import embedtrain` does not wait for it.
    @functools.cached_property
    def _entries(self) -> dict[str, list[EntryPoint]]:
        found = {name: [EntryPoint(name, value, self._group)] for name, value in self._own.items()}
        for entry in entry_points(group=self._group):
            if entry.name in self._own:
                warn_once(
                    f"package {_package_of(entry)} offers the {self._noun} {entry.name!r}, "
                    "which embedtrain has itself: it is not used"
                )
            elif entry not in (others := found.setdefault(entry.name, [])):
                others.append(entry)
        return found

    def _load(self, name: str, entries: list[EntryPoint]) -> T:
        first, *others = entries
        if others:
            packages = ", ".join(map(_package_of, entries))
            raise UserError(
                f"the {self._noun} {name!r} is offered by several packages: {packages}; uninstall all but one of them"
            )
        if name in self._own:
            own: T = first.load()
            return own
        offer = f"package {_package_of(first)} offers the {self._noun} {name!r}"
        try:
            found = first.load()
        except Exception as error:  # a foreign module may raise anything when it is imported
            raise UserError(f"{offer}, and importing {first.value} failed: {type(error).__name__}: {error}") from error
        try:
            return self._check(found)
        except TypeError as error:
            raise UserError(f"{offer}: expected {first.value} to be {error}, got {type(found).__name__}") from error


def usable(registry: Mapping[str, T]) -> dict[str, T]:
    """Returns all entries that can be loaded, by name; warns once of each that cannot."""
    found = {}
    for name in registry:
        try:
            found[name] = registry[name]
        except UserError as error:
            warn_once(str(error))
    return found


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, unless it was logged before."""
    _logger.warning(message)


def _package_of(entry: EntryPoint) -> str:
    return entry.value if entry.dist is None else entry.dist.name
