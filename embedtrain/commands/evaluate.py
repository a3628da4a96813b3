"""`embedtrain evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from embedtrain.commands.console import (
    EXIT_DONE,
    command,
    given_options,
    require_run,
    run_argument,
    settings_argument,
    step_option,
    table_option,
    tell,
)
from embedtrain.errors import UserError

if TYPE_CHECKING:
    from embedtrain.checkpoint.choice import Step
    from embedtrain.export import Vectors

_GROUPS_SHOWN = 10


@command(
    "embedtrain evaluate runs/x --analogies questions-words.txt --similarity wordsim.tsv",
    "embedtrain evaluate runs/r --data tomorrow.csv --by user",
)
@run_argument
@settings_argument
@table_option
@click.option("--data", metavar="PATH", type=click.Path(), help="Held-out data to use instead of the run's own.")
@click.option(
    "--fold-in",
    type=float,
    metavar="FRACTION",
    help="Retrieval with --data: measure on new users, given this fraction of each user's items.",
)
@click.option("--by", metavar="COLUMN", help="Ranking with --data: also print the AUC per value of this column.")
@step_option
@click.option("--analogies", multiple=True, metavar="FILE", type=click.Path(), help="`: section` and `a b c d` lines.")
@click.option("--similarity", multiple=True, metavar="FILE", type=click.Path(), help="`word word score` lines.")
@click.option(
    "--restrict-vocab",
    type=int,
    default=300_000,
    show_default=True,
    metavar="N",
    help="Use only the N most frequent words.",
)
@click.option("--case-sensitive", is_flag=True, help="Do not ignore case.")
def evaluate(
    path: str,
    settings: Sequence[str],
    table: str | None,
    step: Step,
    data: str | None,
    fold_in: float | None,
    by: str | None,
    **word_tests: Any,
) -> int:
    """Measures a run on held-out data, or its words on word tests."""
    run_path, overrides = require_run(path, settings)
    if data is None and (by is not None or overrides):
        raise UserError(f"{'--by' if by is not None else overrides[0]} needs other data: give --data FILE too")
    if fold_in is not None and not 0 < fold_in < 1:
        raise UserError(f"--fold-in must be more than 0 and less than 1, got {fold_in:g}")
    if fold_in is not None and (data is None or by is not None or word_tests["analogies"] or word_tests["similarity"]):
        raise UserError("--fold-in measures a retrieval run on the new users of other data: give --data FILE alone")
    if not word_tests["analogies"] and not word_tests["similarity"]:
        if unused := given_options("table", "restrict_vocab", "case_sensitive"):
            raise UserError(f"{', '.join(unused)}: only for word tests, so give --analogies FILE or --similarity FILE")
        if data is None or not _scores_rows(run_path):
            if by is not None or overrides:
                raise UserError(f"{by or overrides[0]}: --by and settings need a ranking run")
            return _measure(run_path, step, data, fold_in)
        if fold_in is not None:
            raise UserError(f"--fold-in needs a retrieval run, and {run_path!r} is not one: leave out --fold-in")
        return _measure_file(run_path, step, data, overrides, by)
    if data is not None:
        raise UserError("--data is for ranking and retrieval, --analogies and --similarity for words: give one of them")
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.recipes.trained import open_run_vectors

    runtime = init_distributed(device="cpu")
    with open_run_vectors(run_path, table, runtime, step) as vectors:
        if runtime.rank == 0:
            print_evaluation(
                vectors,
                word_tests["analogies"],
                word_tests["similarity"],
                restrict_vocab=word_tests["restrict_vocab"],
                case_insensitive=not word_tests["case_sensitive"],
            )
    return EXIT_DONE


def _scores_rows(run_path: str) -> bool:
    from embedtrain.recipes.registry import recipe_of
    from embedtrain.recipes.trained import require_config

    return recipe_of(require_config(run_path).model).score is not None


def _measure_file(run_path: str, step: Step, data: str, overrides: Sequence[str], by: str | None) -> int:
    """Prints the measures of a ranking run on other files. Collective: every rank."""
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.serve.measuring import measure_scores
    from embedtrain.serve.opening import config_for_files, open_scorer, score_options
    from embedtrain.serve.scoring import score_rows

    config = config_for_files(run_path, overrides)
    runtime = init_distributed(device=config.run.device, timeout_seconds=config.run.timeout_seconds)
    keep = [] if by is None else [by]
    scored = score_rows(
        open_scorer(config, runtime, step), score_options(config, data, overrides, keep=keep, has_label=True)
    )
    measures = measure_scores(scored, by)

    def require_rows() -> None:
        if measures.num_rows == 0:
            raise UserError(f"{data} has no usable rows: nothing can be measured")

    runtime.ranks.run_on_first(require_rows)
    if runtime.rank == 0:
        for name, value in measures.values.items():
            tell(f"{value:.9f}  {name}")
        tell(f"{measures.num_rows:,} rows of {data}")
        for group in measures.groups[:_GROUPS_SHOWN]:
            tell(f"  {group.auc:.4f}  {by} {group.name}, {group.num_rows:,} rows")
        if len(measures.groups) > _GROUPS_SHOWN:
            tell(f"  and {len(measures.groups) - _GROUPS_SHOWN:,} smaller groups")
    return EXIT_DONE


def _measure(run_path: str, step: Step, data: str | None, fold_in: float | None) -> int:
    """Prints the measures of a run on its held-out data or on `data`. Collective: every rank."""
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.recipes.trained import measure_new_users, measure_run, require_config, require_held_out

    config = require_config(run_path)
    if data is None:
        require_held_out(config)
    runtime = init_distributed(device=config.run.device, timeout_seconds=config.run.timeout_seconds)
    if data is not None and fold_in is not None:
        measures = measure_new_users(config, runtime, step, data, fold_in)
    else:
        measures = measure_run(config, runtime, step, data)
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
        tell(f"  {report.num_oov:,} questions skipped because a word is not in the vocabulary")
    for path in similarity:
        pairs = evaluate_similarity(
            unit, restricted.words, read_lines(path), restrict_vocab, case_insensitive, source=path
        )
        tell(
            f"{path}: Spearman {pairs.spearman:.3f}, Pearson {pairs.pearson:.3f} over {pairs.num_pairs:,} pairs; "
            f"{pairs.oov_ratio:.1%} skipped because a word is not in the vocabulary"
        )
