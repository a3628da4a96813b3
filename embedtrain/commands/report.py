"""`embedtrain report`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from embedtrain.commands.console import EXIT_DONE, command, run_argument, tell


@command("embedtrain report runs/x king river")
@run_argument
@click.argument("words", nargs=-1, metavar="[WORD]...", help="Words, items or users whose neighbours to show.")
@click.option("--output", metavar="PATH", type=click.Path(), help="The page.  [default: report.html in the run folder]")
def report(path: str, words: Sequence[str], output: str | None) -> int:
    """Writes a page of HTML about a run: curves, words, advice."""
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.report import write_report

    runtime = init_distributed(device="cpu")
    written = write_report(path, output, list(words), runtime)
    if runtime.rank == 0:
        tell(written)
    return EXIT_DONE
