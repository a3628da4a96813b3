"""Malformed command lines and configurations, and what a run folder must look like after them."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import string
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from embedtrain.cli import main
from embedtrain.recipes.loading import setting_keys

STRANGE = [
    "",
    " ",
    "=",
    "null",
    "none",
    "nan",
    "-inf",
    ".nan",
    "-1",
    "0",
    "1.5",
    "1e400",
    "10000000000000000000000",
    "true",
    "[]",
    "[1, 2",
    "[[1]]",
    "{}",
    "{a: 1}",
    "{a: [",
    "${run.path}",
    "${nowhere}",
    "${oc.env:NOWHERE}",
    "???",
    "*",
    "&a",
    "!!python/object:os.system {}",
    "a b",
    "\t",
    "\n",
    "é",
    "日本",
    "\udcff",
    "'",
    '"',
    "--",
    "-",
    "../..",
    ".",
    "s3:/",
    "file://",
    "memory://x",
    "nosuch://x",
    "2024-01-01",
    "0x1F",
    "1_000",
    "a=b=c",
    "%s",
    "x" * 5000,
]
"""Values that tend to break what reads them."""


@dataclass(frozen=True)
class Command:
    """A command line that works, to be spoilt.

    Attributes:
        arguments: of the command line.
        fixed: how many of the first arguments stay; without them every line would end at the parser.
    """

    arguments: Sequence[str]
    fixed: int = 1


def spoilt(command: Command, generator: random.Random) -> list[str]:
    """Returns the arguments with one to three faults."""
    arguments = list(command.arguments)
    fixed = command.fixed if generator.random() < 0.9 else 0
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        generator.choice(_FAULTS)(arguments, fixed, generator)
    return arguments


def _drop(arguments: list[str], fixed: int, generator: random.Random) -> None:
    if len(arguments) > fixed:
        del arguments[generator.randrange(fixed, len(arguments))]


def _repeat(arguments: list[str], fixed: int, generator: random.Random) -> None:
    if len(arguments) > fixed:
        arguments.insert(len(arguments), arguments[generator.randrange(fixed, len(arguments))])


def _swap(arguments: list[str], fixed: int, generator: random.Random) -> None:
    if len(arguments) > fixed + 1:
        i, j = (generator.randrange(fixed, len(arguments)) for _ in range(2))
        arguments[i], arguments[j] = arguments[j], arguments[i]


def _replace(arguments: list[str], fixed: int, generator: random.Random) -> None:
    if len(arguments) > fixed:
        arguments[generator.randrange(fixed, len(arguments))] = generator.choice(STRANGE)


def _insert(arguments: list[str], fixed: int, generator: random.Random) -> None:
    arguments.insert(generator.randint(fixed, len(arguments)), generator.choice([*STRANGE, "--top", "--table", "--no"]))


def _misspell(arguments: list[str], fixed: int, generator: random.Random) -> None:
    if len(arguments) > fixed:
        place = generator.randrange(fixed, len(arguments))
        text = list(arguments[place])
        if text:
            text[generator.randrange(len(text))] = generator.choice(string.printable)
        arguments[place] = "".join(text)


def _change_value(arguments: list[str], fixed: int, generator: random.Random) -> None:
    places = [place for place, argument in enumerate(arguments) if place >= fixed and "=" in argument]
    if places:
        place = generator.choice(places)
        key = arguments[place].partition("=")[0]
        arguments[place] = f"{key}={generator.choice(STRANGE)}"


def _add_setting(arguments: list[str], fixed: int, generator: random.Random) -> None:
    key = generator.choice(setting_keys())
    if generator.random() < 0.2:
        key = generator.choice([f"{key}.x", key.rpartition(".")[0], key.upper(), f"{key} ", f".{key}", f"{key}[0]"])
    arguments.append(f"{key}={generator.choice(STRANGE)}")


_FAULTS: list[Callable[[list[str], int, random.Random], None]] = [
    _drop,
    _repeat,
    _swap,
    _replace,
    _insert,
    _misspell,
    _change_value,
    _change_value,
    _add_setting,
    _add_setting,
]


def spoilt_file(text: str, generator: random.Random) -> bytes:
    """Returns a YAML file with a fault: of its bytes, its lines or its values."""
    kind = generator.randrange(4)
    if kind == 0:
        data = bytearray(text.encode())
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        return bytes(data)
    lines = text.splitlines()
    place = generator.randrange(len(lines))
    if kind == 1:
        lines[place] = generator.choice(["  " + lines[place], lines[place].strip(), "", lines[place] * 2])
    elif kind == 2:
        lines.insert(place, generator.choice([*STRANGE, "- a", "a: b: c", "%YAML 9", "---", "...", "key", "? x"]))
    else:
        document = yaml.safe_load(text)
        section = generator.choice([document, *(value for value in document.values() if isinstance(value, dict))])
        key = generator.choice(list(section))
        section[key] = generator.choice([None, -1, [], {}, [[]], {"a": {"b": 1}}, 10**30, float("nan"), 1.5, "x", True])
        return yaml.safe_dump(document, allow_unicode=True).encode()
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Outcome:
    """What a command line did.

    Attributes:
        status: exit status; None where an error went through `main`.
        printed: what the user saw.
        error: what went through.
    """

    status: int | None
    printed: str
    error: BaseException | None = None


def call(arguments: Sequence[str]) -> Outcome:
    """Runs a command in this process, as the program does."""
    status, error = None, None
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            status = main(list(arguments))
        except BaseException as raised:
            error = raised
        output.seek(0)
        return Outcome(status, output.read(), error)


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def half_written(folder: Path) -> Iterator[str]:
    """Yields the files below a folder that were begun and not finished."""
    for path in folder.rglob("*"):
        if path.name.endswith((".tmp", ".partial")) or path.name.startswith("owner-"):
            yield str(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line)


def restore(folder: Path, kept: Path) -> None:
    """Puts a folder back as it was."""
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
