"""The plan in words and numbers."""

from __future__ import annotations

from dataclasses import dataclass

from embedtrain.planning.sizes import format_bytes
from embedtrain.sharding.layout import layout_of
from embedtrain.sharding.machine import Machine
from embedtrain.sharding.plan import (
    Workload,
    checkpoint_bytes,
    exchange_of,
    memory_of,
    remedies,
    seconds_of,
)


@dataclass(frozen=True)
class Request:
    """What a plan is for.

    Attributes:
        world_size: ranks.
        num_hosts: that they are spread over evenly.
        memory_bytes: of each rank; None where any will do.
        machine: rates; None leaves times out.
    """

    world_size: int
    num_hosts: int = 1
    memory_bytes: int | None = None
    machine: Machine | None = None


def print_plan(workload: Workload, request: Request) -> bool:
    """Prints the plan; returns whether it fits into the memory."""
    hosts = f" on {request.num_hosts:,} hosts" if request.num_hosts > 1 else ""
    print(f"{request.world_size:,} ranks{hosts}")
    _print_tables(workload, request.world_size)
    fits = _print_memory(workload, request)
    whole = checkpoint_bytes(workload)
    print(
        f"checkpoint   {format_bytes(whole / request.world_size)} a rank, {format_bytes(whole)} in all, "
        f"{format_bytes(whole * workload.num_checkpoints)} for the {workload.num_checkpoints} that may lie there"
    )
    exchange = exchange_of(workload, request.world_size)
    print(
        f"exchange     {format_bytes(exchange.total)} sent by each rank in a step: ids {format_bytes(exchange.ids)}, "
        f"vectors {format_bytes(exchange.vectors)}, gradients {format_bytes(exchange.gradients)}"
        + (f", dense gradients {format_bytes(exchange.dense)}" if exchange.dense else "")
    )
    if exchange.at_owner:
        print(f"             bags are pooled at the owners of their rows: {', '.join(exchange.at_owner)}")
    if request.machine is not None:
        _print_times(workload, request, request.machine)
    return fits


def _print_tables(workload: Workload, world_size: int) -> None:
    print(
        f"{'table':<16} {'rows':>16} {'dim':>5} {'rows a rank':>14} {'weights':>11} {'state':>11} "
        f"{'distinct a step':>16}"
    )
    for table in workload.tables:
        rows = layout_of(table.num_rows, world_size).rows_per_rank
        print(
            f"{table.name:<16} {table.num_rows:>16,} {table.dim:>5} {rows:>14,} "
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
    print(f"memory       {format_bytes(memory.total)} a rank: {listed}")
    if request.num_hosts > 1:
        per_host = memory.total * request.world_size / request.num_hosts
        print(f"             {format_bytes(per_host)} a host")
    if request.memory_bytes is None:
        return True
    if memory.total <= request.memory_bytes:
        print(f"             fits into {format_bytes(request.memory_bytes)}")
        return True
    excess = memory.total - request.memory_bytes
    print(
        f"             DOES NOT FIT into {format_bytes(request.memory_bytes)}: {format_bytes(excess)} too much a rank"
    )
    found = remedies(workload, request.world_size, request.memory_bytes)
    for remedy in found:
        print(f"             would fit with {remedy.change}: {format_bytes(remedy.total_bytes)}")
    if not found:
        print("             no single change of dtype, ranks or dim makes it fit: combine them")
    return False


def _print_times(workload: Workload, request: Request, machine: Machine) -> None:
    seconds = seconds_of(workload, request.world_size, machine, request.num_hosts)
    total = sum(seconds.values())
    stages = ", ".join(f"{name} {value * 1e3:.2f}" for name, value in seconds.items() if value >= 5e-6)
    print(f"step         {total * 1e3:.2f} ms by the rates of {machine.name} ({stages})")
    if machine.num_ranks == 1 < request.world_size:
        print("             rates of one rank, to which exchanging costs nothing: measure on as many as share a host")
    if request.num_hosts > 1 and machine.network_bytes_per_second is None:
        print("             hosts are taken to exchange as fast as the ranks of one: give network_bytes_per_second")
