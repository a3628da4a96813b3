"""`embedtrain export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from embedtrain.commands.console import EXIT_DONE, command, run_argument, step_option, table_option, tell

if TYPE_CHECKING:
    from embedtrain.checkpoint.choice import Step

FORMAT_NAMES = ("word2vec", "word2vec-binary", "glove", "npy", "safetensors", "parquet", "projector")
"""The names of `embedtrain.export.FORMATS`, whose import takes too long for the help; a test compares them."""


@command("embedtrain export runs/x --format word2vec --output vectors.txt")
@run_argument
@table_option
@step_option
@click.option("--format", "format_name", required=True, type=click.Choice(FORMAT_NAMES), help="Format of the file.")
@click.option(
    "--output",
    required=True,
    metavar="PATH",
    type=click.Path(),
    help="New file; for projector a folder.",
)
@click.option("--max-rows", type=int, metavar="N", help="Only the N most frequent words.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file or folder.")
def export(
    path: str, table: str | None, step: Step, format_name: str, output: str, max_rows: int | None, overwrite: bool
) -> int:
    """Writes the vectors of a run for other programs."""
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.export import export_vectors
    from embedtrain.recipes.trained import open_run_vectors

    runtime = init_distributed(device="cpu")
    with open_run_vectors(path, table, runtime, step) as vectors:
        if runtime.rank == 0:
            for written in export_vectors(vectors, format_name, output, overwrite=overwrite, max_rows=max_rows):
                tell(written)
    return EXIT_DONE
