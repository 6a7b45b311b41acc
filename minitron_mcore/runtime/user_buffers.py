"""Transformer Engine's user buffers, through which tensor-parallel ranks exchange parts of what a product takes or
gives while it goes on (Megatron's `tp_comm_overlap`). Pure.

They are made once in a process, for microbatches of one shape and layers of one width, by the names of a layer's four
products: of one model, then, the one that is trained. They are made as Megatron-LM's training makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from minitron_mcore.errors import InputError

# By Transformer Engine's defaults: of queries, keys and values, and of fc1, a gather in forward, the same again and a
# scatter in backward; of the other two products a scatter in forward and a gather in backward.
BUFFERS = 10


class Exchange(NamedTuple):
    """Buffers for layers of `hidden_size` that get `tokens` at a time, over all of the `tensor` ranks. key: that of the
    recipe by which they are asked for."""

    key: str
    tokens: int
    hidden_size: int
    tensor: int


@contextmanager
def user_buffers(exchange: Exchange | None) -> Iterator[None]:
    """Within the `with` there are buffers in bf16, unless None are asked for; every rank calls.

    Raises InputError where Transformer Engine is not installed.
    """
    if exchange is None:
        yield
        return
    try:
        from transformer_engine.pytorch.module import base
    except ImportError:
        rule = "needs Transformer Engine, which is not installed"
        raise InputError(exchange.key, True, rule, "leave it out") from None
    base.initialize_ub(
        shape=[exchange.tokens, exchange.hidden_size],
        tp_size=exchange.tensor,
        quantization_modes=[base.UserBufferQuantizationMode.NONE],
        ub_cfgs={},
        bootstrap_backend="nccl",
    )
    try:
        yield
    finally:
        base.destroy_ub()
