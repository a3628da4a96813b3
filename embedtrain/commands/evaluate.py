"""`embedtrain evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from embedtrain.commands.console import EXIT_DONE, command, given_options, run_argument, step_option, table_option, tell
from embedtrain.errors import UserError

if TYPE_CHECKING:
    from embedtrain.checkpoint.choice import Step
    from embedtrain.export import Vectors


@command("embedtrain evaluate runs/x --analogies questions-words.txt --similarity wordsim.tsv")
@run_argument
@table_option
@step_option
@click.option("--analogies", multiple=True, metavar="FILE", type=click.Path(), help="`: section` and `a b c d` lines.")
@click.option("--similarity", multiple=True, metavar="FILE", type=click.Path(), help="`word word score` lines.")
@click.option(
    "--restrict-vocab", type=int, default=300_000, show_default=True, metavar="N", help="Most frequent words only."
)
@click.option("--case-sensitive", is_flag=True, help="Compare words as they are written.")
def evaluate(
    path: str,
    table: str | None,
    step: Step,
    analogies: Sequence[str],
    similarity: Sequence[str],
    restrict_vocab: int,
    case_sensitive: bool,
) -> int:
    """Measures a run on held-out data, or its words on word tests."""
    if not analogies and not similarity:
        if unused := given_options("table", "restrict_vocab", "case_sensitive"):
            raise UserError(f"{', '.join(unused)}: only for word tests, so give --analogies FILE or --similarity FILE")
        return _measure(path, step)
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.recipes.trained import open_run_vectors

    runtime = init_distributed(device="cpu")
    with open_run_vectors(path, table, runtime, step) as vectors:
        if runtime.rank == 0:
            print_evaluation(
                vectors, analogies, similarity, restrict_vocab=restrict_vocab, case_insensitive=not case_sensitive
            )
    return EXIT_DONE


def _measure(run_path: str, step: Step) -> int:
    """Prints the measures of a run on its held-out data. Collective: every rank."""
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.recipes.trained import measure_run, require_config, require_held_out

    config = require_config(run_path)
    require_held_out(config)
    runtime = init_distributed(device=config.run.device, timeout_seconds=config.run.timeout_seconds)
    measures = measure_run(config, runtime, step)
    if runtime.rank == 0:
        for name, value in measures.items():
            tell(f"{value:.4f}  {name}")
    return EXIT_DONE


def print_evaluation(
    vectors: Vectors,
    analogies: Sequence[str],
    similarity: Sequence[str],
    *,
    restrict_vocab: int,
    case_insensitive: bool,
) -> None:
    """Prints accuracy by section for each file of analogies, and correlations for each file of word pairs."""
    from embedtrain.data.readers.blocks import read_lines
    from embedtrain.export import unit_rows
    from embedtrain.metrics.analogies import evaluate_analogies
    from embedtrain.metrics.word_lookup import require_vocab
    from embedtrain.metrics.word_similarity import evaluate_similarity

    require_vocab(restrict_vocab)
    restricted = vectors.first(restrict_vocab)
    unit = unit_rows(restricted.rows(0, restricted.num_rows))
    for path in analogies:
        report = evaluate_analogies(
            unit, restricted.words, read_lines(path), restrict_vocab, case_insensitive, source=path
        )
        tell(f"{path}: accuracy by 3CosAdd")
        for section in (*report.sections, report.total):
            tell(f"  {section.accuracy:7.2%}  {section.num_correct:>6,} of {section.num_questions:<6,} {section.name}")
        tell(f"  {report.num_oov:,} questions left out: a word is not in the vocabulary")
    for path in similarity:
        pairs = evaluate_similarity(
            unit, restricted.words, read_lines(path), restrict_vocab, case_insensitive, source=path
        )
        tell(
            f"{path}: Spearman {pairs.spearman:.3f}, Pearson {pairs.pearson:.3f} over {pairs.num_pairs:,} pairs; "
            f"{pairs.oov_ratio:.1%} left out, a word is not in the vocabulary"
        )
