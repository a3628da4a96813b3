"""What a rank's pretended GPU remembers: when each stream may read, write and free memory, and when the host waited.

Time is a vector clock: per stream, how many of its launches are known to be done. A stream knows of another one's
launches if it waited for the stream, for an event of it, or if the host waited for it before the launch.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)
MAIN = "main"

_here = threading.local()

Clock = collections.Counter


class Wait(NamedTuple):
    """A wait of the host for the device.

    Attributes:
        kind: what made it wait.
        place: the lines of the package that led there.
        num_left: launches on the main stream that the wait left in its queue.
    """

    kind: str
    place: str
    num_left: int


class Collective(NamedTuple):
    """A collective that a rank took part in: of which group, of what kind, and from which device's memory."""

    group: str
    kind: str
    device: str


@dataclass
class Memory:
    """The storage of a tensor on the device.

    Attributes:
        storage: keeps it alive until it is reaped.
        home: the stream that allocated it, and uses the memory again once no tensor refers to it.
        made_at: the lines of the package that allocated it.
        write: the last launch that wrote: its stream, number and name.
        uses: by stream, the last launch that read or wrote.
        recorded: streams that `record_stream` named.
    """

    storage: torch.UntypedStorage
    home: str
    made_at: str
    write: tuple[str, int, str] | None = None
    uses: dict[str, int] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)


@dataclass
class Pinned:
    """The storage of a tensor in pinned memory of the host.

    Attributes:
        storage: keeps it alive: the address of a freed one would be taken for it.
        reads: by stream, the last launch that copies from it to the device.
        writes: by stream, the last launch that copies to it.
    """

    storage: torch.UntypedStorage
    reads: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)


def key_of(tensor: Tensor) -> int:
    """Returns what tells storages apart."""
    return tensor.untyped_storage()._cdata


class FakeDevice:
    """One rank's device.

    Args:
        runs_kernels: whether Triton's kernels compute, in its interpreter, which takes most of the time. Else what they
            write stays as it is, and all that depends on values alone means nothing.

    Attributes:
        waits: of the host.
        hazards: what a real device may do wrong, in words.
        launches: names of kernels and copies.
        collectives: in order.
        unordered_sums: operations of torch that add floats by atomics on a GPU, in another order each time.
        copies_to_host: the stream of each, and whether the host went on meanwhile.
    """

    def __init__(self, *, runs_kernels: bool = True) -> None:
        self.runs_kernels = runs_kernels
        self.memory: dict[int, Memory] = {}
        self.pinned: dict[int, Pinned] = {}
        self.current = MAIN
        self.num_streams = 0
        self.num_groups = 0
        self.is_paused = False
        self._clocks: dict[str, Clock[str]] = collections.defaultdict(Clock)
        self._host: Clock[str] = Clock()
        self._last_collective: dict[str, tuple[str, int]] = {}
        self.waits: list[Wait] = []
        self.hazards: list[str] = []
        self.launches: list[str] = []
        self.collectives: list[Collective] = []
        self.copies_to_host: list[tuple[str, bool]] = []
        self.unordered_sums: list[str] = []

    def forget_step(self) -> None:
        """Begins the record of a step; hazards, and what is known of memory and of order, stay."""
        self.waits, self.launches, self.collectives = [], [], []

    def holds(self, tensor: object) -> bool:
        """Returns whether a tensor lies on the device."""
        return not self.is_paused and isinstance(tensor, Tensor) and key_of(tensor) in self.memory

    def take(self, tensor: Tensor) -> bool:
        """Has a tensor's memory lie on the device from now on; returns whether it is new there."""
        is_new = key_of(tensor) not in self.memory
        if is_new:
            self.memory[key_of(tensor)] = Memory(tensor.untyped_storage(), self.current, _place())
        return is_new

    def pin(self, tensor: Tensor) -> Tensor:
        """Has a tensor's memory be pinned from now on."""
        self.pinned[key_of(tensor)] = Pinned(tensor.untyped_storage())
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Returns whether a tensor of the host lies in pinned memory."""
        return key_of(tensor) in self.pinned

    def launch(self, name: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """Queues a kernel on the current stream."""
        stream, clock = self.current, self._clocks[self.current]
        clock |= self._host
        clock[stream] += 1
        now = clock[stream]
        self.launches.append(name)
        for memory in self._of(reads):
            write = memory.write
            if write is not None and write[1] > clock[write[0]]:
                self._fault(f"{name} on {stream} reads what {write[2]} writes on {write[0]}, in no order")
            memory.uses[stream] = now
        for memory in self._of(writes):
            if any(number > clock[other] for other, number in memory.uses.items() if other != stream):
                self._fault(f"{name} on {stream} writes over memory that another stream uses, in no order")
            memory.write, memory.uses[stream] = (stream, now, name), now

    def copy_from_host(self, source: Tensor, target: Tensor, *, is_async: bool) -> None:
        """Queues a copy to the device, for which the host waits unless it may go on and the memory is pinned."""
        self.launch("copy to device", [], [target])
        if is_async and self.is_pinned(source):
            self.pinned[key_of(source)].reads[self.current] = self._clocks[self.current][self.current]
        else:
            self.wait("copy of pageable memory to the device", self._clocks[self.current])

    def copy_to_host(self, source: Tensor, target: Tensor, *, is_async: bool) -> None:
        """Queues a copy to the host, which waits unless it may go on and the memory is pinned."""
        self.launch("copy to host", [source], [])
        is_async = is_async and self.is_pinned(target)
        self.copies_to_host.append((self.current, is_async))
        if is_async:
            self.pinned[key_of(target)].writes[self.current] = self._clocks[self.current][self.current]
        else:
            self.wait("copy to the host", self._clocks[self.current])

    def check_host_use(self, name: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """Checks that no copy of pinned memory is under way that an operation of the host disturbs."""
        for tensor, of_whom in [(each, ("writes",)) for each in reads] + [(e, ("reads", "writes")) for e in writes]:
            pinned = self.pinned.get(key_of(tensor))
            for each in of_whom if pinned is not None else ():
                if any(number > self._host[stream] for stream, number in getattr(pinned, each).items()):
                    self._fault(f"the host's {name} uses pinned memory while a copy of it is under way")

    def collective(self, group: str, kind: str, tensors: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """Queues a collective on the current stream; those of one communicator must not overlap another's."""
        tensors = list(tensors)
        is_here = any(map(self.holds, tensors))
        self.collectives.append(Collective(group, kind, "cuda" if is_here else "cpu"))
        if not is_here:
            return
        known = self._clocks[self.current] | self._host
        for other, (stream, number) in self._last_collective.items():
            if other != group and stream != self.current and number > known[stream]:
                self._fault(f"{kind} of {group} on {self.current} and a collective of {other} are in no order")
        self.launch(f"{kind} of {group}", tensors, writes)
        self._last_collective[group] = (self.current, self._clocks[self.current][self.current])

    def wait(self, kind: str, clock: Clock[str]) -> None:
        """Has the host wait until the launches that a clock counts are done."""
        left = self._clocks[MAIN][MAIN] - max(clock[MAIN], self._host[MAIN])
        self.waits.append(Wait(kind, _place(), left))
        self._host |= clock

    def wait_for_current(self, kind: str) -> None:
        """Has the host wait for all that is queued on the current stream."""
        self.wait(kind, self._clocks[self.current])

    def wait_if_unknown(self, kind: str, clock: Clock[str]) -> None:
        """Has the host wait, unless it knows that all is done."""
        if any(number > self._host[stream] for stream, number in clock.items()):
            self.wait(kind, clock)

    def clock_of(self, stream: str) -> Clock[str]:
        """Returns what a stream's next launch comes after."""
        return Clock(self._clocks[stream])

    def order(self, stream: str, clock: Clock[str]) -> None:
        """Has all that is queued on a stream from now on come after what a clock counts."""
        self._clocks[stream] |= clock

    def reap(self) -> None:
        """Lets go of memory that no tensor refers to, as the allocator does: its stream may write to it at once."""
        for key, memory in list(self.memory.items()):
            if torch._C._storage_Use_Count(memory.storage._cdata) > 1:
                continue
            known = self._clocks[memory.home] | self._host
            for stream, number in memory.uses.items():
                if stream not in (memory.home, *memory.recorded) and number > known[stream]:
                    self._fault(
                        f"memory of {memory.home} (made at {memory.made_at}) is freed while {stream} may use it: "
                        "record_stream does not name it"
                    )
            del self.memory[key]
        for key, pinned in list(self.pinned.items()):
            if torch._C._storage_Use_Count(pinned.storage._cdata) <= 1:
                del self.pinned[key]

    def found(self, hazard: str) -> None:
        """Takes note of something that a real device would refuse or do wrong."""
        self._fault(hazard)

    def add_in_no_order(self, name: str) -> None:
        """Takes note of an operation whose result a GPU rounds otherwise each time."""
        self.unordered_sums.append(f"{name} @ {_place()}")

    def _fault(self, hazard: str) -> None:
        self.hazards.append(f"{hazard} @ {_place()}")

    def _of(self, tensors: Iterable[Tensor]) -> list[Memory]:
        return [self.memory[key_of(tensor)] for tensor in tensors if key_of(tensor) in self.memory]


def current() -> FakeDevice | None:
    """Returns the device of the rank that runs in this thread; None outside one, or while it is paused."""
    device: FakeDevice | None = getattr(_here, "device", None)
    return None if device is None or device.is_paused else device


@contextlib.contextmanager
def entered(device: FakeDevice) -> Iterator[None]:
    """Makes a device this thread's."""
    _here.device = device
    try:
        yield
    finally:
        _here.device = None


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Has this thread's tensors be what they are, for what stands for the device's own work."""
    device: FakeDevice | None = getattr(_here, "device", None)
    was = device.is_paused if device is not None else False
    if device is not None:
        device.is_paused = True
    try:
        yield
    finally:
        if device is not None:
            device.is_paused = was


def _place() -> str:
    """Returns the innermost lines of the package on the stack."""
    found: list[str] = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename
        if "/embedtrain/" in name and "/testing/" not in name:
            found.append(f"{name[name.rindex('embedtrain/') :]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)
