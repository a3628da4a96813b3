"""Parsing values of settings: keys of type text take the text as written, other keys take a YAML value."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"
_QUOTED_NULL = re.compile(r"""(["'])(["']*null["']*)\1""")
_ITEM = re.compile(r"""\s*(?:"([^"]*)"\s*(?=,|$)|'([^']*)'\s*(?=,|$)|([^,]*))(?:,|$)""")
_MISREAD = re.compile(r"[-+]?0[0-7_]+|.*:.*")
"""Integers of YAML that mislead: octal ones, and sexagesimal ones such as 1:30."""
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)?")
_MAX_NODES = 100_000
"""Maximum number of values in a document, counting the values behind each alias."""


class Unset(str):
    """A plain `???` in a YAML file: the key must be given elsewhere. A quoted one is a text."""


def compose(text: str) -> yaml.Node | None:
    """Parses a YAML document into a node for `read`; None for an empty document.

    Raises:
        ValueError: the text is not valid YAML, or its aliases stand for too many values.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        # Nested aliases stand for exponentially many values ("billion laughs").
        if node is not None and "*" in text and _count(node, {}) > _MAX_NODES:
            raise ValueError(f"this YAML stands for more than {_MAX_NODES:,} values, because of its aliases (*name)")
        return node
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ValueError(f"this is not valid YAML: {error.problem}{line}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"this is not valid YAML: {' '.join(str(error).split())}") from error


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Returns the number of values of a node, counting the values behind aliases."""
    if id(node) not in known:
        # A recursive alias counts as 0 here: `read` refuses it.
        known[id(node)] = 0
        below = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        is_collection = isinstance(node, yaml.CollectionNode)
        known[id(node)] = 1 + (sum(_count(each, known) for each in below) if is_collection else 0)
    return known[id(node)]


def read(node: yaml.Node | None, hint: Any, key: str = "") -> Any:
    """Returns the value of a YAML node for a key.

    Names, and values of keys of type text, are returned as written: `on`, `01` and `2024-01-01` are texts.

    Args:
        node: node of the value.
        hint: type annotation of the key; None if unknown.
        key: full name of the key, for messages.

    Raises:
        ValueError: the node cannot be a value of the key.
    """
    if node is None:
        return None
    if node.tag not in yaml.SafeLoader.yaml_constructors:
        raise ValueError(f"the YAML tag {node.tag} at {key or 'the beginning'} is not supported: quote the text")
    if isinstance(node, yaml.MappingNode):
        return _read_mapping(node, hint, key)
    if _section_of(hint) is not None and node.tag != _NULL:
        raise ValueError(f"{key} is a section: expected keys and values in it, got {_shown(node)}")
    if isinstance(node, yaml.SequenceNode):
        item = next((get_args(each)[0] for each in _members(hint) if get_origin(each) is list), None)
        if item is not str:
            return [read(each, item, key) for each in node.value]
        if not all(isinstance(each, yaml.ScalarNode) for each in node.value):
            raise ValueError(f"{key}: expected a list of texts, such as [a, b], got lists or names in it")
        return [each.value for each in node.value]
    if node.tag == _NULL:
        return _null(hint, key, '"null"')
    if node.value == "???" and node.style is None:
        return Unset(node.value)
    if any(map(_is_text, _members(hint))):
        return node.value
    if any(get_origin(each) is list for each in _members(hint)):
        raise ValueError(f"{key}: expected a list such as [{node.value or 'a,b'}], got {node.value!r}")
    value = _construct(lambda loader: loader.construct_object(node, deep=True))
    _require_kind(value, node, hint, key)
    return value


def _require_kind(value: Any, node: yaml.ScalarNode, hint: Any, key: str) -> None:
    """Checks that the value of a key of numbers is a number, and of a boolean key true or false.

    Raises:
        ValueError: the value has the wrong type, or is an integer that YAML reads in another base.
    """
    kinds = {bool: "true or false", int: "an integer", float: "a number"}
    wanted = [kind for kind in kinds if kind in _members(hint)]
    if not wanted:
        return
    if isinstance(value, int) and not isinstance(value, bool) and _MISREAD.fullmatch(node.value):
        raise ValueError(f"{key}: YAML reads {node.value} as {value}: write the number without a leading 0 or a colon")
    if type(value) in wanted or (type(value) is int and float in wanted):
        return
    if isinstance(value, str) and wanted != [bool]:
        # YAML reads 1e-3, without a decimal point, as a text.
        with suppress(ValueError):
            float(value) if float in wanted else int(value)
            return
    or_null = " or null" if NoneType in _members(hint) else ""
    raise ValueError(f"{key}: expected {' or '.join(kinds[kind] for kind in wanted)}{or_null}, got {node.value!r}")


def _section_of(hint: Any) -> type[Any] | None:
    """Returns the class of a key that is a section; None if the key has a value."""
    return next((each for each in _members(hint) if isinstance(each, type) and is_dataclass(each)), None)


def _shown(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value)


def read_override(key: str, text: str, section: type[Any]) -> dict[str, Any]:
    """Parses `key=text` of a command line into nested names and a value.

    Raises:
        ValueError: the text cannot be a value of the key.
    """
    parts, hint = _resolve(key.split("."), section)
    if not all(parts):
        raise ValueError(f"the key {key!r} has an empty name")
    value = _read_text(key, text, hint)
    for part in reversed(parts):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _read_text(key: str, text: str, hint: Any) -> Any:
    members = _members(hint)
    has_lists = list[str] in members
    if not has_lists and not any(map(_is_text, members)):
        value = read(compose(text), hint, key)
        return str(value) if isinstance(value, Unset) else value
    if text == "null":
        return _null(hint, key, f"{key}=\"'null'\" in a shell")
    if _QUOTED_NULL.fullmatch(text):
        return text[1:-1]
    if has_lists and text.startswith("[") and text.endswith("]"):
        return _items(text[1:-1])
    if not any(map(_is_text, members)):
        raise ValueError(f"{key}: expected a list such as [a,b], got {text!r}")
    return text


def _items(text: str) -> list[str]:
    """Splits a list of texts at commas, removing surrounding spaces and quotes."""
    items = []
    place = 0
    while place < len(text):
        found = _ITEM.match(text, place)
        assert found is not None, "the last alternative matches any text"
        double, single, plain = found.groups()
        items.append(plain.strip() if plain is not None else double if double is not None else single)
        place = found.end()
    # As in YAML, a trailing comma is allowed.
    return items[:-1] if items and items[-1] == "" and not text.rstrip().endswith(('"', "'")) else items


def _null(hint: Any, key: str, quoted: str) -> None:
    members = _members(hint)
    if _section_of(hint) is not None:
        raise ValueError(f"{key} is a section: expected keys and values in it, got null")
    if str in members and NoneType not in members:
        raise ValueError(f"{key} must be given and cannot be null; for the text null write {quoted}")


def _read_mapping(node: yaml.MappingNode, hint: Any, key: str) -> dict[str, Any]:
    given = [name.value for name, _ in node.value if name.tag != _MERGE]
    if wrong := [name for name in given if not isinstance(name, str)]:
        raise ValueError(f"expected names as keys{f' of {key}' if key else ''}, got {wrong[0]}")
    if twice := [name for place, name in enumerate(given) if name in given[:place]]:
        raise ValueError(f"{key}{'.' if key else ''}{twice[0]} is given twice")
    _construct(lambda loader: loader.flatten_mapping(node))
    return {
        name.value: read(value, _hint_of(hint, name.value), f"{key}{'.' if key else ''}{name.value}")
        for name, value in node.value
    }


def _construct(use: Callable[[yaml.SafeLoader], Any]) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return use(loader)
    except (yaml.YAMLError, AttributeError, TypeError) as error:  # PyYAML does not wrap the last two exceptions.
        raise ValueError(f"this is not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _members(hint: Any) -> Sequence[Any]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_text(hint: Any) -> bool:
    return hint is str or get_origin(hint) is Literal


@functools.cache
def _hints(section: type[Any]) -> Mapping[str, Any]:
    return get_type_hints(section)


def _hint_of(hint: Any, name: str) -> Any:
    """Returns the type annotation of the value under a name; None if unknown."""
    for each in _members(hint):
        if isinstance(each, type) and is_dataclass(each):
            return _hints(each).get(name)
        if get_origin(each) is dict:
            return get_args(each)[1]
    return None


def _resolve(parts: list[str], section: type[Any]) -> tuple[list[str], Any]:
    """Splits a key into names, and returns its type annotation; the name of a dict's entry may contain dots."""
    names: list[str] = []
    hint: Any = section
    while parts:
        length = 1
        if get_origin(hint) is dict and isinstance(entry := get_args(hint)[1], type) and is_dataclass(entry):
            has_field = len(parts) > 1 and parts[-1] in _hints(entry)
            length = len(parts) - 1 if has_field else len(parts)
        names.append(".".join(parts[:length]))
        hint = _hint_of(hint, names[-1])
        parts = parts[length:]
    return names, hint


def choices_of(key: str, section: type[Any]) -> list[str]:
    """Returns the possible values of a section's key, if it has a fixed set."""
    members = _members(_resolve(key.split("."), section)[1])
    named = [str(choice) for each in members if get_origin(each) is Literal for choice in get_args(each)]
    switches = ["true", "false"] if bool in members else []
    return [*named, *switches, *(["null"] if (named or switches) and NoneType in members else [])]


def shield(value: Any) -> Any:
    """Escapes texts with a meaning in omegaconf: `${...}` is a reference, `???` a missing value.

    Includes the values of lists and dicts; `unshield` reverts it.
    """
    if isinstance(value, Unset):
        return str(value)
    if isinstance(value, str):
        return value.replace("%", "%25").replace("$", "%24").replace("?", "%3F")
    if isinstance(value, list):
        return [shield(each) for each in value]
    if isinstance(value, dict):
        return {name: shield(each) for name, each in value.items()}
    return value


def unshield(value: Any) -> Any:
    """Reverts `shield`; the fields of a section are replaced in place."""
    if isinstance(value, str):
        return value.replace("%3F", "?").replace("%24", "$").replace("%25", "%")
    if isinstance(value, list):
        return [unshield(each) for each in value]
    if isinstance(value, dict):
        return {name: unshield(each) for name, each in value.items()}
    if is_dataclass(value):
        for field in fields(value):
            setattr(value, field.name, unshield(getattr(value, field.name)))
    return value


def in_plain_words(message: str) -> str:
    """Returns the first line of an omegaconf message in this package's wording."""
    message = unshield(message.splitlines()[0])
    if found := re.fullmatch(r"Value '(.*)' of type '.*' could not be converted to (\w+)", message):
        kinds = {"Float": "a number", "Integer": "an integer", "Boolean": "true or false"}
        return f"expected {kinds.get(found[2], found[2])}, got {found[1]!r}"
    if found := re.fullmatch(r"Invalid value '(.*)', expected one of \[(.*)\]", message):
        return f"expected one of {found[2].replace(chr(39), '')}, got {found[1]!r}"
    if re.fullmatch("Incompatible value 'None' for field of type .*", message):
        return "expected a value, got null"
    return message


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the full key of each value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no annotations
    """Quotes texts that would be read as something else: numbers such as 1e3, and U+0085, a line end in YAML."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        is_read_otherwise = _NUMBER.fullmatch(text) or (text == "???" and not isinstance(text, Unset))
        style = '"' if "\x85" in text else "'" if is_read_otherwise else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(Unset, _Dumper.represent_text)


def dump(settings: Mapping[str, Any]) -> str:
    """Returns settings as YAML that `read` parses into the same settings."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)  # type: ignore[no-any-return]


def settings_of(config: Any) -> dict[str, Any]:
    """Returns all keys of a configuration with their values, as JSON."""
    return asdict(config)
