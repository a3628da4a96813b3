"""`embedtrain predict`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from embedtrain.commands.console import (
    EXIT_DONE,
    command,
    require_run,
    run_argument,
    say,
    settings_argument,
    split_names,
    step_option,
)
from embedtrain.errors import UserError

if TYPE_CHECKING:
    from embedtrain.checkpoint.choice import Step


@command(
    "embedtrain predict runs/r --data today.csv --output scores.parquet --keep id,ts",
    "embedtrain predict runs/r --data - data.format=jsonl --keep id < rows.jsonl",
)
@run_argument
@settings_argument
@click.option("--data", required=True, metavar="PATH", type=click.Path(), help="Rows; - for lines of standard input.")
@click.option("--output", metavar="PATH", type=click.Path(), help="New .parquet, .csv or .jsonl file; - for lines.")
@click.option("--keep", metavar="COLUMNS", help="Columns to copy to the output, such as id,ts.")
@step_option
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def predict(
    path: str,
    settings: Sequence[str],
    data: str,
    output: str | None,
    keep: str | None,
    step: Step,
    overwrite: bool,
) -> int:
    """Scores rows by a ranking run: the probability of each."""
    run_path, overrides = require_run(path, settings)
    output = "-" if output is None and data == "-" else output
    if output is None:
        raise UserError("expected --output FILE, or --output - to print one line per row")
    if overwrite and output == "-":
        raise UserError("--overwrite needs a file in --output, and --output - is standard output: leave it out")
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.serve.opening import config_for_files, open_scorer, score_options
    from embedtrain.serve.scoring import score_rows
    from embedtrain.serve.writing import SCORE, require_output, write_lines, write_scores

    kept = split_names(keep, "--keep", "column")
    if SCORE in kept:
        raise UserError(f"--keep {SCORE} cannot be kept: the score column has this name")
    config = config_for_files(run_path, overrides)
    if output != "-":
        require_output(output, overwrite=overwrite)
    runtime = init_distributed(device=config.run.device, timeout_seconds=config.run.timeout_seconds)
    scorer = open_scorer(config, runtime, step)
    options = score_options(config, data, overrides, keep=kept)
    scored = score_rows(scorer, replace(options, output=None if output == "-" else output))
    if runtime.rank != 0:
        for _ in scored:
            pass
    elif output == "-":
        write_lines(scored, sys.stdout.buffer, as_json=scorer.schema.reader == "jsonl")
    else:
        num_rows = write_scores(scored, output, overwrite=overwrite)
        say(f"{output}: {num_rows:,} rows")
    return EXIT_DONE
