"""`embedtrain plan`."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from embedtrain.commands.console import command, settings_argument, split_config
from embedtrain.errors import UserError
from embedtrain.planning.sizes import parse_bytes, parse_count

if TYPE_CHECKING:
    from embedtrain.sharding.machine import Machine

EXIT_FITS, EXIT_DOES_NOT_FIT = 0, 1


@command("embedtrain plan configs/word2vec.yaml --rows 10e6 --world-size 8 --memory 16GiB")
@click.argument("config", required=False, type=click.Path(), help="YAML file, such as configs/word2vec.yaml.")
@settings_argument
@click.option("--world-size", type=int, default=1, show_default=True, metavar="N", help="Ranks.")
@click.option("--hosts", type=int, default=1, show_default=True, metavar="H", help="Hosts that hold the ranks.")
@click.option("--memory", metavar="SIZE", help="Memory of each rank, such as 80GiB.")
@click.option("--rows", multiple=True, metavar="[TABLE=]N", help="Rows of a table, or of all others.")
@click.option("--skew", type=float, default=1.0, show_default=True, metavar="S", help="Zipf's exponent of the ids.")
@click.option("--bag-length", type=float, metavar="L", help="Mean ids per bag, if there are bags.")
@click.option("--machine", metavar="FILE", type=click.Path(), help="Rates that --measure wrote; without it no times.")
@click.option("--rate", multiple=True, metavar="NAME=VALUE", help="Replaces one of the rates.")
@click.option(
    "--measure",
    metavar="FILE",
    type=click.Path(),
    help="Measure this machine on 2 ranks, or on those of torchrun, and write FILE.",
)
def plan(**options: Any) -> int:
    """Tells what a run needs on each rank, and how long steps take."""
    options["config"], options["overrides"] = split_config(options["config"], options.pop("settings"))
    return run_plan(SimpleNamespace(**options))


def run_plan(options: SimpleNamespace) -> int:
    """Runs the command; returns 0 where the plan fits, 1 where it does not.

    Raises:
        UserError: an argument is wrong, or something is not known that the plan needs.
    """
    if options.measure is not None:
        _refuse_unused(options)
        return _measure(options.measure)
    if options.config is None:
        raise UserError("expected a configuration to plan, such as configs/word2vec.yaml, or --measure FILE")
    if options.world_size < 1 or options.hosts < 1 or options.world_size % options.hosts:
        raise UserError(
            "expected --world-size a multiple of --hosts, both at least 1, "
            f"got {options.world_size} and {options.hosts}"
        )
    if not 0 <= options.skew <= 10:
        raise UserError(f"expected --skew between 0 (uniform) and 10, got {options.skew}")
    if options.bag_length is not None and not 0 < options.bag_length < math.inf:
        raise UserError(f"expected --bag-length above 0, got {options.bag_length}")
    from embedtrain.planning.report import Request, print_plan
    from embedtrain.planning.workload import Assumptions, workload_of
    from embedtrain.recipes.loading import load_config

    # Every model must have data, but a plan reads none.
    config = load_config(options.config, ["data.path=none", *options.overrides])
    named = dict(_named(rows, "rows") for rows in options.rows if "=" in rows)
    others = [parse_count(rows) for rows in options.rows if "=" not in rows]
    if len(others) > 1:
        raise UserError(f"expected one --rows without a table's name, got {len(others)}")
    assumptions = Assumptions(
        {table: parse_count(count) for table, count in named.items()},
        others[0] if others else None,
        config.run.path,
        options.skew,
        options.bag_length,
    )
    request = Request(
        options.world_size,
        options.hosts,
        None if options.memory is None else parse_bytes(options.memory),
        _machine(options),
    )
    fits = print_plan(workload_of(config, assumptions), request)
    return EXIT_FITS if fits else EXIT_DOES_NOT_FIT


def _machine(options: SimpleNamespace) -> Machine | None:
    if options.machine is None:
        if options.rate:
            raise UserError("--rate replaces a rate of a machine: give --machine FILE too")
        return None
    from embedtrain.sharding.machine import Machine

    try:
        text = Path(options.machine).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{options.machine} cannot be read: {error}") from error
    rates = {}
    for rate in options.rate:
        name, value = _named(rate, "rate")
        try:
            rates[name] = float(value)
        except ValueError as error:
            raise UserError(f"--rate {rate}: expected a number, got {value!r}") from error
    return Machine.from_json(text, options.machine).with_rates(rates, "--rate")


def _measure(path: str) -> int:
    """Writes this machine's profile; starts two ranks of its own unless torchrun has started some."""
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run([*command, "-m", "embedtrain", "plan", "--measure", path], check=False)
        return done.returncode
    from embedtrain.distributed.runtime import init_distributed, shut_down
    from embedtrain.planning.measure import measure_machine

    runtime = init_distributed()
    machine = measure_machine(runtime)
    if runtime.rank == 0:
        Path(path).write_text(machine.to_json())
        print(f"{path}: rates of {machine.name}, {machine.num_ranks} ranks")
    shut_down()
    return EXIT_FITS


def _refuse_unused(options: SimpleNamespace) -> None:
    if options.config is not None or options.rows or options.memory or options.machine or options.rate:
        raise UserError("--measure measures this machine and nothing else: run plan again for a configuration")


def _named(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"expected --{option} NAME=VALUE, got {text!r}")
    return name, value
