"""How fast a kernel can move rows, by what its machine code keeps in flight: the first run on a card tests it.

By Little's law, bytes per second are the bytes in flight over the latency of a load. A multiprocessor has in flight
what each of its threads asks for before it waits, times the threads that fit on it. A card has that times its
multiprocessors, and no more than the bandwidth of its memory. Loads of places (which row is wanted) take a latency of
their own before the loads of rows, so bytes in flight are a mean over the waits of a program, or of the body of its
loop. Stores are not waited for, and come free up to the bandwidth.

What is assumed stands here and nowhere else:

* `LATENCY_SECONDS`, of a load from a card's memory while that is busy. An idle H100 takes 479 cycles and an A100 466,
  which are 0.27 and 0.33 microseconds (Luo et al. 2024, "Benchmarking and dissecting the Nvidia Hopper GPU architecture
  via microbenchmarking", table 4); twice that is assumed for a queue and for addresses that are at random in gigabytes.
* Bandwidths and multiprocessors of `CARDS`: NVIDIA's data sheets of A100 SXM 80 GB and H200 SXM. A copy reaches about
  nine tenths of it, so the first run compares with the copy that it measures itself.
* Registers, shared memory and warps per multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

LATENCY_SECONDS = 600e-9

_LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9_.]+)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_PLACES = ("IMAD", "LEA", "ISETP", "IADD", "VIADD", "SHF.", "R2UR")
"""What the values of places go into first: products and sums of addresses, and comparisons."""
_VALUES = ("IMAD.U32", "IMAD.MOV", "IMAD.SHL", "SHF.L", "SHF.R.U32")
"""What begins so too, and takes values of rows: bfloat16 becomes float32, or the other way round, in the high half."""


@dataclass(frozen=True)
class Card:
    """What a card has.

    Attributes:
        name: of the card.
        bandwidth: of its memory, bytes per second.
        num_multiprocessors: how many it has.
        shared_bytes: shared memory of a multiprocessor.
        registers: of a multiprocessor.
        warps: the most of a multiprocessor.
        programs: the most of a multiprocessor.
    """

    name: str
    bandwidth: float
    num_multiprocessors: int
    shared_bytes: int
    registers: int = 1 << 16
    warps: int = 64
    programs: int = 32


CARDS = {
    80: Card("A100 SXM 80 GB", 2.039e12, 108, 164 << 10),
    90: Card("H200 SXM", 4.8e12, 132, 228 << 10),
}
"""By compute capability."""


@dataclass(frozen=True)
class Launch:
    """What a launch takes of a multiprocessor.

    Attributes:
        num_warps: of a program.
        registers: of a thread.
        shared_bytes: of a program.
        share: of the columns of its tiles, how many are columns of rows.
    """

    num_warps: int
    registers: int
    shared_bytes: int
    share: float

    def warps_on(self, card: Card) -> int:
        """Returns the warps that are on a multiprocessor at once."""
        of_warp = -(-self.registers * 32 // 256) * 256
        limits = [card.programs, card.warps // self.num_warps, card.registers // (of_warp * self.num_warps)]
        # Each program takes a kilobyte more for the system.
        limits.append(card.shared_bytes // (self.shared_bytes + 1024))
        return min(limits) * self.num_warps


@dataclass
class _Load:
    num_bytes: int
    is_place: bool | None = None


@dataclass
class Flight:
    """What a thread loads and stores in a program, or in the body of its loop.

    Attributes:
        num_waits: how often it waits for what it loaded.
        loaded_bytes: of rows.
        stored_bytes: of rows; 0 in a loop, which stores now and then.
    """

    num_waits: int = 0
    loaded_bytes: int = 0
    stored_bytes: int = 0
    _loads: list[_Load] = field(default_factory=list, repr=False)


def flight_of(listing: str) -> Flight:
    """Returns what a thread has in flight, from the listing of `nvdisasm --print-code`."""
    code, loop = _code_and_loop(listing)
    flight = Flight()
    outstanding: set[int] = set()
    unused: dict[int, _Load] = {}
    # What a loop loads for its next turn is waited for there: its second turn is like all that follow.
    for _turn in range(2 if loop else 1):
        flight.num_waits, flight._loads, flight.stored_bytes = 0, [], 0
        for operation, operands in code[slice(*loop) if loop else slice(None)]:
            registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
            if outstanding.intersection(registers):
                flight.num_waits += 1
                outstanding.clear()
            # The first operand of what is no store is written, not read.
            for register in registers[operands.startswith("R") and not operation.startswith("ST") :]:
                if (load := unused.pop(register, None)) is not None and load.is_place is None:
                    load.is_place = operation.startswith(_PLACES) and not operation.startswith(_VALUES)
            if operation.startswith("LDG"):
                load = _Load(_width_of(operation))
                flight._loads.append(load)
                loaded = range(registers[0], registers[0] + max(1, load.num_bytes // 4))
                outstanding.update(loaded)
                unused.update(dict.fromkeys(loaded, load))
            elif operation.startswith("STG") and not loop:
                flight.stored_bytes += _width_of(operation)
    flight.loaded_bytes = sum(load.num_bytes for load in flight._loads if load.is_place is False)
    return flight


def bytes_per_second(flight: Flight, launch: Launch, card: Card) -> float:
    """Returns what a multiprocessor can read and write, if nothing but the latency of its loads limits it."""
    moved = (flight.loaded_bytes + flight.stored_bytes) * launch.share
    return launch.warps_on(card) * 32 * moved / (max(1, flight.num_waits) * LATENCY_SECONDS)


def _code_and_loop(listing: str) -> tuple[list[tuple[str, str]], tuple[int, int] | None]:
    """Returns operations with their operands, and where the loop with most loads begins and ends; None without one."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _LINE.search(line):
            code.append((found[1], found[2]))
    loops = [(labels[name], end) for end, name in _jumps(code) if labels.get(name, end) < end]
    loop = max(loops, key=lambda ends: _num_loads(code[slice(*ends)]), default=None)
    return code, loop if loop is not None and _num_loads(code[slice(*loop)]) else None


def _jumps(code: Sequence[tuple[str, str]]) -> list[tuple[int, str]]:
    found = ((place, re.search(r"`\((\.L_x_\d+)\)", operands)) for place, (_, operands) in enumerate(code))
    return [(place, target[1]) for place, target in found if target is not None and code[place][0].startswith("BRA")]


def _num_loads(code: Sequence[tuple[str, str]]) -> int:
    return sum(operation.startswith("LDG") for operation, _ in code)


def _width_of(operation: str) -> int:
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1}
    return next((widths[part] for part in operation.split(".") if part in widths), 4)
