"""Forward passes on a GPU that is not there: torch's fake tensors on the device `cuda`. For tests alone.

A fake tensor has a shape, a type and a device, and no values; torch works out what an operation would give, and refuses
one that mixes devices. Within `fake_cuda` the name "cuda" means that device, although this torch may have no CUDA at
all, and whatever is made without a device is the host's. Refused are

    an operation on tensors of both sides (single numbers of the host may join in, as on CUDA)
    a collective of the host's memory: NCCL takes none
    `.numpy()` of the device's tensors

What code reads off a tensor has no value: `item`, `tolist` and `numpy` answer with ones, of int64 with the largest
(which a search for the smallest starts from), and of other integers and bool, which are flags, with zeros. Backward
passes do not work: autograd's engine asks for the device itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from minitron_mcore.runtime import cpu_adapter

DEVICE = torch.device("cuda", 0)
# c10::DeviceType: places in the registry of what switches devices, an array of pointers in libc10.
_CUDA, _META, _KINDS = 1, 14, 20
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"


class HostMemoryError(RuntimeError):
    """What NCCL or NumPy would have refused."""


class _Mode(FakeTensorMode):
    """Tensors from outside are taken for the host's."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _answer(args[0].dtype)
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            if any(tensor.device.type != "cuda" for tensor in tensors):
                raise HostMemoryError(f"{func}: a collective of the host's memory, which NCCL does not take")
        return super().dispatch(func, types, args, kwargs or {})


def _answer(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return 1.0
    return torch.iinfo(dtype).max if dtype == torch.int64 else 0


@contextmanager
def _switching_nothing() -> Iterator[None]:
    """A torch without CUDA refuses a device that nothing can switch to: what stands for `meta` then does for it."""
    registry = (ctypes.c_void_p * _KINDS).in_dll(
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so")), _REGISTRY
    )
    before = registry[_CUDA]
    registry[_CUDA] = before or registry[_META]
    try:
        yield
    finally:
        registry[_CUDA] = before


@contextmanager
def fake_cuda(lengths: Sequence[int] = ()) -> Iterator[None]:
    """Within the `with`, on this thread, "cuda" is a GPU of fake tensors, and no values are worked out.

    The CPU adapter and the process groups stand already (fake_world.py); generators must be seeded before. lengths:
    what a reading of int32 numbers as a list gives, of packed segments.
    """
    numpy_of = torch.Tensor.numpy

    def tolist(self: torch.Tensor) -> Any:
        if self.dtype == torch.int32 and lengths:
            return list(lengths)
        return numpy.full(self.shape, _answer(self.dtype)).tolist()

    def to_numpy(self: torch.Tensor, **how: Any) -> Any:
        if not isinstance(self, FakeTensor):
            return numpy_of(self, **how)
        if self.device.type != "cpu":
            raise HostMemoryError("numpy: of a tensor on the device")
        return numpy.full(self.shape, _answer(self.dtype))

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to(DEVICE)

    def module_moved(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return self.to(DEVICE)

    replaced: list[tuple[Any, str, Any]] = [
        (cpu_adapter, "CPU", DEVICE),
        (torch.cuda, "current_device", lambda: DEVICE),
        (torch.Tensor, "cuda", moved),
        (torch.nn.Module, "cuda", module_moved),
        (FakeTensor, "tolist", tolist),
        (torch.Tensor, "numpy", to_numpy),
        (torch.distributed, "get_backend", lambda group=None: "nccl"),
        (torch.cuda.nccl, "version", lambda: (2,)),  # asked for where a collective fails
    ]
    with ExitStack() as stack:
        stack.enter_context(_switching_nothing())
        for target, name, value in replaced:
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(_Mode())
        yield
