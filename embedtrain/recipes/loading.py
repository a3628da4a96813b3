"""Reads configurations from files and the command line, and checks them."""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from embedtrain.config.choice import (
    TABLES,
    Layer,
    for_another_optimizer,
    optimizer_of,
    refuse_options_of_others,
    table_optimizers,
    without_tables,
)
from embedtrain.config.optimizer import OPTIMIZERS, OptimizerConfig
from embedtrain.config.sections import Config
from embedtrain.config.values import (
    Unset,
    choices_of,
    compose,
    flatten,
    in_plain_words,
    read,
    read_override,
    settings_of,
    shield,
    unshield,
)
from embedtrain.errors import UserError
from embedtrain.optim.registry import usable
from embedtrain.recipes.optimizers import check_optimizers
from embedtrain.recipes.registry import BUILT_IN, DEFAULT_MODEL, RECIPES, recipe_of

_SHIPPED = Path(__file__).resolve().parents[1] / "configs"

_logger = logging.getLogger(__name__)

SEARCH = "tune"
"""The section of a configuration file with the search space of `embedtrain tune`; other commands ignore it."""

_MERGE_ERRORS = (OmegaConfBaseException, ValueError, TypeError, AttributeError, KeyError)
"""Errors that omegaconf raises for invalid values; it does not wrap the last four."""


def load_config(path: str | None, overrides: Sequence[str]) -> Config:
    """Reads and checks a configuration.

    Args:
        path: a YAML file; None for the defaults.
        overrides: settings `key=value` that replace those of the file.

    Raises:
        UserError: the file cannot be read, or a key or value is invalid; the message suggests a correction.
    """
    return _to_config(read_layers(path, overrides))


@dataclass(frozen=True)
class Layers:
    """Holds a configuration before it is checked as a whole.

    Attributes:
        merged: all keys with their values, except the optimizers of single tables. A required key without a value has
            the value "???".
        from_file: keys and values of files, without the options of an optimizer that the command line replaces.
        from_command: keys and values of the command line, which replace those of files.
    """

    merged: DictConfig
    from_file: Sequence[Layer]
    from_command: Sequence[Layer]

    @functools.cached_property
    def sources(self) -> Mapping[str, str]:
        """The source of the value of each given key."""
        return {key: source for source, layer in [*self.from_file, *self.from_command] for key, _ in flatten(layer)}

    @functools.cached_property
    def missing(self) -> list[str]:
        """The required keys without a value."""
        merged: Any = OmegaConf.to_container(self.merged, resolve=False)
        return [key for key, value in flatten(merged) if value == "???"]


def read_layers(path: str | None, overrides: Sequence[str]) -> Layers:
    """Reads a configuration without checking it as a whole; required keys may have no value.

    Raises:
        UserError: see `load_config`, except that required keys may be missing and settings may contradict each other.
    """
    return _merge([] if path is None else [(path, _without_search(_read_file(path)))], overrides)


def resolve_layers(layers: Layers) -> dict[str, Any]:
    """Checks a configuration and returns all its settings; required keys without a value are "???".

    Raises:
        UserError: a value is invalid.
    """
    resolved = settings_of(_to_config(_filled(layers)))
    for key in layers.missing:
        *sections, name = key.split(".")
        functools.reduce(lambda section, part: section[part], sections, resolved)[name] = Unset("???")
    return resolved


def load_without_data(path: str | None, overrides: Sequence[str]) -> Config:
    """Reads and checks a configuration as `load_config` does; required keys without a value become "none".

    Raises:
        UserError: see `load_config`, except that required keys may be missing.
    """
    return _to_config(_filled(read_layers(path, overrides)))


def _filled(layers: Layers) -> Layers:
    filled = copy.deepcopy(layers.merged)
    for key in layers.missing:
        OmegaConf.update(filled, key, "none")
    return replace(layers, merged=filled)


def config_from_yaml(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the configuration that `to_yaml` wrote.

    Args:
        text: YAML.
        source: name of the text's file, for messages.
        overrides: settings `key=value` that replace those of the text.

    Raises:
        UserError: a key or value is invalid.
    """
    return _to_config(_merge([(source, _document(text, source))], overrides))


def _merge(files: Sequence[tuple[str, yaml.MappingNode]], overrides: Sequence[str]) -> Layers:
    """Reads the values of files and the command line by the types of the model's keys, and merges them."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(f"expected key=value, such as optimizer.lr=0.1, got {override!r}")
    _warn_of_repeats(overrides)
    model = _model_of(files, overrides)
    kind = _config_of(model)
    from_file: list[Layer] = []
    for source, document in files:
        with _told_of(source):
            from_file.append((source, read(document, kind)))
    from_command: list[Layer] = []
    for override in overrides:
        key, _, text = override.partition("=")
        with _told_of(repr(override)):
            from_command.append((repr(override), read_override(key, text, kind)))
    with _explained():
        return _merge_layers(model, from_file, from_command)


def _warn_of_repeats(overrides: Sequence[str]) -> None:
    """Logs a warning for each key that is given several times."""
    last = {override.partition("=")[0]: override for override in overrides}
    for key, count in Counter(override.partition("=")[0] for override in overrides).items():
        if count > 1:
            _logger.warning(f"{key} is given {count} times; the last value is used: {last[key]}")


@contextmanager
def _told_of(source: str) -> Iterator[None]:
    """Turns errors about a value into UserErrors that name its source."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from error


def _merge_layers(model: str, from_file: list[Layer], from_command: list[Layer]) -> Layers:
    default = _config_of(model)().optimizer
    optimizer = optimizer_of(from_file, default)
    if (chosen := optimizer_of(from_command, optimizer)).name != optimizer.name:
        # The command line replaces the optimizer, so the options in the file for the other optimizer do not apply.
        from_file = [(source, for_another_optimizer(layer)) for source, layer in from_file]
    layers = [*from_file, *from_command]
    merged = OmegaConf.structured(_config_of(model))
    merged.optimizer = default if chosen.name == default.name else chosen
    for source, layer in layers:
        refuse_options_of_others((source, layer), chosen)
        _refuse_unknown_keys(source, layer, model, chosen.name)
        try:
            merged = OmegaConf.merge(merged, shield(without_tables(layer)))
        except _MERGE_ERRORS as error:
            raise UserError(f"{source}: {_explain(error)}") from error
    assert isinstance(merged, DictConfig)
    return Layers(merged, from_file, from_command)


def _to_config(layers: Layers) -> Config:
    if layers.missing:
        raise UserError(f"{layers.missing[0]} must be given, such as {layers.missing[0]}=VALUE on the command line")
    with _explained():
        config: Config = unshield(OmegaConf.to_object(layers.merged))
        main, default = config.optimizer, type(config)().optimizer
        main.tables = table_optimizers(layers.from_file, layers.from_command, main, default)
    config.check()
    check_optimizers(config.optimizer)
    return config


@contextmanager
def _explained() -> Iterator[None]:
    """Turns omegaconf's errors into UserErrors in plain words."""
    try:
        yield
    except UserError:
        raise
    except _MERGE_ERRORS as error:
        raise UserError(_explain(error)) from error


def shipped_names() -> list[str]:
    """Returns the names of embedtrain's own configurations, which can be used in place of a file's path."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def read_shipped(name: str) -> str:
    """Returns the text of one of embedtrain's own configurations, with its comments.

    Raises:
        UserError: there is no configuration of this name.
    """
    if name not in shipped_names():
        raise UserError(f"embedtrain has no configuration {name!r}; there are {', '.join(shipped_names())}")
    return (_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")


def _read_file(path: str) -> yaml.MappingNode:
    if stat.S_ISFIFO(_mode_of(path)):
        _logger.info(f"reading the configuration from the pipe {path} until it is closed")
    if path in shipped_names() and not Path(path).is_file():
        return _document(read_shipped(path), path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"there is no configuration file {path}; embedtrain's own configurations are {', '.join(shipped_names())}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a configuration: {error}") from error
    return _document(text, path)


def declared_search(path: str) -> dict[str, Any]:
    """Returns the section `tune` of a configuration file; empty if there is none.

    Raises:
        UserError: the file cannot be read, or the section is not a mapping.
    """
    section = next((value for key, value in _read_file(path).value if key.value == SEARCH), None)
    if section is None:
        return {}
    with _told_of(path):
        found = yaml.SafeLoader("").construct_document(section)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path}: tune: expected settings with a list or a range of values each, got {found!r}")
    return found


def _without_search(document: yaml.MappingNode) -> yaml.MappingNode:
    pairs = [(key, value) for key, value in document.value if key.value != SEARCH]
    return yaml.MappingNode(document.tag, pairs, document.start_mark, document.end_mark)


def _mode_of(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def _document(text: str, source: str) -> yaml.MappingNode:
    with _told_of(source):
        node = compose(text)
    if node is None:
        return yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{source}: expected keys and values, got a {'list' if node.id == 'sequence' else 'text'}")
    return node


def _model_of(files: Sequence[tuple[str, yaml.MappingNode]], overrides: Sequence[str]) -> str:
    """Returns the name of the model that files or the command line give, or the default."""
    name, named_in = DEFAULT_MODEL, ""
    for source, document in files:
        for key, value in document.value:
            if key.value == "model":
                name, named_in = str(value.value), source
    for override in overrides:
        if override.startswith("model="):
            name, named_in = override.partition("=")[2], repr(override)
    try:
        recipe_of(name)
    except UserError as error:
        raise UserError(f"{named_in}: {error}") from error
    return name


def _config_of(model: str) -> type[Config]:
    kind: type[Config] = recipe_of(model).config
    return kind


def _refuse_unknown_keys(source: str, layer: Mapping[str, Any], model: str, optimizer: str) -> None:
    own = _known_keys(model, optimizer)
    for key, _ in flatten(layer):
        if key.startswith(f"{TABLES}.") or _is_among(key, [*own, *_beginnings(own)]):
            continue  # options of single tables are checked later, because they depend on the table's optimizer
        known = list(own)
        sections = list(dict.fromkeys(_beginnings(known)))
        # Only built-in models are searched, because searching others would import their packages.
        owners = [name for name in BUILT_IN if name != model and _is_among(key, _known_keys(name, optimizer))]
        of_another = f" (it is one of model {' and '.join(owners)})" if owners else ""
        meant = _config_of(model).MEANT.get(key.rpartition(".")[2])
        longer = [name for name in known if name.startswith(f"{key}_")]
        near = [meant] if meant else longer or difflib.get_close_matches(key, known + sections, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
        raise UserError(f"{source}: there is no key {key} for model {model}{of_another}; {hint}")


@functools.cache
def _known_keys(model: str, optimizer: str | None = None) -> tuple[str, ...]:
    """Returns the full keys of a model's configuration with one optimizer; None for the options of all optimizers."""
    kinds = usable(OPTIMIZERS).values() if optimizer is None else [OPTIMIZERS[optimizer]]
    options = tuple(dict.fromkeys(option.name for kind in kinds for option in fields(kind)))
    return tuple(_keys_of(_config_of(model), options))


def _keys_of(section: type[Any], options: Sequence[str], prefix: str = "") -> Iterator[str]:
    """Yields the full keys of a section; NAME stands for the user's names in a dict of sections.

    Args:
        section: class of the section.
        options: names of the optimizer options.
        prefix: prefix of the keys.
    """
    hints = get_type_hints(section)
    for field in fields(section):
        hint = hints[field.name]
        key = f"{prefix}{field.name}"
        if hint is OptimizerConfig:
            yield from (f"{key}.{name}" for name in options)
        elif is_dataclass(hint) and isinstance(hint, type):
            yield from _keys_of(hint, options, f"{key}.")
        elif get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            yield from _keys_of(get_args(hint)[1], options, f"{key}.NAME.")
        else:
            yield key


def setting_keys() -> list[str]:
    """Returns the sorted keys of all models, without keys inside dicts of sections."""
    return sorted({key for name in usable(RECIPES) for key in _known_keys(name) if ".NAME." not in key})


def setting_choices(key: str) -> list[str]:
    """Returns the values of a key that has fixed choices in any model; empty if it has none."""
    if key == "optimizer.name":
        return list(OPTIMIZERS)
    return list(dict.fromkeys(choice for model in usable(RECIPES) for choice in choices_of(key, _config_of(model))))


def _beginnings(keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        parts = key.split(".")
        yield from (".".join(parts[:stop]) for stop in range(1, len(parts)))


def _is_among(key: str, patterns: Iterable[str]) -> bool:
    return any(pattern.fullmatch(key) for pattern in map(_pattern, patterns))


@functools.cache
def _pattern(known: str) -> re.Pattern[str]:
    """Returns the pattern of a known key, in which NAME matches any name, including names with dots."""
    return re.compile(r"\.".join(".+" if part == "NAME" else re.escape(part) for part in known.split(".")), re.DOTALL)


def _explain(error: Exception) -> str:
    """Returns the first line of omegaconf's message, with the key."""
    first_line = in_plain_words(getattr(error, "msg", None) or str(error) or type(error).__name__)
    key = getattr(error, "full_key", None)
    return f"{key}: {first_line}" if key else first_line
