"""The `plan` command."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

from embedtrain.distributed.runtime import init_distributed, shut_down
from embedtrain.errors import UserError
from embedtrain.planning.report import Request, print_plan
from embedtrain.planning.sizes import parse_bytes, parse_count
from embedtrain.planning.workload import Assumptions, workload_of
from embedtrain.recipes.loading import load_config
from embedtrain.sharding.machine import Machine

EXIT_FITS, EXIT_DOES_NOT_FIT = 0, 1


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("config", nargs="?", help="YAML file, such as configs/word2vec.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks (1)")
    parser.add_argument("--hosts", type=int, default=1, metavar="H", help="that the ranks are spread over (1)")
    parser.add_argument("--memory", metavar="SIZE", help="of each rank, such as 80GiB")
    parser.add_argument(
        "--rows", action="append", default=[], metavar="[TABLE=]N", help="rows of a table, or of all others"
    )
    parser.add_argument("--skew", type=float, default=1.0, metavar="S", help="Zipf's exponent of the ids (1.0)")
    parser.add_argument("--bag-length", type=float, metavar="L", help="ids of a bag on average, where there are bags")
    parser.add_argument("--machine", metavar="FILE", help="rates that --measure wrote; without it no times")
    parser.add_argument("--rate", action="append", default=[], metavar="NAME=VALUE", help="replaces one of them")
    parser.add_argument(
        "--measure", metavar="FILE", help="measure this machine on 2 ranks, or on those of torchrun, and write FILE"
    )


def run_plan(options: argparse.Namespace) -> int:
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


def _machine(options: argparse.Namespace) -> Machine | None:
    if options.machine is None:
        if options.rate:
            raise UserError("--rate replaces a rate of a machine: give --machine FILE too")
        return None
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
    from embedtrain.planning.measure import measure_machine

    runtime = init_distributed()
    machine = measure_machine(runtime)
    if runtime.rank == 0:
        Path(path).write_text(machine.to_json())
        print(f"{path}: rates of {machine.name}, {machine.num_ranks} ranks")
    shut_down()
    return EXIT_FITS


def _refuse_unused(options: argparse.Namespace) -> None:
    if options.config is not None or options.rows or options.memory or options.machine or options.rate:
        raise UserError("--measure measures this machine and nothing else: run plan again for a configuration")


def _named(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"expected --{option} NAME=VALUE, got {text!r}")
    return name, value
