"""The optimizers that the layers of a configuration choose, for all tables and for single tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from embedtrain.config.optimizer import FOR_ALL_OPTIMIZERS, FOR_ALL_TABLES, OPTIMIZERS, OptimizerConfig
from embedtrain.config.values import flatten, in_plain_words, shield, unshield
from embedtrain.errors import UserError
from embedtrain.optim.registry import usable

Layer = tuple[str, Mapping[str, Any]]
"""The source of keys and values, for messages, and the keys and values as nested dicts."""

TABLES = "optimizer.tables"


def optimizer_of(layers: Sequence[Layer], default: OptimizerConfig) -> OptimizerConfig:
    """Returns the section of the optimizer that the layers choose, with default values."""
    name, named_in = default.name, ""
    for source, layer in layers:
        section = layer.get("optimizer")
        if isinstance(section, dict) and "name" in section:
            name, named_in = section["name"], source
    if name == default.name:
        return default
    return _kind_of(name, named_in)()


def for_another_optimizer(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a layer without the settings that are specific to its optimizer.

    These are the learning rate, the options of the formula, and the tables without an optimizer name.
    """
    section = layer.get("optimizer")
    if not isinstance(section, dict):
        return layer
    tables = _options_of([("", layer)])
    named = {table: given for table, given in tables.items() if any(one.option == "name" for one in given)}
    own = {key: value for key, value in section.items() if key in FOR_ALL_OPTIMIZERS}
    own["tables"] = {table: {one.option: one.value for one in given} for table, given in named.items()}
    return {**layer, "optimizer": own}


def without_tables(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a layer without its settings of single tables, which `table_optimizers` reads."""
    section = layer.get("optimizer")
    if not isinstance(section, dict) or "tables" not in section:
        return layer
    return {**layer, "optimizer": {key: value for key, value in section.items() if key != "tables"}}


def refuse_options_of_others(layer: Layer, optimizer: OptimizerConfig) -> None:
    """Refuses an option that only other optimizers have, and names them.

    Raises:
        UserError: there is one.
    """
    source, content = layer
    section = content.get("optimizer")
    for key in section if isinstance(section, dict) else ():
        _refuse_option_of_others(source, key, optimizer, "")


def table_optimizers(
    from_file: Sequence[Layer], from_command: Sequence[Layer], main: OptimizerConfig, default: OptimizerConfig
) -> dict[str, dict[str, Any]]:
    """Returns the name and all options of the optimizer of each single table, by table name.

    An entry with the main optimizer overrides the main optimizer's options. An entry with another optimizer
    overrides that optimizer's default values.

    Args:
        from_file: settings of the file.
        from_command: settings of the command line; a name there replaces the file's name and options.
        main: the optimizer of all other tables.
        default: the model's default optimizer, with the model's default values.

    Raises:
        UserError: an entry is not a section of options, or an option does not exist or has the wrong type.
    """
    in_file, in_command = _options_of(from_file), _options_of(from_command)
    found = {}
    for table in {**in_file, **in_command}:
        earlier, later = in_file.get(table, []), in_command.get(table, [])
        name, named_in = _name_of(earlier, (main.name, ""))
        last_name, last_named_in = _name_of(later, (name, named_in))
        if last_name != name:
            earlier = []
        kind = _kind_of(last_name, last_named_in)
        known = {one.name: one.row_options() for one in (default, main)}
        section = OmegaConf.structured(kind(**known.get(last_name, {})))
        for given in [*earlier, *later]:
            section = _with_option(section, kind(), table, given)
        own = unshield(OmegaConf.to_object(section))
        assert isinstance(own, OptimizerConfig)
        found[table] = own.row_options()
    return found


class _Given(NamedTuple):
    source: str
    option: str
    value: Any


def _options_of(layers: Iterable[Layer]) -> dict[str, list[_Given]]:
    """Returns the options of each table. A table's name may contain dots, which separate keys on a command line."""
    found: dict[str, list[_Given]] = {}
    for source, layer in layers:
        section = layer.get("optimizer")
        tables = section.get("tables") if isinstance(section, dict) else None
        if tables is None:
            continue
        if not isinstance(tables, dict):
            raise UserError(f"{source}: expected {TABLES}.TABLE.OPTION=VALUE, got {TABLES}={tables}")
        for key, value in flatten(tables):
            table, _, option = key.rpartition(".")
            if not table:
                raise UserError(f"{source}: expected {TABLES}.{key}.OPTION=VALUE, such as lr, got {value!r}")
            found.setdefault(table, []).append(_Given(source, option, value))
    return found


def _name_of(given: Sequence[_Given], default: tuple[Any, str]) -> tuple[Any, str]:
    names = [(one.value, one.source) for one in given if one.option == "name"]
    return names[-1] if names else default


def _with_option(section: DictConfig, kind: OptimizerConfig, table: str, given: _Given) -> DictConfig:
    key = f"{TABLES}.{table}.{given.option}"
    own = list(kind.row_options())
    if given.option in FOR_ALL_TABLES:
        raise UserError(
            f"{given.source}: {key}: {given.option} applies to all tables together: set optimizer.{given.option}"
        )
    _refuse_option_of_others(given.source, given.option, kind, f"{TABLES}.{table}: ")
    if given.option not in own:
        near = difflib.get_close_matches(given.option, own, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the options of {kind.name} are {', '.join(own)}"
        raise UserError(f"{given.source}: there is no key {key}; {hint}")
    try:
        merged = OmegaConf.merge(section, {given.option: shield(given.value)})
    except OmegaConfBaseException as error:
        raise UserError(f"{given.source}: {key}: {in_plain_words(error.msg or str(error))}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _refuse_option_of_others(source: str, key: str, optimizer: OptimizerConfig, where: str) -> None:
    own = [field.name for field in fields(optimizer)]
    if key in own:
        return
    owners = [name for name, kind in usable(OPTIMIZERS).items() if key in [field.name for field in fields(kind)]]
    if owners:
        raise UserError(
            f"{source}: {where}the optimizer {optimizer.name} has no option {key}, {' and '.join(owners)} "
            f"{'has' if len(owners) == 1 else 'have'}; its own are {', '.join(own)}"
        )


def _kind_of(name: Any, named_in: str) -> type[OptimizerConfig]:
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise UserError(f"{named_in}: there is no optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]
