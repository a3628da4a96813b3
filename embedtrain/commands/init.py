"""`embedtrain init`."""

from __future__ import annotations

import click

from embedtrain.commands.console import EXIT_DONE, ConfigFile, command, tell
from embedtrain.errors import UserError


@command(
    "embedtrain init --from train.csv > my.yaml",
    "embedtrain init retrieval --from ratings.parquet > my.yaml",
    "embedtrain init word2vec > my.yaml",
)
@click.argument("name", required=False, metavar="[NAME]", type=ConfigFile(), help="Model, or configuration to print.")
@click.option("--from", "path", metavar="FILE", help="A csv, tsv, jsonl or parquet file whose columns to use.")
@click.option("--label", metavar="COLUMN", help="Column that ranking predicts.  [default: guessed]")
def init(name: str | None, path: str | None, label: str | None) -> int:
    """Prints a configuration to begin with, for a file's columns."""
    if path is None:
        if label is not None:
            raise UserError("--label names a column of the file in --from: give --from FILE too")
        from embedtrain.recipes.loading import read_shipped, shipped_names

        if name is None:
            raise UserError(f"expected --from FILE, or the name of a configuration: {', '.join(shipped_names())}")
        tell(*read_shipped(name).removesuffix("\n").split("\n"))
        return EXIT_DONE
    from embedtrain.recipes.drafting import draft

    tell(*draft(path, name, label).removesuffix("\n").split("\n"))
    return EXIT_DONE
