"""`embedtrain export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from embedtrain.commands.console import (
    EXIT_DONE,
    command,
    given_options,
    run_argument,
    step_option,
    table_option,
    tell,
)
from embedtrain.errors import UserError

if TYPE_CHECKING:
    from embedtrain.checkpoint.choice import Step
    from embedtrain.serve.package import TableDtype

PACKAGE = "package"
FORMAT_NAMES = ("word2vec", "word2vec-binary", "glove", "npy", "safetensors", "parquet", "projector", PACKAGE)
"""The names of `embedtrain.export.FORMATS`, whose import takes too long for the help; a test compares them. A package
is the whole model."""
TABLE_DTYPES = ("float32", "bfloat16", "int8")


@command(
    "embedtrain export runs/x --format word2vec --output vectors.txt",
    "embedtrain export runs/r --format package --dtype int8 --output model",
)
@run_argument
@table_option
@step_option
@click.option("--format", "format_name", required=True, type=click.Choice(FORMAT_NAMES), help="Format of the file.")
@click.option(
    "--output",
    required=True,
    metavar="PATH",
    type=click.Path(),
    help="New file; for projector and package a folder.",
)
@click.option("--dtype", type=click.Choice(TABLE_DTYPES), help="Of a package's tables.  [default: float32]")
@click.option("--max-rows", type=int, metavar="N", help="Only the N most frequent words.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file or folder.")
def export(
    path: str,
    table: str | None,
    step: Step,
    format_name: str,
    output: str,
    dtype: TableDtype | None,
    max_rows: int | None,
    overwrite: bool,
) -> int:
    """Writes the vectors of a run, or its model, for other programs."""
    if format_name == PACKAGE:
        if unused := given_options("table", "max_rows"):
            raise UserError(f"{', '.join(unused)}: a package holds the whole model")
        return _export_package(path, step, output, dtype or "float32", overwrite=overwrite)
    if dtype is not None:
        raise UserError(f"--dtype is for the tables of a package: give --format {PACKAGE} too")
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.export import export_vectors
    from embedtrain.recipes.trained import open_run_vectors

    runtime = init_distributed(device="cpu")
    with open_run_vectors(path, table, runtime, step) as vectors:
        if runtime.rank == 0:
            for written in export_vectors(vectors, format_name, output, overwrite=overwrite, max_rows=max_rows):
                tell(written)
    return EXIT_DONE


def _export_package(path: str, step: Step, output: str, dtype: TableDtype, *, overwrite: bool) -> int:
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.serve.opening import pack_run

    pack_run(path, step, output, init_distributed(device="cpu"), dtype=dtype, overwrite=overwrite)
    tell(output)
    return EXIT_DONE
