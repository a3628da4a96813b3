"""`embedtrain config`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from embedtrain.commands.console import EXIT_DONE, ConfigFile, command, epilog, settings_argument, split_config, tell

_EXAMPLES = ("embedtrain config show word2vec optimizer.lr=0.1", "embedtrain config show model=ranking")


@click.group(no_args_is_help=False, epilog=epilog(*_EXAMPLES))
def config() -> None:
    """Shows a configuration in full, and where values were given."""


@command(*_EXAMPLES)
@click.argument("config", required=False, type=ConfigFile(), help="YAML file; without one, the defaults.")
@settings_argument
def show(config: str | None, settings: Sequence[str]) -> int:
    """Shows a configuration in full, and where values were given."""
    from embedtrain.recipes.showing import show_config

    tell(*show_config(*split_config(config, settings)).split("\n"))
    return EXIT_DONE


config.add_command(show)
