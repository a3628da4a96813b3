"""`embedtrain export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    from embedtrain.export.index import IndexKind, Similarity
    from embedtrain.export.vectors import Vectors
    from embedtrain.serve.package import TableDtype

PACKAGE, INDEX = "package", "faiss"
FORMAT_NAMES = ("word2vec", "word2vec-binary", "glove", "npy", "safetensors", "parquet", "projector", INDEX, PACKAGE)
"""The names of `embedtrain.export.formats.FORMATS`, repeated because importing it would slow the help down, and the two
formats that are not files of vectors. A test compares the names."""
TABLE_DTYPES = ("float32", "bfloat16", "int8")
INDEX_KINDS = ("flat", "ivfpq", "hnsw")
SIMILARITIES = ("cosine", "dot")
_OPTIONS = {
    "dtype": (PACKAGE, "the tables of a package"),
    "onnx": (PACKAGE, "the network of a package"),
    "kind": (INDEX, "an index"),
    "similarity": (INDEX, "an index"),
}
"""Options that belong to one format: the format, and a description for messages."""


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
    help="New file, or new folder for projector and package.",
)
@click.option("--dtype", type=click.Choice(TABLE_DTYPES), help="Dtype of a package's tables.  [default: float32]")
@click.option("--onnx", is_flag=True, default=None, help="Also write a package's network as ONNX.")
@click.option("--kind", type=click.Choice(INDEX_KINDS), help="Kind of a faiss index.  [default: hnsw]")
@click.option("--similarity", type=click.Choice(SIMILARITIES), help="Similarity of a faiss index.  [default: cosine]")
@click.option("--max-rows", type=int, metavar="N", help="Export only the N most frequent words.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file or folder.")
def export(
    path: str,
    table: str | None,
    step: Step,
    format_name: str,
    output: str,
    overwrite: bool,
    **options: Any,
) -> int:
    """Writes the vectors of a run, or its model, for other programs."""
    for name, (format_of, what) in _OPTIONS.items():
        if format_name != format_of and options[name] is not None:
            raise UserError(f"--{name} is for {what}: give --format {format_of} too")
    if format_name == PACKAGE:
        if unused := given_options("table", "max_rows"):
            raise UserError(f"{', '.join(unused)} cannot be given: a package holds the whole model")
        return _export_package(path, step, output, options["dtype"], bool(options["onnx"]), overwrite=overwrite)
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.export import export_vectors
    from embedtrain.recipes.trained import open_run_vectors

    runtime = init_distributed(device="cpu")
    with open_run_vectors(path, table, runtime, step) as vectors:
        if runtime.rank != 0:
            return EXIT_DONE
        if format_name == INDEX:
            if options["max_rows"] is not None:
                raise UserError("--max-rows cannot be given: an index holds a whole table")
            return _export_index(vectors, output, options["kind"], options["similarity"], overwrite=overwrite)
        for written in export_vectors(vectors, format_name, output, overwrite=overwrite, max_rows=options["max_rows"]):
            tell(written)
    return EXIT_DONE


def _export_index(vectors: Vectors, output: str, kind: IndexKind, similarity: Similarity, *, overwrite: bool) -> int:
    from embedtrain.export.index import export_index

    paths, facts = export_index(vectors, output, kind or "hnsw", similarity or "cosine", overwrite=overwrite)
    tell(*paths)
    zeros = f"; {facts.num_zero:,} zero vectors are not indexed" if facts.num_zero else ""
    recall = f"recall@20 {facts.recall:.4f} ({facts.approximate_recall:.4f} by the scores of the index alone)"
    tell(f"{facts.kind}, {facts.similarity}: {recall}{zeros}")
    return EXIT_DONE


def _export_package(
    path: str, step: Step, output: str, dtype: TableDtype | None, has_onnx: bool, *, overwrite: bool
) -> int:
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.serve.opening import pack_run

    runtime = init_distributed(device="cpu")
    pack_run(path, step, output, runtime, dtype=dtype or "float32", has_onnx=has_onnx, overwrite=overwrite)
    tell(output)
    return EXIT_DONE
