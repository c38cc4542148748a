"""Tensors that say they are on cuda:0 and are computed on the processor, with what a GPU refuses and what a CUDA graph does.

Refused, as on a GPU: tensors of both devices in one operation, and within a capture whatever waits for the device or crosses to or from
it. A capture computes nothing: what it launches is written down, what was there before stays as it was, and what was made within holds
NaN until a replay. A replay launches it anew on the same memory, and is an error where that memory was freed meanwhile.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

ATEN: Any = torch.ops.aten
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
INDEXED = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default, ATEN._index_put_impl_.default}
SCALARS = {ATEN._local_scalar_dense.default, ATEN.equal.default, ATEN.is_nonzero.default}
WAITS = SCALARS | {
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.repeat_interleave.Tensor,
    ATEN._unique2.default,
}

NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"


def flat(*values: Any) -> list[Any]:
    """All that is in lists and dicts, at any depth. PyTorch's own walk knows more kinds, which no operation takes, and takes a third of a test."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found.extend(flat(*value))
        elif isinstance(value, dict):
            found.extend(flat(*value.values()))
        else:
            found.append(value)
    return found


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same lists and dicts, with each of their leaves changed."""
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(change, one) for one in value])
    if isinstance(value, dict):
        return {key: mapped(change, one) for key, one in value.items()}
    return change(value)


class State(threading.local):
    """What a thread does at the moment: the capture that it is within."""

    capture: Capture | None = None


STATE = State()
STORAGES: dict[int, StorageWeakRef] = {}
"""The memory of every tensor on the GPU that may still be there."""
CROSSINGS: list[str] = []
"""What waited for the GPU so far."""


@dataclass
class Memory:
    """The GPU's memory, bytes: what there is, and the most that tensors took of it since that was told; where it was not nothing is counted."""

    limit: int | None = None
    peak: int = 0

    def now(self) -> int:
        alive = [torch.UntypedStorage._new_with_weak_ptr(weak.cdata) for weak in STORAGES.values()]  # type: ignore[attr-defined]
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def took(self) -> None:
        """Raise torch.OutOfMemoryError where the tensors that are there are more than fits."""
        if self.limit is None:
            return
        now = self.now()
        if now > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Of {self.limit} bytes {now} would be taken")
        self.peak = max(self.peak, now)


MEMORY = Memory()


class OnGpu(Tensor):
    """A tensor on cuda:0, whose numbers lie in `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device("cuda:0"), requires_grad=False,
        )  # fmt: skip
        made.held = held
        storage = held.untyped_storage()
        STORAGES[storage._cdata] = StorageWeakRef(storage)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host")

    __array__ = numpy  # type: ignore[assignment]

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        wait("a tensor is pickled")
        return self.held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return OnGpu(self.held.detach().clone()).requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Outside:
    """A tensor that a capture met and did not make: its memory, which is not kept for it, and how it lies there."""

    storage: StorageWeakRef
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Outside:
        size, stride = tuple(tensor.size()), tensor.stride()
        return cls(StorageWeakRef(tensor.untyped_storage()), tensor.dtype, size, stride, tensor.storage_offset())

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)  # type: ignore[attr-defined]
        if storage is None:
            raise RuntimeError("CUDA error: a replay reads memory that was freed since the capture")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)  # type: ignore[call-overload]


@dataclass
class Capture:
    """What was launched within one."""

    launches: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = field(default_factory=list)
    made: dict[int, Tensor] = field(default_factory=dict)
    before: dict[int, tuple[StorageWeakRef, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, weak in list(STORAGES.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)  # type: ignore[attr-defined]
            if storage is None:
                del STORAGES[key]
            else:
                self.before[key] = weak, ctypes.string_at(storage.data_ptr(), storage.nbytes())

    def launched(self, func: Callable[..., Any], args: Any, kwargs: Any, found: Any) -> None:
        outputs = [one for one in flat(found) if isinstance(one, Tensor)]
        for one in outputs:
            if one.untyped_storage()._cdata not in self.before:
                self.made.setdefault(one.untyped_storage()._cdata, one)

        def kept(value: Any) -> Any:
            outside = isinstance(value, Tensor) and value.untyped_storage()._cdata in self.before
            return Outside.of(value) if outside else value

        self.launches.append((func, mapped(kept, args), mapped(kept, kwargs), mapped(kept, outputs)))

    def end(self) -> None:
        """Nothing was computed."""
        for weak, was in self.before.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)  # type: ignore[attr-defined]
            if storage is not None:
                ctypes.memmove(storage.data_ptr(), was, len(was))
        self.before = {}
        for one in self.made.values():
            one.fill_(torch.nan if one.is_floating_point() else 1)

    def replay(self) -> None:
        def now(value: Any) -> Any:
            return value.tensor() if isinstance(value, Outside) else value

        for func, args, kwargs, outputs in self.launches:
            found = func(*mapped(now, args), **mapped(now, kwargs))
            again = [one for one in flat(found) if isinstance(one, Tensor)]
            for old, new in zip(outputs, again, strict=True):
                if isinstance(old, Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


def wait(what: str) -> None:
    """Note that the host waits for the device here, which no capture allows."""
    if STATE.capture is not None:
        raise RuntimeError(f"{NOT_PERMITTED} ({what})")
    CROSSINGS.append(what)


def launched(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, dict[int, OnGpu]]:
    """Call `func` with the host's tensors in place of the GPU's, and write it down where a capture asks; the result, and whose were whose."""
    owners: dict[int, OnGpu] = {}

    def host(value: Any) -> Any:
        if not isinstance(value, OnGpu):
            return value
        owners[id(value.held)] = value
        return value.held

    args, kwargs = mapped(host, args), mapped(host, kwargs)
    found = func(*args, **kwargs)
    if func is ATEN._to_copy.default and any(found is one for one in flat(args)):
        found = found.clone()
    if STATE.capture is not None:
        STATE.capture.launched(func, args, kwargs, found)
    return found, owners


def on_a_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def dispatched(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation of PyTorch's, below autograd and autocast."""
    values, device = flat(args, kwargs), kwargs.get("device")
    ours = any(isinstance(value, OnGpu) for value in values)
    if not ours and not on_a_gpu(device):
        return func(*args, **kwargs)
    theirs = [value for value in values if isinstance(value, Tensor) and not isinstance(value, OnGpu)]
    if ours and func not in COPIES:
        wide = [one for one in theirs if one.dim() and not (func in INDEXED and not one.is_floating_point())]
        if wide:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({func})")
    leaves = func is ATEN._to_copy.default and device is not None and not on_a_gpu(device)
    into_host = func is ATEN.copy_.default and not isinstance(args[0], OnGpu)
    asynchronous = kwargs.get("non_blocking", False) or (func is ATEN.copy_.default and len(args) > 2 and args[2])
    crosses = leaves or into_host or (bool(theirs) and (func in COPIES or func in INDEXED))
    counted = func in INDEXED and any(one is not None and one.dtype == torch.bool for one in args[1])
    if func in WAITS or counted or (crosses and (STATE.capture is not None or not asynchronous)):
        wait(f"{func}")
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    found, owners = launched(func, args, kwargs)
    if leaves or func in SCALARS:
        return found
    if into_host:
        return args[0]

    def ours_again(value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, OnGpu):
            return owners.get(id(value)) if id(value) in owners else OnGpu(value)
        return value

    again = mapped(ours_again, found)
    MEMORY.took()
    return again


class Emulated(TorchDispatchMode):
    """Within it new tensors can be made on cuda:0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})
