"""The commands that say how good a run is: evaluate and report."""

from __future__ import annotations

import argparse

from embedtrain.commands import inspect as inspection
from embedtrain.commands.console import EXIT_DONE, Commands, add_command
from embedtrain.commands.export import add_run, open_table
from embedtrain.commands.recommend import evaluate_run
from embedtrain.distributed.runtime import init_distributed
from embedtrain.errors import UserError
from embedtrain.report import write_report


def add_measuring(commands: Commands) -> None:
    """Declares the commands."""
    evaluate = add_command(
        commands,
        "evaluate",
        "measure a run: word vectors on analogies and similarity, retrieval on held-out data",
        "embedtrain evaluate runs/x --analogies questions-words.txt --similarity wordsim.tsv",
    )
    add_run(evaluate)
    evaluate.add_argument("--analogies", action="append", default=[], metavar="FILE", help="`: section` and `a b c d`")
    evaluate.add_argument("--similarity", action="append", default=[], metavar="FILE", help="`word word score`")
    evaluate.add_argument("--restrict-vocab", type=int, default=300_000, metavar="N", help="most frequent words only")
    evaluate.add_argument("--case-sensitive", action="store_true", help="compare words as they are written")
    evaluate.set_defaults(run=_evaluate)

    report = add_command(
        commands,
        "report",
        "write a page of HTML about a run: curves, neighbours, advice",
        "embedtrain report runs/x --words king river",
    )
    report.add_argument("path", metavar="RUN", help="run folder")
    report.add_argument("--output", metavar="PATH", help="the page (report.html in the run folder)")
    report.add_argument("--words", nargs="*", default=[], metavar="WORD", help="whose neighbours to show")
    report.set_defaults(run=_report)


def _evaluate(options: argparse.Namespace) -> int:
    if evaluate_run(options.path):
        return EXIT_DONE
    if not options.analogies and not options.similarity:
        raise UserError("expected --analogies FILE or --similarity FILE")
    with open_table(options) as vectors:
        inspection.print_evaluation(
            vectors,
            options.analogies,
            options.similarity,
            restrict_vocab=options.restrict_vocab,
            case_insensitive=not options.case_sensitive,
        )
    return EXIT_DONE


def _report(options: argparse.Namespace) -> int:
    print(write_report(options.path, options.output, options.words, init_distributed(device="cpu")))
    return EXIT_DONE
