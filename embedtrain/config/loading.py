"""Reading and comparing configurations."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
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
from embedtrain.config.models import DEFAULT_MODEL, MODELS
from embedtrain.config.optimizer import OPTIMIZERS, OptimizerConfig
from embedtrain.config.sections import Config
from embedtrain.data.stream import STANDARD_INPUT
from embedtrain.errors import UserError


def load_config(path: str | None, overrides: Sequence[str]) -> Config:
    """Reads and checks a configuration.

    Args:
        path: a YAML file; None for the defaults.
        overrides: `key=value` each.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong; the message says what was meant.
    """
    from_file = [] if path is None else [(path, _read_yaml(path))]
    from_command = [(f"{override!r}", _parse_override(override)) for override in overrides]
    return _compose(from_file, from_command)


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
    return _compose([(source, created)], [(f"{override!r}", _parse_override(override)) for override in overrides])


def _compose(from_file: list[Layer], from_command: list[Layer]) -> Config:
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
        except OmegaConfBaseException as error:
            raise UserError(f"{source}: {_explain(error)}") from error
    try:
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error
    config.optimizer.tables = table_optimizers(from_file, from_command, config.optimizer)
    config.check()
    return config


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
    known = list(_keys_of(model))
    sections = list(dict.fromkeys(_beginnings(known)))
    for key, _ in _flatten(layer):
        if key.startswith(f"{TABLES}.") or _is_among(key, [*known, *sections]):
            continue  # the options of single tables depend on their optimizer, and are refused with it
        owners = [name for name, other in MODELS.items() if _is_among(key, list(_keys_of(other)))]
        of_another = f" (it is one of model {' and '.join(owners)})" if owners else ""
        meant = model.MEANT.get(key.rpartition(".")[2])
        near = [meant] if meant else difflib.get_close_matches(key, known + sections, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
        raise UserError(f"{source}: there is no key {key} for model {_name_of(model)}{of_another}; {hint}")


def _name_of(model: type[Config]) -> str:
    return next(name for name, known in MODELS.items() if known is model)


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


def _explain(error: OmegaConfBaseException) -> str:
    """Returns the first line of omegaconf's message, with the key."""
    first_line = (error.msg or str(error)).splitlines()[0]
    return f"{error.full_key}: {first_line}" if error.full_key else first_line


def _flatten(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key in node:
        full_key = f"{prefix}{key}"
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(value, DictConfig):
            yield from _flatten(value, f"{full_key}.")
        else:
            yield full_key, value
