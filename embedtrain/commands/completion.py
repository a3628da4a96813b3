"""The command that prints a script by which a shell completes the others."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import shtab

from embedtrain.commands.console import EXIT_DONE, Commands, add_command
from embedtrain.recipes.loading import setting_keys

_SHELLS = ("bash", "zsh")
_FILES = ("config", "CONFIG", "FILE", "PATH")
_FOLDERS = ("A", "B", "RUN")
_SETTINGS = "key=value"


def add_completion(commands: Commands, build_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Declares the command; `build_parser` gives all commands, this one too."""
    completion = add_command(
        commands,
        "completion",
        "print a script by which your shell completes commands, options and settings",
        "embedtrain completion bash > ~/.local/share/bash-completion/completions/embedtrain\n"
        'embedtrain completion zsh > "${fpath[1]}/_embedtrain"',
    )
    completion.add_argument("shell", choices=_SHELLS, help="which shell")
    completion.set_defaults(run=lambda options: _print_script(options.shell, build_parser()))


def _print_script(shell: str, parser: argparse.ArgumentParser) -> int:
    settings = {"bash": "_embedtrain_settings", "zsh": "_embedtrain_settings"}
    for action in _actions(parser):
        name = action.metavar or action.dest
        if name in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif name in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif name == _SETTINGS:
            action.complete = settings  # type: ignore[attr-defined]
    keys = " ".join(setting_keys())
    preamble = {
        "bash": f'_embedtrain_settings() {{\n  compgen -W "{keys}" -- "$1"\n}}\n',
        "zsh": f"_embedtrain_settings() {{\n  compadd -S = -- {keys}\n}}\n",
    }
    print(shtab.complete(parser, shell=shell, preamble=preamble[shell]))
    return EXIT_DONE


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
