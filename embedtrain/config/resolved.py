"""Resolved configurations: as YAML, access by key, and comparison."""

from __future__ import annotations

import functools
from typing import Any

import yaml

from embedtrain.config.sections import Config
from embedtrain.config.values import dump, flatten, settings_of
from embedtrain.errors import UserError, printable


def to_yaml(config: Config) -> str:
    """Returns the resolved configuration as YAML."""
    return dump(settings_of(config))


def value_at(config: Config, key: str) -> Any:
    """Returns the value of a full key, such as "data.path"."""
    return functools.reduce(getattr, key.split("."), config)


def set_value(config: Config, key: str, value: Any) -> None:
    """Sets the value of a full key, in place."""
    section, _, name = key.rpartition(".")
    setattr(value_at(config, section) if section else config, name, value)


def settings_in(text: str) -> dict[str, Any]:
    """Returns the values by full key of the configuration in a run folder, which `to_yaml` wrote.

    Raises:
        UserError: the text is not a configuration.
    """
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = printable(" ".join(str(error).split()))
        raise UserError(f"the config.yaml of the run folder is not a configuration: {reason}") from error
    if not isinstance(document, dict):
        raise UserError("the config.yaml of the run folder is not a configuration: expected keys and values")
    return dict(flatten(document))


def differing_keys(earlier_yaml: str, config: Config, may_change: tuple[str, ...] = ()) -> list[str]:
    """Returns the keys that affect a run's result and differ, each with both values.

    Args:
        earlier_yaml: the resolved configuration to compare with.
        config: the configuration; keys with a prefix in its `MAY_CHANGE` may differ.
        may_change: prefixes of further keys that may differ.

    Raises:
        UserError: the earlier text is not a configuration.
    """
    first, second = (settings_in(text) for text in (earlier_yaml, to_yaml(config)))
    # A key that is absent in an earlier version's configuration has its default value.
    defaults = settings_in(to_yaml(type(config)()))
    may_change = (*config.MAY_CHANGE, *may_change)
    return [
        f"{key} (was {first.get(key, 'absent')}, is {second.get(key, 'absent')})"
        for key in sorted(first.keys() | second.keys())
        if first.get(key, defaults.get(key)) != second.get(key) and not key.startswith(may_change)
    ]
