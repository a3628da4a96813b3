"""Printing a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from embedtrain.errors import printable
from embedtrain.planning.plan import (
    Bandwidths,
    checkpoint_bytes,
    exchange_of,
    least_seconds,
    memory_of,
    remedies,
    traffic_bytes,
)
from embedtrain.planning.sizes import format_bytes
from embedtrain.recipes.workload import Workload
from embedtrain.sharding.layout import layout_of


@dataclass(frozen=True)
class Request:
    """Describes the machines of a plan.

    Attributes:
        world_size: number of ranks.
        num_hosts: number of hosts, with equal numbers of ranks.
        memory_bytes: memory per rank; None to skip the check.
        bandwidths: bandwidths per rank; parts with an unknown bandwidth are left out of the step time.
    """

    world_size: int
    num_hosts: int = 1
    memory_bytes: int | None = None
    bandwidths: Bandwidths = field(default_factory=Bandwidths)


def print_plan(workload: Workload, request: Request) -> bool:
    """Prints the plan; returns whether the run fits into memory."""
    hosts = f" on {request.num_hosts:,} hosts" if request.num_hosts > 1 else ""
    print(f"{request.world_size:,} rank{'s' * (request.world_size > 1)}{hosts}")
    _print_tables(workload, request.world_size)
    fits = _print_memory(workload, request)
    whole = checkpoint_bytes(workload)
    print(
        f"checkpoint   {format_bytes(whole / request.world_size)} per rank, {format_bytes(whole)} in all, "
        f"{format_bytes(whole * workload.num_checkpoints)} for up to {workload.num_checkpoints} in the run folder"
    )
    exchange = exchange_of(workload, request.world_size)
    print(
        f"exchange     {format_bytes(exchange.total)} sent by each rank per step: ids {format_bytes(exchange.ids)}, "
        f"vectors {format_bytes(exchange.vectors)}, gradients {format_bytes(exchange.gradients)}"
        + (f", dense gradients {format_bytes(exchange.dense)}" if exchange.dense else "")
    )
    if exchange.at_owner:
        print(f"             bags are pooled by the owners of their rows: {printable(', '.join(exchange.at_owner))}")
    _print_least_time(workload, request, exchange.total)
    return fits


def _print_tables(workload: Workload, world_size: int) -> None:
    print(
        f"{'table':<16} {'rows':>16} {'dim':>5} {'rows per rank':>14} {'weights':>11} {'state':>11} "
        f"{'distinct rows':>16}"
    )
    for table in workload.tables:
        rows = layout_of(table.num_rows, world_size).rows_per_rank
        print(
            f"{printable(table.name):<16} {table.num_rows:>16,} {table.dim:>5} {rows:>14,} "
            f"{format_bytes(rows * table.weight_bytes):>11} {format_bytes(rows * table.state_bytes):>11} "
            f"{table.distinct_of_rank(world_size)[0]:>16,.0f}"
        )


def _print_memory(workload: Workload, request: Request) -> bool:
    memory = memory_of(workload, request.world_size)
    parts = {
        "weights": memory.weights,
        "state": memory.state,
        "dense part": memory.dense,
        "buffers": memory.buffers,
        "background save at most": memory.save,
    }
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    print(f"memory       {format_bytes(memory.total)} per rank: {listed}")
    if request.num_hosts > 1:
        per_host = memory.total * request.world_size / request.num_hosts
        print(f"             {format_bytes(per_host)} per host")
    if request.memory_bytes is None:
        return True
    if memory.total <= request.memory_bytes:
        print(f"             fits into {format_bytes(request.memory_bytes)}")
        return True
    excess = memory.total - request.memory_bytes
    print(
        f"             DOES NOT FIT into {format_bytes(request.memory_bytes)}: {format_bytes(excess)} per rank too much"
    )
    found = remedies(workload, request.world_size, request.memory_bytes)
    for remedy in found:
        print(f"             would fit with {remedy.change}: {format_bytes(remedy.total_bytes)}")
    if not found:
        print("             no single change of dtype, ranks or dim makes it fit: combine them")
    return False


def _print_least_time(workload: Workload, request: Request, sent_bytes: int) -> None:
    seconds = least_seconds(workload, request.world_size, request.bandwidths)
    if not seconds:
        return
    print(f"step         at least {sum(seconds.values()) * 1e3:.2f} ms")
    moved_bytes = traffic_bytes(workload, request.world_size)
    left_out = []
    for name, moved, bandwidth in (
        ("rows", f"{format_bytes(moved_bytes)} read and written", request.bandwidths.memory),
        ("exchange", f"{format_bytes(sent_bytes)} sent", request.bandwidths.exchange),
    ):
        if bandwidth is not None:
            print(f"             {name} {seconds[name] * 1e3:.2f} ms: {moved} at {format_bytes(bandwidth)}/s")
        elif name == "rows" or request.world_size > 1:
            left_out.append(f"{name} (bandwidth unknown)")
    left_out += ["the model's arithmetic", "sorting ids", "reading data", "waiting for other ranks"]
    print(f"             left out: {', '.join(left_out)}; train --dry-run times real steps")
