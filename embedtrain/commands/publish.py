"""`embedtrain publish`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from embedtrain.commands.console import EXIT_DONE, command, run_argument, step_option, tell
from embedtrain.errors import UserError, counted

if TYPE_CHECKING:
    from embedtrain.checkpoint.choice import Step


@command(
    "embedtrain publish runs/r --to s3://bucket/vectors",
    "embedtrain publish runs/r --to redis://localhost:6379/0 --table item",
)
@run_argument
@click.option("--to", "url", required=True, metavar="URL", help="A folder, or redis://HOST:PORT/DATABASE?prefix=NAME.")
@click.option("--table", "tables", multiple=True, metavar="NAME", help="Only this table; may be given several times.")
@step_option
def publish(path: str, url: str, tables: Sequence[str], step: Step) -> int:
    """Publishes a run's changed rows, as a new version."""
    if len(set(tables)) < len(tables):
        raise UserError(f"--table: expected different names, got {', '.join(tables)}")
    from embedtrain.serve.publication import publish, require_lasting
    from embedtrain.storage import shown

    require_lasting(url)
    done, shown_url = publish(path, url, step=step, tables=tables or None), shown(url)
    if not done.is_new:
        tell(f"{shown_url}: nothing changed since version {done.number}")
        return EXIT_DONE
    tell(f"{shown_url}: version {done.number}, step {done.step:,}")
    for name, counts in done.tables.items():
        tell(f"  {name}: {counts.added:,} rows added, {counts.changed:,} changed, {counts.deleted:,} deleted")
    for name, num_rows in done.gone.items():
        tell(f"  {name}: gone, {counted(num_rows, 'row')}")
    if done.dense != "kept":
        tell(f"  the network{': gone' if done.dense == 'gone' else ''}")
    return EXIT_DONE
