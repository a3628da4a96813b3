"""`embedtrain completion`."""

from __future__ import annotations

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
)

from embedtrain.commands.console import EXIT_DONE, command


def _edited(script: str, *edits: tuple[str, str]) -> str:
    """Returns a script of click with parts replaced; raises if this version of click has another script."""
    for old, new in edits:
        assert old in script, f"expected {old!r} in click's script for the completion"
        script = script.replace(old, new)
    return script


@add_completion_class
class SettingsInBash(BashComplete):
    """Click's completion in bash for words such as key=value, which bash splits into three words."""

    source_template = _edited(
        BashComplete.source_template,
        ("COMPREPLY+=($value)", "COMPREPLY+=($value); [[ $value == *= ]] && compopt -o nospace"),
    )

    def get_completion_args(self) -> tuple[list[str], str]:
        """Returns the complete words, and the incomplete one."""
        words, incomplete = super().get_completion_args()
        if incomplete == "=" and words:
            return words[:-1], f"{words[-1]}="
        if words[-1:] == ["="] and len(words) > 1:
            return words[:-2], f"{words[-2]}={incomplete}"
        return words, incomplete

    def format_completion(self, item: CompletionItem) -> str:
        """Returns a line for the script; for key=value only the value, which bash treats as the last word."""
        _, equals, value = item.value.partition("=")
        return f"{item.type},{value if equals and value else item.value}"


@add_completion_class
class SettingsInZsh(ZshComplete):
    """Click's completion in zsh, with the name of a file after `key=`, and without a space after it."""

    source_template = _edited(
        ZshComplete.source_template,
        ("            _path_files -f", "            [[ -prefix *= ]] && compset -P '*='\n            _path_files -f"),
        ("compadd -U -V unsorted -a completions", "compadd -U -V unsorted -S '' -a completions"),
    )


@add_completion_class
class SettingsInFish(FishComplete):
    """Click's completion in fish, with the name of a file after `key=`."""

    source_template = _edited(
        FishComplete.source_template,
        (
            "__fish_complete_path $metadata[2];",
            "set -l key (string match -r '^[^/=]+=' -- $metadata[2]);\n            printf '%%s\\n' "
            "\"$key\"(__fish_complete_path (string replace -r '^[^/=]+=' '' -- $metadata[2]));",
        ),
    )


@command(
    "embedtrain completion bash > ~/.local/share/bash-completion/completions/embedtrain",
    'embedtrain completion zsh > "${fpath[1]}/_embedtrain"',
    "embedtrain completion fish > ~/.config/fish/completions/embedtrain.fish",
)
@click.argument("shell", metavar="SHELL", type=click.Choice(("bash", "zsh", "fish")), help="bash, zsh or fish.")
def completion(shell: str) -> int:
    """Prints a completion script for a shell."""
    kind = get_completion_class(shell)
    assert kind is not None, "click has these shells"
    program = click.get_current_context().find_root().command
    print(kind(program, {}, "embedtrain", "_EMBEDTRAIN_COMPLETE").source())
    return EXIT_DONE
