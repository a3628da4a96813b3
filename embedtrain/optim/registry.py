"""Registries of the objects that a configuration chooses by name, built in or from installed packages."""

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
    """Maps names to objects of one kind; the built-in names come first.

    Installed packages add objects through entry points. Listing the names imports nothing. An object is imported when
    it is first looked up, so a broken package affects only runs that use it.

    Args:
        noun: noun for the objects in messages.
        group: entry-point group through which installed packages add objects.
        own: built-in objects by name, each as "module:attribute".
        check: returns the object of an installed package, or raises TypeError that says what was expected.
    """

    def __init__(self, noun: str, group: str, own: Mapping[str, str], check: Callable[[Any], T]) -> None:
        self._noun, self._group, self._own, self._check = noun, group, own, check
        self._loaded: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        """Returns the object with a name; imports it on the first call.

        Raises:
            KeyError: the name is unknown.
            UserError: several packages offer the name, or its package cannot be imported.
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

    # Listing the entry points of installed packages takes about 30 ms, too long for `import embedtrain`.
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
    """Returns all entries that can be loaded, by name; warns once about each other entry."""
    found = {}
    for name in registry:
        try:
            found[name] = registry[name]
        except UserError as error:
            warn_once(str(error))
    return found


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning once per process."""
    _logger.warning(message)


def _package_of(entry: EntryPoint) -> str:
    return entry.value if entry.dist is None else entry.dist.name
