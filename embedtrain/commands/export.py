"""The commands that read a run's vectors: recommend, neighbors and export."""

from __future__ import annotations

import argparse

from embedtrain.commands.console import EXIT_DONE, Commands, add_command
from embedtrain.commands.recommend import recommend
from embedtrain.distributed.runtime import init_distributed
from embedtrain.export import FORMATS, Vectors, export_vectors, neighbors
from embedtrain.recipes.trained import open_run_vectors


def add_reading(commands: Commands) -> None:
    """Declares the commands."""
    best = add_command(
        commands,
        "recommend",
        "print or write the best items of users of a retrieval run",
        "embedtrain recommend runs/m 4711 --top 10\nembedtrain recommend runs/m --all --output top.parquet",
    )
    best.add_argument("path", metavar="RUN", help="run folder")
    best.add_argument("users", nargs="*", metavar="USER", help="raw ids, as in the data; --all for all users")
    best.add_argument("--all", action="store_true", help="all users, into the file of --output")
    best.add_argument("--top", type=int, default=10, metavar="N", help="how many items each (10)")
    best.add_argument("--include-known", action="store_true", help="also items that the user has already")
    best.add_argument("--output", metavar="PATH", help="a new Parquet file, instead of printing")
    best.add_argument("--overwrite", action="store_true", help="replace what is there")
    best.set_defaults(run=_recommend)

    near = add_command(
        commands,
        "neighbors",
        "print the nearest words, items or users of one, or of a sum",
        "embedtrain neighbors runs/x king - man + woman --top 5",
    )
    add_run(near)
    near.add_argument("query", nargs="+", help="such as: king, or: king - man + woman, or the id of an item")
    near.add_argument("--top", type=int, default=10, metavar="N", help="how many (10)")
    near.set_defaults(run=_neighbors)

    export = add_command(
        commands,
        "export",
        "write the vectors of a run for other programs",
        "embedtrain export runs/x --format word2vec --output vectors.txt",
    )
    add_run(export)
    export.add_argument("--format", required=True, choices=list(FORMATS))
    export.add_argument("--output", required=True, metavar="PATH", help="new file, or folder for projector")
    export.add_argument("--max-rows", type=int, metavar="N", help="only the N most frequent words")
    export.add_argument("--overwrite", action="store_true", help="replace what is there")
    export.set_defaults(run=_export)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declares the run folder, and which of its tables."""
    parser.add_argument("path", metavar="RUN", help="run folder")
    parser.add_argument("--table", metavar="NAME", help="a table other than the one that holds the vectors")


def open_table(options: argparse.Namespace) -> Vectors:
    """Opens the table that `add_run`'s options ask for."""
    return open_run_vectors(options.path, options.table, init_distributed(device="cpu"))


def _neighbors(options: argparse.Namespace) -> int:
    with open_table(options) as vectors:
        query = " ".join(options.query)
        print(query)
        for word, cosine in neighbors(vectors, query, options.top):
            print(f"  {cosine:.3f}  {word}")
    return EXIT_DONE


def _recommend(options: argparse.Namespace) -> int:
    recommend(
        options.path,
        None if options.all else options.users,
        top=options.top,
        leave_out_known=not options.include_known,
        output=options.output,
        overwrite=options.overwrite,
    )
    return EXIT_DONE


def _export(options: argparse.Namespace) -> int:
    with open_table(options) as vectors:
        for path in export_vectors(
            vectors, options.format, options.output, overwrite=options.overwrite, max_rows=options.max_rows
        ):
            print(path)
    return EXIT_DONE
