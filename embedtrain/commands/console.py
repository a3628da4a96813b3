"""Shared parts of the commands: exit statuses, output, and the declaration of commands and settings."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from embedtrain.distributed.launcher import tell_launcher
from embedtrain.errors import UserError, printable

_PATIENCE_SECONDS = 5.0

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130

MAX_COLUMNS = 100
"""Maximum width of the help in columns."""

HELP_OPTIONS = ["-h", "--help"]

_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_SETTING = re.compile(r"[^=/\\]+=.*", re.DOTALL)

Function = Callable[..., Any]


class Command(click.Command):
    """A command that refuses repeated options, options without a value, and empty words, which click accepts.

    A negative number is an argument, not an option, because the id of a user may be negative.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Unknown options are passed to `parse_args` as words, which tells them from negative numbers.
        self.context_settings = {**self.context_settings, "ignore_unknown_options": True}

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Returns the names of the help option, which are the same in every context.

        click creates a command's help option only once, with the names of the first context that asks.
        """
        return list(HELP_OPTIONS)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the words of the command line after the command's name."""
        if not ctx.resilient_parsing:
            self._check(ctx, args[: args.index("--")] if "--" in args else args)
        return super().parse_args(ctx, args)

    def _check(self, ctx: click.Context, args: list[str]) -> None:
        try:
            values, left, order = self.make_parser(ctx).parse_args(list(args))
        except click.UsageError as error:
            error.ctx = ctx
            raise
        known = [name for param in self.get_params(ctx) for name in param.opts if name.startswith("-")]
        for param, count in Counter(order).items():
            if count > 1 and isinstance(param, click.Option) and not param.multiple:
                raise click.BadOptionUsage(param.opts[0], f"Option {param.opts[0]!r} is given {count} times.", ctx)
        words = list(left)
        for param in self.get_params(ctx):
            for text in _texts(values.get(str(param.name))):
                if not text:
                    raise click.BadParameter("expected a value, got ''.", ctx, param)
                if isinstance(param, click.Argument):
                    words.append(text)
                elif text in known:
                    raise click.BadOptionUsage(
                        param.opts[0], f"Option {param.opts[0]!r} requires an argument, got the option {text}.", ctx
                    )
        for word in words:
            if len(word) > 1 and word.startswith("-") and not _NEGATIVE_NUMBER.fullmatch(word):
                raise _no_such_option(word.partition("=")[0], known, ctx)


def _no_such_option(name: str, known: Sequence[str], context: click.Context) -> click.NoSuchOption:
    """Returns the error for an unknown option, with similar options, or all options if none is similar."""
    error = click.NoSuchOption(name, possibilities=known, ctx=context)
    if error.possibilities:
        return error
    return click.NoSuchOption(name, f"{error.message} The options are {', '.join(known)}.", ctx=context)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def command(*examples: str, name: str | None = None) -> Callable[[Function], Command]:
    """Declares a function as a command. Its docstring is the help, and its result is the exit status.

    Args:
        examples: example command lines at the end of the help.
        name: name of the command; None for the function's name.
    """
    return click.command(name, cls=Command, epilog=epilog(*examples))


def epilog(*examples: str) -> str:
    """Returns the end of a command's help."""
    lines = "".join(f"\n  {line}" for line in examples)
    return f"\b\nExample:{lines}"


class Setting(click.ParamType[str]):
    """The type of `key=value` words; completes keys and values."""

    name = "key=value"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Returns the matching keys or, after `=`, the key's values; keys without fixed values complete file names."""
        from embedtrain.recipes.loading import setting_choices, setting_keys

        key, equals, text = incomplete.partition("=")
        if not equals:
            return [CompletionItem(f"{each}=") for each in setting_keys() if each.startswith(key)]
        choices = setting_choices(key)
        if not choices:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(f"{key}={each}") for each in choices if each.startswith(text)]


class ConfigFile(click.Path):
    """The type of a configuration: a file or the name of a shipped configuration; also completes settings."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Returns matching settings if the word has a `.` or `=`; otherwise matching names and files."""
        from embedtrain.recipes.loading import shipped_names

        settings = Setting().shell_complete(ctx, param, incomplete) if re.search("[.=]", incomplete) else []
        names = [CompletionItem(name) for name in shipped_names() if incomplete and name.startswith(incomplete)]
        return settings or [*names, *super().shell_complete(ctx, param, incomplete)]


def run_argument(function: Function) -> Function:
    """Declares the run folder."""
    return click.argument("path", metavar="RUN", type=click.Path(file_okay=False), help="Run folder.")(function)


def table_option(function: Function) -> Function:
    """Declares which table of the run."""
    return click.option("--table", metavar="NAME", help="Table to use instead of the run's default table.")(function)


class StepType(click.ParamType["int | Literal['best', 'newest']"]):
    """The step of a checkpoint, "best" or "newest"."""

    name = "step"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["best", "newest"]:
        """Returns a number, "best" or "newest"."""
        if value in ("best", "newest"):
            return "best" if value == "best" else "newest"
        if not re.fullmatch("[0-9]{1,18}", value):
            self.fail(f"expected the step of a checkpoint, best or newest, got {value!r}.", param, ctx)
        return int(value)


def step_option(function: Function) -> Function:
    """Declares which checkpoint of the run."""
    return click.option(
        "--step",
        type=StepType(),
        metavar="N|best|newest",
        help="Checkpoint to use; best means by checkpoint.best_metric.  [default: best if kept, else newest]",
    )(function)


def settings_argument(function: Function) -> Function:
    """Declares the settings, which may stand anywhere on the line."""
    return click.argument(
        "settings", nargs=-1, type=Setting(), metavar="[KEY=VALUE]...", help="Settings that override the configuration."
    )(function)


def split_words(*words: str | Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Splits the words of a command line into paths and settings, in order.

    A word is a setting if it has a `=` without a `/` before it.
    """
    given = [word for each in words if each is not None for word in ([each] if isinstance(each, str) else each)]
    paths = [word for word in given if not _SETTING.fullmatch(word)]
    return paths, [word for word in given if _SETTING.fullmatch(word)]


def split_config(config: str | None, settings: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the configuration file, None without one, and the settings.

    Raises:
        UserError: there are several files.
    """
    paths, overrides = split_words(config, settings)
    if len(paths) > 1:
        raise UserError(f"expected one configuration and settings such as optimizer.lr=0.1, got also {paths[1]!r}")
    return (paths[0] if paths else None), overrides


def require_config(config: str | None, settings: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the configuration file and the settings.

    Raises:
        UserError: there is no file, or there are several.
    """
    path, overrides = split_config(config, settings)
    if path is None:
        raise UserError("expected a configuration, such as word2vec or a YAML file")
    return path, overrides


def require_run(path: str, settings: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the run folder and the settings of a line that names both.

    Raises:
        UserError: there is no folder, or there are several.
    """
    paths, overrides = split_words(path, settings)
    if len(paths) != 1:
        raise UserError(f"expected one run folder and settings such as data.format=csv, got {paths or 'no folder'}")
    return paths[0], overrides


def split_names(text: str | None, option: str, noun: str, *, may_repeat: bool = False) -> list[str]:
    """Splits an option's value at commas into names.

    Args:
        text: the value; None for no name.
        option: its name.
        noun: what a name stands for.
        may_repeat: whether two names may be the same.

    Raises:
        UserError: there is no name, one is empty, or two are the same and may not be.
    """
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if names and not any(names):
        raise UserError(f"{option} {text}: expected at least one {noun}")
    if not all(names) or (len(set(names)) < len(names) and not may_repeat):
        different = "" if may_repeat else "different "
        raise UserError(f"{option} {text}: expected {different}names, separated by commas")
    return names


def given_options(*names: str) -> list[str]:
    """Returns the options of the parameters `names` that the command line of the current command gives."""
    context = click.get_current_context()
    given = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return [param.opts[0] for param in context.command.params if param.name in given]


def is_debugged() -> bool:
    """Returns whether `--debug` is given."""
    return bool(click.get_current_context().find_root().params.get("debug"))


def is_first_rank() -> bool:
    """Returns whether this process prints messages before the ranks join: rank 0, or a process without a rank."""
    rank = os.environ.get("RANK", "0")
    return rank == "0" or not rank.isdecimal()


def tell(*lines: object) -> None:
    """Prints lines of a command's result to stdout; control characters and line breaks are escaped."""
    for line in lines:
        print(printable(line))


def say(text: str) -> None:
    """Prints lines for the user to stderr; control characters are escaped."""
    print(printable(text, keep="\n"), file=sys.stderr, flush=True)


class PlainFormatter(logging.Formatter):
    """Formats log records as `say` shows texts."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the text of a record."""
        return printable(super().format(record), keep="\n")


def say_once(line: str) -> None:
    """Prints once a line that every rank has, before the ranks join.

    Rank 0 prints it. torchrun kills the job when one rank exits, so the other ranks wait until rank 0 has printed. If
    a rank survives the wait, only this rank has the error, for example a file missing on its host; it prints the line.
    """
    tell_launcher(line)
    if is_first_rank():
        say(line)
        return
    time.sleep(_PATIENCE_SECONDS)
    say(f"{line} (rank {os.environ['RANK']} on {socket.gethostname()})")
