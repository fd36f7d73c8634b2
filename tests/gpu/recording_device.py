"""A stand-in for ``torch.cuda`` on a machine without GPUs: computes on the CPU, and watches what a GPU would suffer.

    with RecordingDevice(monkeypatch) as gpu:
        stage = DenoiseStage(dit.to("cuda:1"), ...)          # tensors lie "on" cuda:1, graphs are captured and replayed
        with gpu.step():
            stage.step(packet)
    assert gpu.findings == []

Every operation is a launch on the current stream of its tensors' device. Streams, events and the host carry vector
clocks, so that an order which nothing guarantees is found however it happened to turn out here:

- a launch that reads what another stream writes, without an event between them; a host that reads a copy under way;
- memory that is freed while another stream than the one it was born on uses it, and was not told (`record_stream`);
- a call that leaves the device open, and so asks whichever is current;
- inside `step`, the host waiting for the device;
- between begin and end of a capture, whatever a capture forbids.

All threads of a rank are played by one: `thread` begins one whose current device is 0, as CUDA does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
HOST = "host"
WAITING = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "nonzero", "unique", "masked_select", "equal"}
"""What brings a value, or a shape that depends on values, to the host."""
Clock = dict[Any, int]


def _merge(mine: Clock, other: Clock) -> None:
    for key, count in other.items():
        mine[key] = max(mine.get(key, 0), count)


@dataclass(eq=False)
class Stream:
    """A queue of launches, in order."""

    device: torch.device
    name: str
    gpu: RecordingDevice
    clock: Clock = field(default_factory=dict)

    def wait_event(self, event: Event) -> None:
        _merge(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        _merge(self.clock, other.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = Event(self.gpu) if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.gpu.host_waits(f"synchronize of {self.name}", self.clock)


class Event:
    """The state of a stream at one moment."""

    def __init__(self, gpu: RecordingDevice) -> None:
        self._gpu, self.clock = gpu, Clock()

    def record(self, stream: Stream | None = None) -> None:
        if stream is None:
            self._gpu.find("an event is recorded without a stream, on that of the current device")
            stream = self._gpu.current_stream(self._gpu.current)
        self._gpu.touched.add(stream.device)
        self.clock = dict(stream.clock)

    def query(self) -> bool:
        self._gpu.host_knows("query of an event", self.clock)
        return True

    def synchronize(self) -> None:
        self._gpu.host_waits("synchronize of an event", self.clock)

    def elapsed_time(self, end: Event) -> float:
        del end
        return 1.0


@dataclass(eq=False)
class Memory:
    """One storage: where it lies, which stream it was born on, and who wrote and read it last."""

    weak: StorageWeakRef
    device: torch.device
    birth: Stream | None
    pinned: bool = False
    written: Clock = field(default_factory=dict)
    read: Clock = field(default_factory=dict)
    told: set[Stream] = field(default_factory=set)
    what: str = ""


class Graph:
    """Calls that are made again at every replay, with their results brought to where they were."""

    def __init__(self, gpu: RecordingDevice) -> None:
        self._gpu = gpu
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordingDevice(TorchFunctionMode):
    """See the module. ``current`` is the current device of the thread that is played."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.findings: list[str] = []
        self.touched: set[torch.device] = set()
        """Devices with a context."""
        self.current = torch.device("cuda", 0)
        self._host = Clock()
        self._count: dict[Any, int] = {}
        self._memories: dict[int, Memory] = {}
        self._crossing: set[int] = set()
        """Those that another stream uses than the one they were born on."""
        self._num_sweeps = 0
        self._defaults: dict[torch.device, Stream] = {}
        self._streams: dict[torch.device, Stream] = {}
        self._inside_step = False
        self._capturing: tuple[Graph, Stream] | None = None
        self._patch(patch)

    def find(self, what: str) -> None:
        if what not in self.findings:
            self.findings.append(what)

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        names: dict[str, Any] = {
            "Stream": lambda device=None: self._new_stream(device),
            "Event": lambda **settings: Event(self),
            "CUDAGraph": lambda: Graph(self),
            "current_stream": lambda device=None: self.current_stream(self._named(device, "current_stream")),
            "synchronize": lambda device=None: self._synchronize(self._named(device, "synchronize")),
            "set_device": self._set_device,
            "current_device": lambda: self.current.index,
            "device": self._on_device,
            "device_of": lambda tensor: self._on_device(tensor.device),
            "stream": self._on_stream,
            "graph": self._capture,
            "graph_pool_handle": lambda: (0, 0),
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "get_device_capability": lambda device=None: (9, 0) if self._named(device, "get_device_capability") else (),
        }
        for name, value in names.items():
            patch.setattr(torch.cuda, name, value)
        # Asks for a real stream before anybody may intervene.
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: self._record_stream(tensor, stream))

    def _named(self, device: Any, call: str) -> torch.device:
        if device is None:
            self.find(f"torch.cuda.{call} is called without a device")
            return self.current
        device = torch.device(device)
        assert device.index is not None, f"torch.cuda.{call} is called with a device without a number"
        return device

    def _new_stream(self, device: Any) -> Stream:
        device = self._named(device, "Stream")
        self.touched.add(device)
        self._count["streams"] = number = self._count.get("streams", 0) + 1
        return Stream(device, f"stream {number} of {device}", self)

    def default_stream(self, device: torch.device) -> Stream:
        if device not in self._defaults:
            self._defaults[device] = Stream(device, f"the default stream of {device}", self)
        return self._defaults[device]

    def current_stream(self, device: torch.device) -> Stream:
        self.touched.add(device)
        return self._streams.get(device) or self.default_stream(device)

    def _set_device(self, device: Any) -> None:
        self.current = torch.device(device)
        self.touched.add(self.current)

    @contextlib.contextmanager
    def _on_device(self, device: Any) -> Generator[None]:
        before, self.current = self.current, torch.device(device)
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def _on_stream(self, stream: Stream) -> Generator[None]:
        before = self._streams.get(stream.device)
        self._streams[stream.device] = stream
        try:
            with self._on_device(stream.device):
                yield
        finally:
            del self._streams[stream.device]
            if before is not None:
                self._streams[stream.device] = before

    @contextlib.contextmanager
    def thread(self) -> Generator[None]:
        """What another thread of this process does: its current device is 0 and its streams are the default ones."""
        before = self.current, self._streams
        self.current, self._streams = torch.device("cuda", 0), {}
        try:
            yield
        finally:
            self.current, self._streams = before

    @contextlib.contextmanager
    def step(self) -> Generator[None]:
        """A step of the hot path, in which the host must not wait."""
        self._inside_step = True
        try:
            yield
        finally:
            self._inside_step = False

    @contextlib.contextmanager
    def _capture(self, graph: Graph, *, pool: object, stream: Stream, capture_error_mode: str) -> Generator[None]:
        del pool, capture_error_mode
        if self.current != stream.device:
            self.find(f"a capture on {stream.device} begins by waiting for {self.current}, which is current")
        for other in (self.default_stream(stream.device), self.current_stream(stream.device)):
            _merge(self._host, other.clock)  # torch waits for the device before a capture
        self._capturing = graph, stream
        try:
            with self._on_stream(stream):
                yield
        finally:
            self._capturing = None

    def host_waits(self, what: str, clock: Clock) -> None:
        if self._inside_step:
            self.find(f"the host waits inside a step: {what}")
        self.host_knows(what, clock)

    def host_knows(self, what: str, clock: Clock) -> None:
        if self._capturing is not None:
            self.find(f"a capture forbids it: {what}")
        _merge(self._host, clock)

    def _synchronize(self, device: torch.device) -> None:
        for stream in (self.default_stream(device), self.current_stream(device)):
            self.host_waits(f"synchronize of {device}", stream.clock)

    def memory_of(self, tensor: Tensor) -> Memory:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._memories:
                self._memories[key] = Memory(StorageWeakRef(storage), CPU, None)
            return self._memories[key]

    def _born(self, tensor: Tensor, device: torch.device, *, pinned: bool = False, what: str = "") -> Tensor:
        memory = self.memory_of(tensor)
        memory.device, memory.pinned, memory.what = device, pinned, what
        if device.type == "cuda" and self._capturing is None:  # what a graph allocates lives in its own pool
            memory.birth = self.current_stream(device)
        return tensor

    def sweep(self) -> None:
        """Look at what was freed since the last look: at once where several streams are concerned."""
        self._num_sweeps += 1
        keys = list(self._memories) if self._num_sweeps % 1000 == 0 else list(self._crossing)
        for key in keys:
            memory = self._memories[key]
            if memory.weak.expired():
                del self._memories[key]
                self._crossing.discard(key)
                self._freed(memory)

    def _freed(self, memory: Memory) -> None:
        if memory.birth is None:
            return
        for stream, count in [*memory.read.items(), *memory.written.items()]:
            known = max(self._host.get(stream, 0), memory.birth.clock.get(stream, 0))
            if stream is not memory.birth and stream not in memory.told and known < count:
                self.find(f"freed while {stream.name} uses it, born on {memory.birth.name}: record_stream is missing")

    def _use(self, who: Any, clock: Clock, reads: list[Tensor], writes: list[Tensor], name: str) -> None:
        """One launch of a stream, or one look of the host."""
        self._count[who] = count = self._count.get(who, 0) + 1
        clock[who] = count
        label = who if who is HOST else who.name
        for tensors, is_write in ((reads, False), (writes, True)):
            for memory in {id(m): m for m in map(self.memory_of, tensors)}.values():
                if memory.birth is not None and who is not memory.birth:
                    self._crossing.add(memory.weak.cdata)
                before = dict(memory.written)
                if is_write:
                    _merge(before, memory.read)
                for other, seen in before.items():
                    if other is not who and clock.get(other, 0) < seen:
                        other_label = other if other is HOST else other.name
                        self.find(f"race: {name} on {label} does not wait for {other_label}")
                if is_write:
                    memory.written, memory.read = {who: count}, {}
                else:
                    memory.read[who] = count

    def _launch(self, device: torch.device, reads: list[Tensor], writes: list[Tensor], name: str) -> None:
        stream = self.current_stream(device)
        if self._capturing is not None and stream is not self._capturing[1]:
            self.find(f"a capture forbids it: {name} on {stream.name}")
        if self._capturing is not None:
            return  # recorded, not done
        _merge(stream.clock, self._host)
        self._use(stream, stream.clock, reads, writes, name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = _SPECIAL.get(func) if getattr(func, "__hash__", None) else None
        if special is not None:
            return special(self, *args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        if target is not None:
            target = torch.device(target)
            if target.type == "cuda":
                kwargs["device"] = CPU
        pinned = bool(kwargs.pop("pin_memory", False))
        args, kwargs = tree_map(_to_cpu, args), tree_map(_to_cpu, kwargs)
        if self._capturing is not None and pinned:
            self.find("a capture forbids it: pinned memory")
        before = {self.memory_of(tensor).weak.cdata for tensor in inputs}
        result = func(*args, **kwargs)
        self._account(name, func, args, kwargs, inputs, result, before, target, pinned)
        self.sweep()
        return result

    def _account(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: list[Tensor],
        result: Any,
        before: set[int],
        target: torch.device | None,
        pinned: bool,
    ) -> None:
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        places = {self.memory_of(tensor).device for tensor in inputs} - {CPU}
        device = target or (next(iter(places)) if places else CPU)
        if len(places) > 1:
            self.find(f"{name} is given tensors of several devices")
        written = _written(name, func, args, kwargs)
        for tensor in outputs:
            if self.memory_of(tensor).weak.cdata not in before and not self.memory_of(tensor).what:
                self._born(tensor, device, pinned=pinned, what=name)
                written.append(tensor)
        if name in WAITING and places:
            self.host_waits(name, self.current_stream(device).clock)
        if name == "copy_":
            self._copy(args[0], args[1], non_blocking=bool(kwargs.get("non_blocking") or (args[2:] and args[2])))
        elif device.type == "cuda" and (written or (places and outputs and not _is_view(inputs, outputs))):
            self._launch(device, inputs, written, name)
        elif outputs and device == CPU and written:
            self._use(HOST, self._host, inputs, written, name)
        if self._capturing is not None and device.type == "cuda" and (outputs or written):
            self._capturing[0].calls.append((func, args, kwargs, result))

    def _copy(self, target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
        to, come = self.memory_of(target), self.memory_of(source)
        device = to.device if to.device.type == "cuda" else come.device
        if device == CPU:
            return self._use(HOST, self._host, [source], [target], "copy_")
        crosses = to.device != come.device
        host_side = come if come.device == CPU else to
        self._launch(device, [source], [target], "copy_")
        if crosses and (not non_blocking or not host_side.pinned) and source.dim() + target.dim():
            self.host_waits("a copy between host and device", self.current_stream(device).clock)
        return None

    def _moved(self, source: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        moved = torch.empty_like(source)
        self._born(moved, device, what="to")
        moved.copy_(source)
        self._copy(moved, source, non_blocking=non_blocking)
        if self._capturing is not None:
            self.find("a capture forbids it: a copy between host and device")
        return moved

    def _to(self, source: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, flags = kwargs.pop("device", None), kwargs.pop("dtype", None), []
        for arg in args:
            if isinstance(arg, Tensor):
                device, dtype = self.memory_of(arg).device, arg.dtype
            elif isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, bool):
                flags.append(arg)
            elif arg is not None:
                device = arg
        non_blocking = bool(kwargs.pop("non_blocking", flags[:1] == [True]))
        copy = bool(kwargs.pop("copy", flags[1:] == [True]))
        result = source
        if device is not None and torch.device(device) != self.memory_of(source).device:
            result, copy = self._moved(source, torch.device(device), non_blocking=non_blocking), False
        if dtype is not None or kwargs or copy:
            dtype = source.dtype if dtype is None else dtype
            result = self.__torch_function__(_cast, (), (result, dtype), {**kwargs, "copy": copy})
        return result

    def _pin_memory(self, source: Tensor) -> Tensor:
        pinned = self._born(source.clone(), CPU, pinned=True, what="pin_memory")
        self._use(HOST, self._host, [source], [pinned], "pin_memory")
        return pinned

    def _record_stream(self, tensor: Tensor, stream: Stream) -> None:
        self.memory_of(tensor).told.add(stream)


def _to_cpu(leaf: Any) -> Any:
    return CPU if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf


def _is_view(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    with torch._C.DisableTorchFunction():
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        return all(tensor.untyped_storage()._cdata in known for tensor in outputs)


def _written(name: str, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Arguments that a call writes into, by its schema or by its name."""
    schema = getattr(func, "_schema", None)
    written: list[Tensor] = []
    if schema is not None:
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        for argument in schema.arguments:
            value = given.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                written.append(value)
    elif (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__"):
        written += [value for value in (*args[:1], *kwargs.values()) if isinstance(value, Tensor)][:1]
    out = kwargs.get("out")
    return written + ([out] if isinstance(out, Tensor) else [])


def _device(gpu: RecordingDevice, tensor: Tensor) -> torch.device:
    return gpu.memory_of(tensor).device


def _cast(source: Tensor, dtype: torch.dtype, **kwargs: Any) -> Tensor:
    return Tensor.to(source, dtype, **kwargs)


_SPECIAL: dict[Any, Callable[..., Any]] = {}
_SPECIAL.update(
    {
        Tensor.device.__get__: _device,  # type: ignore[attr-defined]
        Tensor.is_cuda.__get__: lambda gpu, tensor: _device(gpu, tensor).type == "cuda",  # type: ignore[attr-defined]
        Tensor.to: RecordingDevice._to,
        Tensor.cpu: lambda gpu, tensor: gpu._to(tensor, CPU),
        Tensor.cuda: lambda gpu, tensor, device: gpu._to(tensor, device),
        Tensor.pin_memory: RecordingDevice._pin_memory,
        Tensor.is_pinned: lambda gpu, tensor: gpu.memory_of(tensor).pinned,
    }
)
