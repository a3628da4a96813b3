"""`embedtrain plan`: memory, exchange and a lower bound of the step time of a run, before it is started."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from embedtrain.commands.console import ConfigFile, command, settings_argument, split_config
from embedtrain.errors import UserError
from embedtrain.planning.sizes import parse_bandwidth, parse_bytes, parse_count

if TYPE_CHECKING:
    from embedtrain.config.sections import Config
    from embedtrain.planning.plan import Bandwidths
    from embedtrain.recipes.workload import Workload

EXIT_FITS, EXIT_DOES_NOT_FIT = 0, 1


@command("embedtrain plan word2vec --rows 10e6 --world-size 8 --memory 16GiB")
@click.argument("config", required=False, type=ConfigFile(), help="A name, such as word2vec, or a YAML file.")
@settings_argument
@click.option("--world-size", type=int, default=1, show_default=True, metavar="N", help="Number of ranks.")
@click.option("--hosts", type=int, default=1, show_default=True, metavar="H", help="Number of hosts.")
@click.option("--memory", metavar="SIZE", help="Memory per rank, such as 80GiB.")
@click.option(
    "--rows", multiple=True, metavar="[TABLE=]N", help="Rows of one table, or of all other tables, such as 5M."
)
@click.option(
    "--skew", type=float, default=1.0, show_default=True, metavar="S", help="Exponent of the Zipf distribution of ids."
)
@click.option("--bag-length", type=float, metavar="L", help="Mean number of ids per bag.")
@click.option(
    "--memory-bandwidth",
    metavar="RATE",
    help="Memory bandwidth per rank, such as 20GB/s; bounds the step time.",
)
@click.option(
    "--exchange-bandwidth",
    metavar="RATE",
    help="Bandwidth per rank to other ranks, such as 5GB/s; bounds the step time.",
)
@click.option(
    "--probe", is_flag=True, help="Measure both bandwidths on this machine: on torchrun's ranks, or on 2 new ones."
)
def plan(**options: Any) -> int:
    """Prints a run's needs per rank, and its least step time."""
    return run_plan(PlanOptions(**options))


@dataclass(frozen=True)
class PlanOptions:
    """Holds the arguments and options of the command line; None if not given."""

    config: str | None
    settings: Sequence[str]
    world_size: int
    hosts: int
    memory: str | None
    rows: Sequence[str]
    skew: float
    bag_length: float | None
    memory_bandwidth: str | None
    exchange_bandwidth: str | None
    probe: bool

    def check(self) -> None:
        """Checks ranges and combinations of options.

        Raises:
            UserError: an option is out of range, or would have no effect.
        """
        if self.world_size < 1 or self.hosts < 1 or self.world_size % self.hosts:
            raise UserError(
                f"--world-size must be a multiple of --hosts, both at least 1, got {self.world_size} and {self.hosts}"
            )
        if not 0 <= self.skew <= 10:
            raise UserError(f"--skew must be between 0 (uniform) and 10, got {self.skew}")
        if self.bag_length is not None and not 0 < self.bag_length < math.inf:
            raise UserError(f"--bag-length must be more than 0, got {self.bag_length}")
        if self.probe and (self.memory_bandwidth is not None or self.exchange_bandwidth is not None):
            raise UserError("--probe measures the bandwidths: leave out --memory-bandwidth and --exchange-bandwidth")
        if self.exchange_bandwidth is not None and self.world_size == 1:
            raise UserError("--exchange-bandwidth needs more than one rank: give --world-size too, or leave it out")

    def read_rows(self) -> tuple[dict[str, int], int | None]:
        """Returns the rows by table, and the rows of all other tables.

        Raises:
            UserError: a value is not a count, or a table is given twice.
        """
        named: dict[str, int] = {}
        others = []
        for text in self.rows:
            table, equals, count = text.rpartition("=")
            if not equals:
                others.append(parse_count(text))
                continue
            if not table:
                raise UserError(f"expected --rows TABLE=N, got {text!r}")
            if table in named:
                raise UserError(f"--rows {table}=... is given twice")
            named[table] = parse_count(count)
        if len(others) > 1:
            raise UserError(f"--rows without a table name must be given only once, got {len(others)}")
        return named, others[0] if others else None


def run_plan(options: PlanOptions) -> int:
    """Prints the plan; returns 0 if the run fits into memory, otherwise 1.

    Raises:
        UserError: an argument is invalid or has no effect, or a size that the plan needs is unknown.
    """
    options.check()
    from embedtrain.planning.report import Request, print_plan
    from embedtrain.recipes.loading import load_without_data

    config = load_without_data(*split_config(options.config, options.settings))
    workload = _workload(options, config)
    if options.bag_length is not None and all(table.num_bags is None for table in workload.tables):
        raise UserError("--bag-length has no effect, because no table of this model has bags: leave it out")
    memory_bytes = None if options.memory is None else parse_bytes(options.memory)
    bandwidths = _bandwidths(options, config.run.device)
    if bandwidths is None:
        return EXIT_FITS
    fits = print_plan(workload, Request(options.world_size, options.hosts, memory_bytes, bandwidths))
    return EXIT_FITS if fits else EXIT_DOES_NOT_FIT


def _workload(options: PlanOptions, config: Config) -> Workload:
    """Returns the run's workload, with sizes from the options or from its newest checkpoint."""
    from embedtrain.recipes.building import workload_of
    from embedtrain.recipes.workload import Sizes, UnknownBagLengthError, UnknownRowsError

    named, others = options.read_rows()
    sizes = Sizes(
        named,
        default_num_rows=others,
        default_bag_length=options.bag_length,
        rows_of_run=_rows_of_run(config.run.path) if others is None else {},
        exponent=options.skew,
    )
    try:
        workload = workload_of(config, sizes)
        if others is not None:
            with suppress(UnknownRowsError):
                workload_of(config, replace(sizes, default_num_rows=None))
                raise UserError(
                    f"--rows {others} has no effect, because the rows of every table are known: leave it out"
                )
    except UnknownRowsError as error:
        raise UserError(
            f"{error}: give --rows {error.table}=N (or --rows N for all tables), or a run.path with a checkpoint of "
            f"this model ({config.run.path!r} has none with this table)"
        ) from error
    except UnknownBagLengthError as error:
        raise UserError(f"{error}: give --bag-length L") from error
    return workload


def _rows_of_run(run_path: str) -> dict[str, int]:
    """Returns the rows of each table in a run's newest checkpoint; empty if there is none."""
    from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
    from embedtrain.train.run_folder import RunFolder

    path = latest_checkpoint(RunFolder(run_path).checkpoints_path)
    if path is None:
        return {}
    with CheckpointReader(path) as reader:
        return {
            name.removesuffix("/weight"): info.shape[0]
            for name, info in reader.tensors.items()
            if name.endswith("/weight")
        }


def _bandwidths(options: PlanOptions, device: str) -> Bandwidths | None:
    """Returns the given or measured bandwidths; None on ranks of torchrun other than 0, which print nothing."""
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
