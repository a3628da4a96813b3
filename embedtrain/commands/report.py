"""`embedtrain report`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from embedtrain.commands.console import EXIT_DONE, command, given_options, table_option, tell
from embedtrain.errors import UserError


@command("embedtrain report runs/x --word king --word river", "embedtrain report runs/x runs/y")
@click.argument(
    "runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(file_okay=False), help="Run folders."
)
@click.option("--word", "words", multiple=True, metavar="NAME", help="A word, item or user whose neighbours to show.")
@table_option
@click.option("--analogies", multiple=True, metavar="FILE", type=click.Path(), help="`: section` and `a b c d` lines.")
@click.option(
    "--output",
    metavar="PATH",
    type=click.Path(),
    help="The page.  [default: report.html in the run folder; of several runs comparison.html here]",
)
def report(
    runs: Sequence[str], words: Sequence[str], table: str | None, analogies: Sequence[str], output: str | None
) -> int:
    """Writes a page of HTML about one run, or compares several."""
    if len(runs) > 1 and (unused := given_options("words", "table", "analogies")):
        raise UserError(f"{', '.join(unused)}: only for one run, and there are {len(runs)}")
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.report import write_comparison, write_report

    runtime = init_distributed(device="cpu")
    if len(runs) > 1:
        written = runtime.ranks.run_on_first(lambda: write_comparison(runs, output))
    else:
        written = write_report(runs[0], output, words, runtime, analogies, table)
    if runtime.rank == 0:
        tell(written)
    return EXIT_DONE
