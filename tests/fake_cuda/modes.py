"""CPU tensors that say they are on a GPU: torch's functions, streams and Triton's launches, seen by `FakeDevice`."""

from __future__ import annotations

import collections
import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from tests.fake_cuda.device import CUDA, MAIN, Clock, FakeDevice, current, entered, key_of, paused

_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "masked_select",
    "bincount",
    "equal",
    "is_nonzero",
}
"""Operations whose results, or their sizes, the host must know."""
_ADDING_IN_NO_ORDER = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "put_", "cumsum"}
"""Operations that add by atomics on a GPU; of integers, the order changes nothing. (`index_put_` sorts.)"""
_MAY_MIX = {
    "copy_",
    "to",
    "view_as",
    "type_as",
    "set_",
    "set_data",
    "__get__",
    "__set__",
    "backward",
    "_has_compatible_shallow_copy_type",
}
"""Functions that take tensors of both memories. Of indexing, an index may lie on the host."""
_INDEXING = {"__setitem__", "__getitem__", "index_put_", "index_put"}
_WRITTEN = {
    "gathered",
    "pooled",
    "sums",
    "heads",
    "weight",
    "first",
    "second",
    "context_grad",
    "target_grad",
    "loss",
    "damped",
}
"""Parameters of the package's kernels that they write to."""

_WRITTEN_BY = {
    "_draw_widths": {"widths"},
    "_write_kept": {"words", "targets", "sentences", "width_of_word"},
    "_iterate": {"values", "vectors"},
}
"""Further ones, of single kernels."""

_real_device = torch.Tensor.device
_real_is_cuda = torch.Tensor.is_cuda


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Operations(TorchDispatchMode):
    """Sees every operation of torch, those of backward too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = kwargs or {}, current()
        if device is None:
            return func(*args, **kwargs)
        given = _tensors(args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        on_device = [tensor for tensor in given if device.holds(tensor)]
        if not on_device:
            written = [value for value, spec in zip(args, func._schema.arguments, strict=False) if _is_written(spec)]
            device.check_host_use(name, given, _tensors(written))
            return func(*args, **kwargs)
        keys = {key_of(tensor) for tensor in given}
        out = func(*args, **kwargs)
        results = _tensors(out)
        if name == "copy_" and len({device.holds(tensor) for tensor in args[:2]}) == 2:
            self._copy(device, args, kwargs)
            return out
        _note_wait(device, name, args, kwargs)
        if name in _ADDING_IN_NO_ORDER and any(each.is_floating_point() for each in results):
            device.add_in_no_order(name)
        is_view = not func._schema.is_mutable and results and all(key_of(each) in keys for each in results)
        if name == "_local_scalar_dense" or is_view:
            return out
        for each in results:
            device.take(each)
        written = [value for value, spec in zip(args, func._schema.arguments, strict=False) if _is_written(spec)]
        device.launch(name, on_device, [each for each in (*results, *_tensors(written)) if device.holds(each)])
        device.reap()
        return out

    def _copy(self, device: FakeDevice, args: Any, kwargs: Mapping[str, Any]) -> None:
        target, source = args[:2]
        is_async = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if device.holds(target):
            if source.dim():  # a single number travels with the launch
                device.copy_from_host(source, target, is_async=is_async)
            else:
                device.launch("fill_", [], [target])
        else:
            device.copy_to_host(source, target, is_async=is_async)


def _is_written(spec: Any) -> bool:
    return spec.alias_info is not None and bool(spec.alias_info.is_write)


def _note_wait(device: FakeDevice, name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Has the host wait if an operation on the device makes it."""
    if name in _WAITING:
        device.wait_for_current(name)
    elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        if any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]):
            device.wait_for_current(f"{name} by a mask")
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        device.wait_for_current("repeat_interleave without output_size")


class _Functions(TorchFunctionMode):
    """Sees every function of torch before autograd does: where tensors are made and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = dict(kwargs or {}), current()
        if device is None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        special = getattr(self, f"_{name}", None)
        if special is not None:
            return special(device, func, args, kwargs)
        wanted = None
        if kwargs.get("device") is not None:
            wanted = torch.device(kwargs["device"]).type
            kwargs["device"] = torch.device("cpu")
        is_pinned = kwargs.pop("pin_memory", False)
        self._check_memories(device, name, args, kwargs)
        # What was not written would be whatever is there: zeros are the same in every run.
        func = {"empty": torch.zeros, "new_empty": Tensor.new_zeros, "empty_like": torch.zeros_like}.get(name, func)
        if name == "empty":
            kwargs.pop("memory_format", None)
        out = func(*args, **kwargs)
        if is_pinned:
            device.pin(out)
        if wanted == "cuda":
            for tensor in _tensors(out):
                if device.take(tensor):
                    device.launch(name, [], [tensor])
                    if name in ("tensor", "as_tensor", "asarray"):
                        device.wait_for_current(f"torch.{name} on the device")
        return out

    def _check_memories(self, device: FakeDevice, name: str, args: Any, kwargs: Any) -> None:
        if name in _MAY_MIX or "backward" in name:
            return
        if name in _INDEXING:
            # A mask or an index on the host is copied, for which the host waits.
            index = args[1]
            if device.holds(args[0]) and any(each.dim() and not device.holds(each) for each in _tensors(index)):
                device.wait_for_current(f"{name} by an index on the host")
            return
        kinds = {device.holds(tensor) for tensor in _tensors(args, kwargs) if tensor.dim()}
        if len(kinds) == 2:
            device.found(f"{name} takes tensors of the host and of the device")

    def _to(self, device: FakeDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        source, wanted = args[0], None
        rest = list(args[1:])
        for position, value in enumerate(rest):
            if isinstance(value, torch.device | str):
                wanted, rest[position] = torch.device(value).type, torch.device("cpu")
            elif isinstance(value, Tensor):
                wanted = "cuda" if device.holds(value) else "cpu"
        if kwargs.get("device") is not None:
            wanted, kwargs["device"] = torch.device(kwargs["device"]).type, torch.device("cpu")
        is_async = bool(kwargs.get("non_blocking", False)) or any(value is True for value in rest)
        if wanted is None or (wanted == "cuda") == device.holds(source):
            return func(source, *rest, **kwargs)
        if wanted == "cpu":
            return func(self._cpu(device, func, (source,), {}), *rest, **kwargs)
        with paused():  # the copy below is what the device does
            copied = func(source, *rest, **{**kwargs, "copy": True})
        device.take(copied)
        device.copy_from_host(source, copied, is_async=is_async)
        return copied

    def _cpu(self, device: FakeDevice, func: Any, args: Any, kwargs: Any) -> Any:
        source = args[0]
        if not device.holds(source):
            return source
        with paused():
            copied = source.clone()
        device.copy_to_host(source, copied, is_async=False)
        return copied

    def _cuda(self, device: FakeDevice, func: Any, args: Any, kwargs: Any) -> Any:
        return self._to(device, Tensor.to, (args[0], CUDA), kwargs)

    def _pin_memory(self, device: FakeDevice, func: Any, args: Any, kwargs: Any) -> Any:
        return device.pin(args[0].clone())

    def _is_pinned(self, device: FakeDevice, func: Any, args: Any, kwargs: Any) -> bool:
        return device.is_pinned(args[0])

    def _tolist(self, device: FakeDevice, func: Any, args: Any, kwargs: Any) -> Any:
        if device.holds(args[0]):
            device.wait_for_current("tolist")
        else:
            device.check_host_use("tolist", [args[0]], [])
        return func(*args, **kwargs)

    def _numpy(self, device: FakeDevice, func: Any, args: Any, kwargs: Any) -> Any:
        if device.holds(args[0]):
            raise TypeError("a tensor of the device has no numpy array")
        return func(*args, **kwargs)

    def _new_tensor(self, device: FakeDevice, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if device.holds(args[0]):
            device.take(out)
            device.launch("new_tensor", [], [out])
            device.wait_for_current("new_tensor")
        return out


def _record_stream(tensor: Tensor, stream: Any) -> None:
    device = current()
    if device is not None and device.holds(tensor):
        device.memory[key_of(tensor)].recorded.add(stream.name)


class Stream:
    """Stands for `torch.cuda.Stream`."""

    def __init__(self, device: Any = None, priority: int = 0, *, name: str | None = None) -> None:
        if name is None:
            own = current()
            assert own is not None
            own.num_streams += 1
            name = f"stream {own.num_streams}"
        self.name, self.device, self.priority = name, CUDA, priority

    def wait_stream(self, other: Stream) -> None:
        device = current()
        assert device is not None
        device.order(self.name, device.clock_of(other.name))

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        device = current()
        assert device is not None
        device.wait_if_unknown(f"synchronize of {self.name}", device.clock_of(self.name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class Event:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._clock: Clock[str] = collections.Counter()

    def record(self, stream: Stream | None = None) -> None:
        device = current()
        assert device is not None
        self._clock = device.clock_of(device.current if stream is None else stream.name)

    def wait(self, stream: Stream | None = None) -> None:
        device = current()
        assert device is not None
        device.order(device.current if stream is None else stream.name, self._clock)

    def synchronize(self) -> None:
        device = current()
        assert device is not None
        device.wait_if_unknown("synchronize of an event", self._clock)

    def query(self) -> bool:
        """Says yes, as it does in the end; whoever asks waits for that."""
        device = current()
        assert device is not None
        device.wait_if_unknown("polling of an event", self._clock)
        return True


@contextlib.contextmanager
def _on_stream(stream: Stream) -> Iterator[None]:
    device = current()
    assert device is not None
    was, device.current = device.current, stream.name
    try:
        yield
    finally:
        device.current = was


def _current_stream(device: Any = None) -> Stream:
    own = current()
    assert own is not None
    return Stream(name=own.current)


def _synchronize(device: Any = None) -> None:
    own = current()
    assert own is not None
    own.wait_for_current("torch.cuda.synchronize")


def _backward(self: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False) -> None:
    """`Tensor.backward`, which torch would call with the modes switched off."""
    seed = torch.ones_like(self) if gradient is None else gradient
    _engine_run_backward(
        (self,), (seed,), bool(retain_graph), create_graph, (), allow_unreachable=True, accumulate_grad=True
    )


_group_by_device = torch.optim.Optimizer._group_tensors_by_device_and_dtype


def _grouped(tensors: Any, with_indices: bool = False) -> Any:
    """Torch's optimizers see where tensors really are, and would move what else they take there."""
    device = current()
    groups = _group_by_device(tensors, with_indices)
    if device is None or not any(map(device.holds, tensors[0])):
        return groups
    return {(CUDA, dtype): group for (_, dtype), group in groups.items()}


_run_interpreted = interpreter.GridExecutor.__call__


def _run_kernel(executor: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
    """Runs a kernel of Triton in its interpreter, and takes note of what it reads and writes."""
    device = current()
    if device is None:
        _run_interpreted(executor, *args, **kwargs)
        return
    written = _WRITTEN | _WRITTEN_BY.get(executor.fn.__name__, set())
    names = [*inspect.signature(executor.fn).parameters]
    tensors = {
        name: value
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items()
        if isinstance(value, Tensor)
    }
    for name, tensor in tensors.items():
        if not device.holds(tensor):
            device.found(f"the kernel {executor.fn.__name__} is given {name} in the host's memory")
    with paused():
        before = {name: tensor.clone() for name, tensor in tensors.items() if name not in written}
        shared = {key_of(tensor) for name, tensor in tensors.items() if name in written}
        if device.runs_kernels:
            _run_interpreted(executor, *args, **kwargs)
        for name, values in before.items():
            # A parameter that a kernel does not read may be given any tensor.
            assert key_of(tensors[name]) in shared or torch.equal(values.nan_to_num(), tensors[name].nan_to_num()), (
                f"{name} is written to"
            )
    device.launch(executor.fn.__name__, tensors.values(), [t for name, t in tensors.items() if name in written])


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has torch ask the device of the thread's rank, if it has one, wherever it would ask a real one."""

    def device_of(tensor: Tensor) -> torch.device:
        own = current()
        return CUDA if own is not None and own.holds(tensor) else _real_device.__get__(tensor)

    def is_cuda(tensor: Tensor) -> bool:
        own = current()
        return own is not None and own.holds(tensor)

    monkeypatch.setattr(Tensor, "device", property(device_of), raising=False)
    monkeypatch.setattr(Tensor, "is_cuda", property(is_cuda), raising=False)
    monkeypatch.setattr(Tensor, "backward", _backward)
    monkeypatch.setattr(Tensor, "record_stream", _record_stream)
    monkeypatch.setattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(_grouped))
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", _run_kernel)
    replaced = {
        "Stream": Stream,
        "Event": Event,
        "stream": _on_stream,
        "current_stream": _current_stream,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": _synchronize,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (64 << 20, 64 << 20),
        "max_memory_reserved": lambda device=None: 0,
    }
    for name, stand_in in replaced.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


@contextlib.contextmanager
def running_on(device: FakeDevice) -> Iterator[FakeDevice]:
    """Has this thread compute on a device."""
    with entered(device), _Functions(), _Operations():
        yield device


__all__ = ["MAIN", "Event", "FakeDevice", "Stream", "install", "running_on"]
