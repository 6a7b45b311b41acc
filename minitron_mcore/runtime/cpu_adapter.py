"""megatron-core on CPU over gloo: the one file that knows.

megatron-core asks for its device by the name "cuda" throughout. Without CUDA, `install` makes that name mean the CPU:
once, at start-up, before any process group exists. On a CUDA machine nothing here runs.

Factories and casts are wrapped rather than put under a TorchFunctionMode: a mode applies to one thread, and the
checkpoint saver, the data loader and the watchdog run in others.
"""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
_FACTORIES = (
    *("zeros", "empty", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "linspace", "eye", "as_tensor"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_strided"),
)
_installed = False


def install() -> None:
    """Make "cuda" mean the CPU in this process. Does nothing where CUDA is available, or when called again."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    # `with torch.device(…)`, under which transformers builds its models, knows the factories by identity, from a list
    # made at first use: made later, it would hold the wrapped ones, and leave buffers unfilled.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _wrap_tensor_methods()
    _replace_cuda_functions()
    _replace_rng_state()
    _take_one_worker()


def _take_one_worker() -> None:
    """Give each of gloo's process groups one worker thread in place of two.

    Two that are at gathers of `_coalescing_manager` at the same time, as overlapped gathers of weights are, write over
    the heap (torch 2.13, seen by test_gloo.py of tests/distributed/runtime: a crash within a minute). With one worker,
    collectives of a group follow each other in the order that all ranks start them in.
    """
    if not torch.distributed.is_gloo_available():
        return
    gloo: Any = torch.distributed.ProcessGroupGloo
    make = gloo.__init__

    @functools.wraps(make)
    def with_one_worker(self: Any, store: Any, rank: int, size: int, *given: Any, **named: Any) -> None:
        how = given[0] if given else named.get("options", named.get("timeout"))
        options = how if isinstance(how, gloo._Options) else gloo._Options()
        if options is not how:
            names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
            devices = [gloo.create_device(interface=name) for name in names] or [gloo.create_default_device()]
            options._devices = devices
            if how is not None:
                options._timeout = how
        options._threads = 1
        make(self, store, rank, size, options)

    gloo.__init__ = with_one_worker


def _is_cuda(device: Any) -> bool:
    return type(device) is int or (isinstance(device, str | torch.device) and str(device).startswith("cuda"))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _wrap_tensor_methods() -> None:
    to, type_ = torch.Tensor.to, torch.Tensor.type

    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizers compare the bare type's name with "torch.cuda.FloatTensor" and its kin.
        if args or kwargs:
            return type_(self, *args, **kwargs)
        return type_(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = to_cpu  # type: ignore[method-assign,assignment]
    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


class _Stream:
    """Stands in for a CUDA stream: on CPU, operations run in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _nothing(self, *args: Any) -> None: ...

    wait_stream = wait_event = synchronize = record_event = _nothing


def _replace_cuda_functions() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    # Not torch.manual_seed, which itself calls torch.cuda.manual_seed_all.
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.Stream = _Stream
    cuda.stream = contextlib.nullcontext
    cuda.current_stream = cuda.default_stream = _Stream
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda device=None: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda device=None: 0)
    cuda.nvtx = types.SimpleNamespace(range_push=lambda message: None, range_pop=lambda: None)


def _replace_rng_state() -> None:
    """megatron-core's tracker forks the CUDA generator; here it forks the CPU's."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def transformer_fields() -> dict[str, Any]:
    """TransformerConfig fields that depend on the device: which fused kernels there are.

    A pipeline output may be freed once its send is enqueued only where sends run in stream order: gloo reads the memory
    later, and would send what has been written over it.
    """
    never = ("bias_activation_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion")
    on_cuda = ("bias_dropout_fusion", "deallocate_pipeline_outputs")
    return {**dict.fromkeys(never, False), **dict.fromkeys(on_cuda, torch.cuda.is_available())}
