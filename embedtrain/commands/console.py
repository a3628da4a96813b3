"""What the commands share: exit statuses, lines for the user, and how a command and its settings are declared."""

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
"""Width of the help on a terminal that is as wide."""

HELP_OPTIONS = ["-h", "--help"]

_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_SETTING = re.compile(r"[^=/\\]+=.*", re.DOTALL)

Function = Callable[..., Any]


class Command(click.Command):
    """A command that refuses what click lets pass: options given twice or without their value, and empty words.

    A negative number is a word, not an option: the id of a user may be one.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Unknown options reach `parse_args` among the words, where negative numbers are told from them.
        self.context_settings = {**self.context_settings, "ignore_unknown_options": True}

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Returns the names of the help option, which are the same in every context.

        click makes a command's help option once, with the names of the context that asked first.
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
    """Returns the error for an option that does not exist, with what was meant or else with all that exist."""
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
    """Declares a function as a command; its docstring is the help, and returns what the process exits with.

    Args:
        examples: command lines that end the help.
        name: of the command; None for the function's.
    """
    return click.command(name, cls=Command, epilog=epilog(*examples))


def epilog(*examples: str) -> str:
    """Returns the end of a command's help."""
    lines = "".join(f"\n  {line}" for line in examples)
    return f"\b\nExample:{lines}"


class Setting(click.ParamType[str]):
    """`key=value`, completed by the keys there are and by the values that a key can have."""

    name = "key=value"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Returns the keys that begin so, or after `=` the values; any value may be a file's name."""
        from embedtrain.recipes.loading import setting_choices, setting_keys

        key, equals, text = incomplete.partition("=")
        if not equals:
            return [CompletionItem(f"{each}=") for each in setting_keys() if each.startswith(key)]
        choices = setting_choices(key)
        if not choices:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(f"{key}={each}") for each in choices if each.startswith(text)]


class ConfigFile(click.Path):
    """A configuration file, or the name of one that embedtrain brings; a setting in its place is completed as one."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Returns the settings that begin so, if the word names a section or a key; else names and any file."""
        from embedtrain.recipes.loading import shipped_names

        settings = Setting().shell_complete(ctx, param, incomplete) if re.search("[.=]", incomplete) else []
        names = [CompletionItem(name) for name in shipped_names() if incomplete and name.startswith(incomplete)]
        return settings or [*names, *super().shell_complete(ctx, param, incomplete)]


def run_argument(function: Function) -> Function:
    """Declares the run folder."""
    return click.argument("path", metavar="RUN", type=click.Path(file_okay=False), help="Run folder.")(function)


def table_option(function: Function) -> Function:
    """Declares which table of the run."""
    return click.option("--table", metavar="NAME", help="A table other than the one that holds the vectors.")(function)


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
        help="Which checkpoint; the best is by checkpoint.best_metric.  [default: best if kept, else newest]",
    )(function)


def settings_argument(function: Function) -> Function:
    """Declares the settings, which may stand anywhere on the line."""
    return click.argument(
        "settings", nargs=-1, type=Setting(), metavar="[KEY=VALUE]...", help="Settings that replace the file's."
    )(function)


def split_words(*words: str | Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Returns the paths among the words of a command line, and the settings, in order.

    A word is a setting if it has a `=` and no `/` before it.
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
        raise UserError(f"expected one configuration file and settings such as optimizer.lr=0.1, got {paths[1]!r} too")
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
        raise UserError(f"expected the folder of one run and settings such as data.format=csv, got {paths or 'none'}")
    return paths[0], overrides


def split_names(text: str | None, option: str, noun: str) -> list[str]:
    """Returns the names between the commas of an option's value.

    Args:
        text: the value; None for no name.
        option: its name.
        noun: what a name stands for.

    Raises:
        UserError: there is no name, one is empty, or two are the same.
    """
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if names and not any(names):
        raise UserError(f"{option} {text}: expected at least one {noun}")
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"{option} {text}: expected different names between commas")
    return names


def given_options(*names: str) -> list[str]:
    """Returns which of some parameters of the current command are given on its command line, as options."""
    context = click.get_current_context()
    given = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return [param.opts[0] for param in context.command.params if param.name in given]


def is_debugged() -> bool:
    """Returns whether `--debug` asks for tracebacks of the user's mistakes."""
    return bool(click.get_current_context().find_root().params.get("debug"))


def is_first_rank() -> bool:
    """Returns whether this process speaks for its job before the ranks join: rank 0, or a process without a rank."""
    rank = os.environ.get("RANK", "0")
    return rank == "0" or not rank.isdecimal()


def tell(*lines: object) -> None:
    """Prints lines of a command's result; characters that a terminal obeys or that end a line are shown escaped."""
    for line in lines:
        print(printable(line))


def say(text: str) -> None:
    """Prints lines for the user; characters that a terminal obeys are shown escaped."""
    print(printable(text, keep="\n"), file=sys.stderr, flush=True)


class PlainFormatter(logging.Formatter):
    """Formats log records as `say` shows texts."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the text of a record."""
        return printable(super().format(record), keep="\n")


def say_once(line: str) -> None:
    """Prints what every rank has to say alike, before the ranks join.

    Rank 0 prints it. torchrun ends the job when one rank has left, so the other ranks wait until rank 0 has printed. A
    rank that outlives that wait is alone with its trouble, such as a file that its host lacks, and prints the line too.
    """
    tell_launcher(line)
    if is_first_rank():
        say(line)
        return
    time.sleep(_PATIENCE_SECONDS)
    say(f"{line} (rank {os.environ['RANK']} on {socket.gethostname()})")
