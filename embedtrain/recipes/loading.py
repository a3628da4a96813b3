"""Reading and comparing configurations."""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

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
from embedtrain.data.stream import STANDARD_INPUT
from embedtrain.errors import UserError
from embedtrain.recipes.registry import DEFAULT_MODEL, MODELS

_MERGE_ERRORS = (OmegaConfBaseException, ValueError, TypeError, AttributeError, KeyError)
"""What omegaconf raises for values that do not fit; the last four slip through it."""


def load_config(path: str | None, overrides: Sequence[str]) -> Config:
    """Reads and checks a configuration.

    Args:
        path: a YAML file; None for the defaults.
        overrides: `key=value` each.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong; the message says what was meant.
    """
    return _to_config(read_layers(path, overrides))


@dataclass(frozen=True)
class Layers:
    """A configuration before it is checked as a whole.

    Attributes:
        merged: all keys with their values but for single tables' optimizers; "???" where one must be given and is not.
        from_file: what was given in files; of options of the optimizer, those of the one that was chosen.
        from_command: what was given after it, and replaces it.
    """

    merged: DictConfig
    from_file: Sequence[Layer]
    from_command: Sequence[Layer]

    @functools.cached_property
    def sources(self) -> Mapping[str, str]:
        """Where the value of each key was given that is not the default."""
        return {key: source for source, layer in [*self.from_file, *self.from_command] for key, _ in _flatten(layer)}

    @functools.cached_property
    def missing(self) -> list[str]:
        """The keys that must be given and are not."""
        return [key for key, value in _flatten(self.merged) if value == "???"]


def read_layers(path: str | None, overrides: Sequence[str]) -> Layers:
    """Reads a configuration as `load_config` does, of which keys that must be given may be missing.

    Raises:
        UserError: as of `load_config`, but for what concerns missing keys and several keys together.
    """
    from_file = [] if path is None else [(path, _read_yaml(path))]
    from_command = [(f"{override!r}", _parse_override(override)) for override in overrides]
    return _merge(from_file, from_command)


def resolve_layers(layers: Layers) -> DictConfig:
    """Returns a configuration in full, checked; keys that must be given and are not are "???".

    Raises:
        UserError: a value is wrong.
    """
    filled = copy.deepcopy(layers.merged)
    for key in layers.missing:
        OmegaConf.update(filled, key, "none")
    resolved = OmegaConf.structured(_to_config(replace(layers, merged=filled)))
    for key in layers.missing:
        OmegaConf.update(resolved, key, "???")
    assert isinstance(resolved, DictConfig)
    return resolved


def config_from_yaml(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the configuration that `to_yaml` wrote.

    Args:
        text: YAML.
        source: where it comes from, for messages.
        overrides: `key=value` each.

    Raises:
        UserError: a key or value is wrong.
    """
    created = OmegaConf.create(text)
    assert isinstance(created, DictConfig)
    return _to_config(
        _merge([(source, created)], [(f"{override!r}", _parse_override(override)) for override in overrides])
    )


def _merge(from_file: list[Layer], from_command: list[Layer]) -> Layers:
    with _explained():
        return _merge_explained(from_file, from_command)


def _merge_explained(from_file: list[Layer], from_command: list[Layer]) -> Layers:
    model = _model_of([*from_file, *from_command])
    default = model().optimizer
    optimizer = optimizer_of(from_file, default)
    if (chosen := optimizer_of(from_command, optimizer)).name != optimizer.name:
        # Another optimizer than the file's: what the file says of that one's formula is not meant for this one.
        from_file = [(source, for_another_optimizer(layer)) for source, layer in from_file]
    layers = [*from_file, *from_command]
    merged = OmegaConf.structured(model)
    merged.optimizer = default if chosen.name == default.name else chosen
    for source, layer in layers:
        refuse_options_of_others((source, layer), chosen)
        _refuse_unknown_keys(source, layer, model)
        try:
            merged = OmegaConf.merge(merged, without_tables(layer))
        except _MERGE_ERRORS as error:
            raise UserError(f"{source}: {_explain(error)}") from error
    assert isinstance(merged, DictConfig)
    return Layers(merged, from_file, from_command)


def _to_config(layers: Layers) -> Config:
    with _explained():
        config: Config = OmegaConf.to_object(layers.merged)  # type: ignore[assignment]
        main, default = config.optimizer, type(config)().optimizer
        main.tables = table_optimizers(layers.from_file, layers.from_command, main, default)
    config.check()
    return config


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what omegaconf raises into what a user reads."""
    try:
        yield
    except UserError:
        raise
    except _MERGE_ERRORS as error:
        raise UserError(_explain(error)) from error


def to_yaml(config: Config) -> str:
    """Returns the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differing_keys(first_yaml: str, second_yaml: str, may_change: tuple[str, ...] = ()) -> list[str]:
    """Returns the keys in which two resolved configurations differ, of those that define what is trained.

    Args:
        first_yaml: the configuration that was.
        second_yaml: the configuration that is.
        may_change: beginnings of further keys that may differ.
    """
    first, second = (dict(_flatten(OmegaConf.create(text))) for text in (first_yaml, second_yaml))
    may_change = (*MODELS[second["model"]].MAY_CHANGE, *may_change)
    return [
        f"{key} (was {first.get(key, 'absent')}, is {second.get(key, 'absent')})"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key) and not key.startswith(may_change)
    ]


def _read_yaml(path: str) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no configuration file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a configuration: {error}") from error
    except Exception as error:  # yaml's own errors have no common base that omegaconf exports
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: expected keys and values, got a list")
    return loaded


def _parse_override(override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"expected key=value, such as optimizer.lr=0.1, got {override!r}")
    if value == STANDARD_INPUT:
        override = f"{key}='{value}'"  # to YAML a bare one is a list
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:
        raise UserError(f"{override!r} is not a key and a value: {' '.join(str(error).split())}") from error


def _model_of(layers: Sequence[Layer]) -> type[Config]:
    """Returns the configuration class of the model that the layers ask for."""
    name, named_in = DEFAULT_MODEL, ""
    for source, layer in layers:
        if "model" in layer:
            name, named_in = layer["model"], source
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(f"{named_in}: there is no model {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def _refuse_unknown_keys(source: str, layer: DictConfig, model: type[Config]) -> None:
    known = list(_known_keys(_name_of(model)))
    sections = list(dict.fromkeys(_beginnings(known)))
    for key, _ in _flatten(layer):
        if key.startswith(f"{TABLES}.") or _is_among(key, [*known, *sections]):
            continue  # the options of single tables depend on their optimizer, and are refused with it
        owners = [name for name in MODELS if _is_among(key, _known_keys(name))]
        of_another = f" (it is one of model {' and '.join(owners)})" if owners else ""
        meant = model.MEANT.get(key.rpartition(".")[2])
        near = [meant] if meant else difflib.get_close_matches(key, known + sections, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
        raise UserError(f"{source}: there is no key {key} for model {_name_of(model)}{of_another}; {hint}")


def _name_of(model: type[Config]) -> str:
    return next(name for name, known in MODELS.items() if known is model)


@functools.cache
def _known_keys(model: str) -> tuple[str, ...]:
    """Returns the full keys of a model's configuration, as `_keys_of` yields them."""
    return tuple(_keys_of(MODELS[model]))


def _keys_of(section: type[Any], prefix: str = "") -> Iterator[str]:
    """Yields the full keys of a section; NAME stands for what the user calls each entry of a dict of sections."""
    hints = get_type_hints(section)
    for field in fields(section):
        hint = hints[field.name]
        key = f"{prefix}{field.name}"
        if hint is OptimizerConfig:
            names = {option.name: None for kind in OPTIMIZERS.values() for option in fields(kind)}
            yield from (f"{key}.{name}" for name in names)
        elif is_dataclass(hint) and isinstance(hint, type):
            yield from _keys_of(hint, f"{key}.")
        elif get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            yield from _keys_of(get_args(hint)[1], f"{key}.NAME.")
        else:
            yield key


def setting_keys() -> list[str]:
    """Returns the keys of all models, in order; of the entries of a dict of sections none."""
    return sorted({key for name in MODELS for key in _known_keys(name) if ".NAME." not in key})


def _beginnings(keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        parts = key.split(".")
        yield from (".".join(parts[:stop]) for stop in range(1, len(parts)))


def _is_among(key: str, patterns: Iterable[str]) -> bool:
    parts = key.split(".")
    return any(
        len(parts) == len(pattern) and all(p in (part, "NAME") for p, part in zip(pattern, parts, strict=True))
        for pattern in (known.split(".") for known in patterns)
    )


def _explain(error: Exception) -> str:
    """Returns the first line of omegaconf's message, with the key."""
    first_line = (getattr(error, "msg", None) or str(error) or type(error).__name__).splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {first_line}" if key else first_line


def _flatten(node: Any) -> Iterator[tuple[str, Any]]:
    """Yields the full keys of what is given, with values as they were written: "???" and "${...}" among them."""
    return _flatten_plain(OmegaConf.to_container(node, resolve=False), "")


def _flatten_plain(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        full_key = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten_plain(value, f"{full_key}.")
        else:
            yield full_key, value
