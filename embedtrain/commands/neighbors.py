"""`embedtrain neighbors`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from embedtrain.commands.console import EXIT_DONE, command, run_argument, step_option, table_option, tell

if TYPE_CHECKING:
    from embedtrain.checkpoint.choice import Step


@command("embedtrain neighbors runs/x king - man + woman --top 5")
@run_argument
@click.argument("query", nargs=-1, required=True, metavar="QUERY...", help="king, or king - man + woman, or an id.")
@table_option
@step_option
@click.option("--top", type=int, default=10, show_default=True, metavar="N", help="How many neighbours.")
@click.option("--index", "index_path", metavar="PATH", type=click.Path(), help="Of export --format faiss; quicker.")
def neighbors(path: str, query: Sequence[str], table: str | None, step: Step, top: int, index_path: str | None) -> int:
    """Prints what is nearest to a word, an item, a user or a sum."""
    from embedtrain import export
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.export.index import IndexedRows, open_index, require_index_of
    from embedtrain.recipes.trained import open_run_vectors

    runtime = init_distributed(device="cpu")
    with open_run_vectors(path, table, runtime, step) as vectors:
        if runtime.rank == 0:
            index = None if index_path is None else open_index(index_path)
            if index is not None and index_path is not None:
                require_index_of(index, IndexedRows.of(vectors), index_path)
            text = " ".join(query)
            tell(text)
            found = export.neighbors(vectors, text, top, index)
            for word, cosine in found:
                tell(f"  {cosine:.3f}  {word}")
            if not found:
                tell("  nothing is left: the table has no other row" if index is None else "  the index finds nothing")
    return EXIT_DONE
