"""A GPU's stand-in on the CPU: code that mixes up the devices fails here as it would on CUDA. For tests alone.

The CPU adapter makes "cuda" mean the CPU, so that a tensor made without a device, which CUDA would refuse beside one
that is there, goes unnoticed. After `install` this process keeps account of which memory would lie on the device (what
was made or moved there by name, and what was computed from it), and refuses:

    an operation on tensors of both sides (single numbers on the CPU may join in, as on CUDA)
    a collective of host memory: NCCL takes none
    `.numpy()` and a CPU generator on the device's tensors

`tensor.device` and `tensor.is_cuda` answer as they would on CUDA, so that code which asks goes the way it goes there;
products of bf16 with fp32 output, which the CPU lacks, are done in fp32. Operations of other threads than the one that
installs it are not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")
# From one side to the other on purpose; and what takes indices from the host.
_CROSSING = ("copy_", "_to_copy", "set_")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
# No single number of the host joins these.
_STRICT = ("cat", "stack", "gather", "scatter", "scatter_add", "scatter_add_", "index_select", "embedding", "mm")
_FACTORIES = (
    *("zeros", "empty", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "linspace", "eye"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "as_tensor"),
)
_METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
# Of torch.distributed; they carry objects, and move them to the device themselves.
_OBJECTS = ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list")
_SWEEP = 4096  # storages that are kept in mind before those that are gone are forgotten

_on_device: dict[int, StorageWeakRef] = {}
_quiet = 0  # no checks: torch is at work inside


class MixedDevicesError(RuntimeError):
    """What CUDA or NCCL would have refused."""


def _storage(tensor: torch.Tensor) -> Any:
    """The tensor's memory; None of a sharded tensor, whose parts have it."""
    if isinstance(tensor, ShardedTensor):
        return None
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage()


def is_there(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory would lie on the device."""
    storage = _storage(tensor)
    if storage is None:
        return True
    found = _on_device.get(storage._cdata)
    return found is not None and not found.expired()


def _mark(tensors: Any, there: bool) -> None:
    """Note where the memory of every tensor in `tensors` lies."""
    for leaf in tree_leaves(tensors):
        storage = _storage(leaf) if isinstance(leaf, torch.Tensor) else None
        if storage is None:
            continue
        if there:
            # A weak reference keeps the address from being given to another storage.
            _on_device[storage._cdata] = StorageWeakRef(storage)
        else:
            _on_device.pop(storage._cdata, None)
    if len(_on_device) > _SWEEP:
        for address in [address for address, storage in _on_device.items() if storage.expired()]:
            del _on_device[address]


@contextmanager
def _unchecked() -> Iterator[None]:
    global _quiet
    _quiet += 1
    try:
        yield
    finally:
        _quiet -= 1


class _Account(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name, space = func._schema.name.split("::")[1], func._schema.name.split("::")[0]
        there = [is_there(tensor) for tensor in tensors]
        if not _quiet:
            _check(name, space, args, kwargs, tensors, there)
        result = _wide_product(name, func, args, kwargs)
        # A view, or a result in an argument's memory, lies where that lies.
        aliased = any(argument.alias_info is not None for argument in func._schema.arguments)
        if not aliased and space != "c10d":
            # Whoever was asked for another device, which the adapter has made the CPU by now, corrects this afterwards.
            _mark(result, any(there))
        return result


def _check(
    name: str, space: str, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor], there: list[bool]
) -> None:
    if space == "c10d":
        if not all(there) and "barrier" not in name:
            raise MixedDevicesError(f"{name}: a collective of host memory, which NCCL does not take")
        return
    if any(there) and isinstance(kwargs.get("generator"), torch.Generator):
        raise MixedDevicesError(f"{name}: a generator of the CPU for a tensor on the device")
    if not any(there) or all(there) or name in _CROSSING:
        return
    if name in _INDEXED:  # the indices alone may be the host's
        values = [args[0], *(args[2:3] if len(args) > 2 else [])]
        if all(is_there(value) or value.dim() == 0 for value in values if isinstance(value, torch.Tensor)):
            return
    hosts = [tensor for tensor, is_on in zip(tensors, there, strict=True) if not is_on]
    if name not in _STRICT and all(tensor.dim() == 0 for tensor in hosts):
        return
    shapes = [f"{'cuda' if is_on else 'cpu'}{list(t.shape)}" for t, is_on in zip(tensors, there, strict=True)]
    raise MixedDevicesError(f"{name}: tensors on both sides: {', '.join(shapes)}")


def _wide_product(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation; a product of bf16 with fp32 output in fp32."""
    overload = func._overloadname
    if name not in ("mm", "addmm") or not overload.startswith("dtype"):
        return func(*args, **kwargs)
    operands = [tensor.float() for tensor in args if isinstance(tensor, torch.Tensor)]
    product = getattr(torch, name)(*operands)
    return kwargs["out"].copy_(product) if "out" in kwargs else product


def _is_device(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, str | torch.device) and str(value).startswith("cuda"))


def _at_device(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory, with note taken of the device that it was asked for."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and _is_device(device):
            kwargs["device"] = _CPU
        if device is None:
            return factory(*args, **kwargs)
        with _unchecked():
            result = factory(*args, **kwargs)
        _mark(result, _is_device(device))
        return result

    return wrapped


def _moving(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # `other`: where that tensor lies; a bare number is a device.
        named = [kwargs.pop("device")] if "device" in kwargs else []
        rest = []
        for index, arg in enumerate(args):
            if isinstance(arg, torch.device | str) or (index == 0 and _is_device(arg)):
                named.append(arg)
            elif isinstance(arg, torch.Tensor):
                named.append(arg.device)
                rest.append(arg.dtype)
            else:
                rest.append(arg)
        target = next((device for device in named if device is not None), None)
        if target is None:
            return to(self, *rest, **kwargs)
        if is_there(self) != _is_device(target):
            kwargs = {**kwargs, "copy": True}
        result = to(self, _CPU, *rest, **kwargs)
        if result is not self:
            _mark(result, _is_device(target))
        return result

    return wrapped


def _replace_methods() -> None:
    tensor: Any = torch.Tensor
    to, numpy = _moving(tensor.to), tensor.numpy
    host_device = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]

    def to_numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_there(self):
            raise MixedDevicesError("numpy: of a tensor on the device")
        return numpy(self, *args, **kwargs)

    tensor.to, tensor.numpy = to, to_numpy
    tensor.cuda = lambda self, *args, **kwargs: to(self, DEVICE)
    tensor.cpu = lambda self, *args, **kwargs: to(self, _CPU)
    tensor.device = property(lambda self: DEVICE if is_there(self) else host_device(self))
    tensor.is_cuda = property(is_there)
    tensor.is_cpu = property(lambda self: not is_there(self))
    for name in _METHODS:
        setattr(tensor, name, _at_device(getattr(tensor, name)))

    def module_cuda(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        _mark([*self.parameters(), *self.buffers()], True)
        return self

    module: Any = torch.nn.Module
    module.cuda = module_cuda


def install() -> None:
    """From here on in this thread; after the CPU adapter, before anything is made."""
    for name in _FACTORIES:
        setattr(torch, name, _at_device(getattr(torch, name)))
    _replace_methods()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: DEVICE.index
    cuda.get_device_capability = lambda device=None: (9, 0)
    from minitron_mcore.runtime import cpu_adapter
    from minitron_mcore.runtime.start import Runtime

    fields = cpu_adapter.transformer_fields
    # As on CUDA: backward then starts from Megatron's own call of the engine.
    cpu_adapter.transformer_fields = lambda: {**fields(), "deallocate_pipeline_outputs": True}
    begin = Runtime.__init__

    def on_device(self: Runtime, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.device = DEVICE

    Runtime.__init__ = on_device  # type: ignore[method-assign]
    for name in _OBJECTS:
        setattr(torch.distributed, name, _silently(getattr(torch.distributed, name)))
    _Account().__enter__()


def _silently(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _unchecked():
            return function(*args, **kwargs)

    return wrapped
