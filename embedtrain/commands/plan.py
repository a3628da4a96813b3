"""`embedtrain plan`: what a run needs on each rank, before it is started."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from embedtrain.commands.console import command, settings_argument, split_config
from embedtrain.errors import UserError
from embedtrain.planning.sizes import parse_bandwidth, parse_bytes, parse_count

if TYPE_CHECKING:
    from embedtrain.planning.plan import Bandwidths

EXIT_FITS, EXIT_DOES_NOT_FIT = 0, 1


@command("embedtrain plan configs/word2vec.yaml --rows 10e6 --world-size 8 --memory 16GiB")
@click.argument("config", required=False, type=click.Path(), help="YAML file, such as configs/word2vec.yaml.")
@settings_argument
@click.option("--world-size", type=int, default=1, show_default=True, metavar="N", help="Number of ranks.")
@click.option("--hosts", type=int, default=1, show_default=True, metavar="H", help="Number of hosts.")
@click.option("--memory", metavar="SIZE", help="Memory of each rank, such as 80GiB.")
@click.option("--rows", multiple=True, metavar="[TABLE=]N", help="Rows of a table, or of all other tables.")
@click.option("--skew", type=float, default=1.0, show_default=True, metavar="S", help="Zipf's exponent of the ids.")
@click.option("--bag-length", type=float, metavar="L", help="Mean number of ids per bag.")
@click.option(
    "--memory-bandwidth",
    metavar="RATE",
    help="What each rank reads and writes per second, such as 20GB/s; bounds a step's time.",
)
@click.option(
    "--exchange-bandwidth",
    metavar="RATE",
    help="What each rank sends to other ranks per second, such as 5GB/s; bounds a step's time.",
)
@click.option("--probe", is_flag=True, help="Measure both bandwidths here: on torchrun's ranks, or on 2 of its own.")
def plan(**options: Any) -> int:
    """Tells what a run needs on each rank, and bounds a step's time."""
    options["config"], options["overrides"] = split_config(options["config"], options.pop("settings"))
    return run_plan(SimpleNamespace(**options))


def run_plan(options: SimpleNamespace) -> int:
    """Runs the command; returns 0 if the plan fits, and 1 if it does not.

    Raises:
        UserError: an argument is wrong, or something that the plan needs is unknown.
    """
    if options.world_size < 1 or options.hosts < 1 or options.world_size % options.hosts:
        raise UserError(
            "expected --world-size a multiple of --hosts, both at least 1, "
            f"got {options.world_size} and {options.hosts}"
        )
    if not 0 <= options.skew <= 10:
        raise UserError(f"expected --skew between 0 (uniform) and 10, got {options.skew}")
    if options.bag_length is not None and not 0 < options.bag_length < math.inf:
        raise UserError(f"expected --bag-length above 0, got {options.bag_length}")
    if options.probe and (options.memory_bandwidth is not None or options.exchange_bandwidth is not None):
        raise UserError("--probe measures the bandwidths: leave out --memory-bandwidth and --exchange-bandwidth")
    if options.exchange_bandwidth is not None and options.world_size == 1:
        raise UserError("one rank exchanges nothing: leave out --exchange-bandwidth, or give --world-size")
    from embedtrain.planning.report import Request, print_plan
    from embedtrain.recipes.building import workload_of
    from embedtrain.recipes.loading import load_without_data
    from embedtrain.recipes.workload import Sizes

    config = load_without_data(options.config, options.overrides)
    named = dict(_named(rows, "rows") for rows in options.rows if "=" in rows)
    others = [parse_count(rows) for rows in options.rows if "=" not in rows]
    if len(others) > 1:
        raise UserError(f"expected one --rows without a table's name, got {len(others)}")
    sizes = Sizes(
        {table: parse_count(count) for table, count in named.items()},
        default_num_rows=others[0] if others else None,
        default_bag_length=options.bag_length,
        run_path=config.run.path,
        exponent=options.skew,
    )
    workload = workload_of(config, sizes)
    if options.bag_length is not None and all(table.num_bags is None for table in workload.tables):
        raise UserError("no table of this model has bags: leave out --bag-length")
    memory_bytes = None if options.memory is None else parse_bytes(options.memory)
    bandwidths = _bandwidths(options, config.run.device)
    if bandwidths is None:
        return EXIT_FITS
    fits = print_plan(workload, Request(options.world_size, options.hosts, memory_bytes, bandwidths))
    return EXIT_FITS if fits else EXIT_DOES_NOT_FIT


def _bandwidths(options: SimpleNamespace, device: str) -> Bandwidths | None:
    """Returns the bandwidths that are given or probed; None on the ranks of torchrun that have nothing to print."""
    from embedtrain.planning.plan import Bandwidths

    if not options.probe:
        memory, exchange = (
            None if text is None else parse_bandwidth(text)
            for text in (options.memory_bandwidth, options.exchange_bandwidth)
        )
        return Bandwidths(memory, exchange)
    from embedtrain.distributed.runtime import init_distributed, shut_down
    from embedtrain.planning.probe import probe, probe_own_ranks

    if "RANK" not in os.environ:
        return probe_own_ranks(min(options.world_size, 2), device)
    runtime = init_distributed(device=device)
    found = probe(runtime)
    shut_down()
    if runtime.rank != 0:
        return None
    return found if options.world_size > 1 else replace(found, exchange=None)


def _named(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"expected --{option} NAME=VALUE, got {text!r}")
    return name, value
