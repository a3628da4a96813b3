"""Shows a configuration in full, with the source of each value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import yaml

from embedtrain.config.values import dump
from embedtrain.recipes.loading import read_layers, resolve_layers

_COLUMN = 48
"""Column of the remarks; further right after a longer line."""


def show_config(path: str | None, overrides: Sequence[str]) -> str:
    """Returns the resolved configuration as YAML, with a comment behind each given value that names its source.

    Args:
        path: a YAML file; None for the defaults.
        overrides: settings `key=value` that replace those of the file.

    Raises:
        UserError: see `load_config`, except that keys without a value are allowed. A comment says that they must be
            given.
    """
    layers = read_layers(path, overrides)
    resolved = resolve_layers(layers)
    given = {repr(override) for override in overrides}
    lines = dump(resolved).splitlines()
    for key, line in _lines_of(yaml.compose("\n".join(lines), Loader=yaml.SafeLoader)):
        source = "must be given" if key in layers.missing else layers.sources.get(key)
        if source is not None:
            remark = "command line" if source in given else " ".join(source.split())
            lines[line] = f"{lines[line]:<{_COLUMN}}  # {remark}"
    return "\n".join(lines)


def _lines_of(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yields the key and the line number of each value that is a list or fits on the line of its key."""
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _lines_of(value, f"{key}.")
        elif isinstance(value, yaml.SequenceNode) or value.start_mark.line == value.end_mark.line:
            yield key, name.start_mark.line
