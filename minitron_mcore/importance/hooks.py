"""Which activations are scored, and where they are read: forward hooks on Megatron's modules.

    hidden                  LN(X) at every norm site: rows 2l (input norm of layer l), 2l + 1 (pre-MLP norm), 2L (final)
    heads                   the L2 norm of each query head's output, before the output projection
    groups                  the L2 norm of the outputs of all query heads of a KV group together
    pre_activation          X W1ᵀ of the up projection (arXiv 2407.14679, section 2.2)
    down_projection_input   what the down projection reads: after the activation and the gate
    layers                  block influence of a token: 1 − cos(layer's input, layer's output)

A KV group is pruned with all of its query heads, so a token loses their q d output channels with it; their L2 norm is
to the group what a head's is to the head. (The papers keep every KV group and give no formula.) Unlike a sum of the
heads' scores it is formed token by token, so that a head that is strong where the others are weak counts fully; unlike
the norm of the group's key and value it includes what attention makes of them.

A custom measure is one more `Measure`: a shape, and a function that hooks a chunk and records values. A pass keeps no
gradients.

Legend: s sequence, b micro-batch, C channels on this rank, h hidden, n heads on this rank, d head dimension, q query
heads in a KV group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from minitron_mcore.architecture import Architecture
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.sites import fused_norm, layers_of, norm_sites

Values = Callable[[torch.Tensor], torch.Tensor]
# (global row, values [s, b, C], of any floating type)
Record = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Measure:
    """One kind of activation.

    `shape`: global (rows, channels). `sharded`: a tensor-parallel rank records its contiguous part of the channels,
    for the whole sequence; otherwise it records all channels, under sequence parallelism for its part of the sequence.
    `attach` hooks one chunk and yields the handles.
    """

    name: str
    shape: Callable[[Architecture], tuple[int, int]]
    sharded: bool
    attach: Callable[[LanguageModel, Record], Iterator[RemovableHandle]]
    rows_per_layer: int = 1


def on_input(module: torch.nn.Module, row: int, record: Record, values: Values) -> RemovableHandle:
    """Record `values(x)` at every `module(x)`."""
    return module.register_forward_pre_hook(lambda module, args: record(row, values(args[0])))


def on_output(module: torch.nn.Module, row: int, record: Record, values: Values) -> RemovableHandle:
    """Record `values(y)` at every `module(x)` -> y, or (y, bias) as Megatron's linears answer."""

    def hook(module: torch.nn.Module, args: Any, output: torch.Tensor | tuple[torch.Tensor, Any]) -> None:
        record(row, values(output[0] if isinstance(output, tuple) else output))

    return module.register_forward_hook(hook)


def unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def norms_of(width: int) -> Values:
    """L2 norms of every `width` channels: [s, b, n width] -> [s, b, n], float32."""
    return lambda x: torch.linalg.vector_norm(x.unflatten(-1, (-1, width)), dim=-1, dtype=torch.float32)


def block_influence(x_SBH: torch.Tensor, y_SBH: torch.Tensor) -> torch.Tensor:
    """1 − cos(x, y) of every token, float32 [s, b, 1].

    Computed from y − x, which is small beside x: 1 − x·y / (|x| |y|) would lose most of its digits, and in bf16 all.
    """
    x_norm, y_norm, change = (
        torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=torch.float32)
        for part in (x_SBH, y_SBH, y_SBH - x_SBH)
    )
    return (change.square() - (y_norm - x_norm).square()) / (2 * x_norm * y_norm).clamp_min(1e-30)


def _attach_hidden(chunk: LanguageModel, record: Record) -> Iterator[RemovableHandle]:
    for row, norm, linear in norm_sites(chunk):
        fused = fused_norm(linear, chunk.config)
        yield on_output(norm, row, record, unchanged) if fused is None else on_input(linear, row, record, fused)


def _attach_heads(chunk: LanguageModel, record: Record) -> Iterator[RemovableHandle]:
    for index, layer in layers_of(chunk):
        yield on_input(layer.self_attention.linear_proj, index, record, norms_of(chunk.config.kv_channels))


def _attach_groups(chunk: LanguageModel, record: Record) -> Iterator[RemovableHandle]:
    config = chunk.config
    width = config.num_attention_heads // config.num_query_groups * config.kv_channels
    for index, layer in layers_of(chunk):
        yield on_input(layer.self_attention.linear_proj, index, record, norms_of(width))


def _attach_pre_activation(chunk: LanguageModel, record: Record) -> Iterator[RemovableHandle]:
    # A gated rank's output is [gate_r ; up_r].
    halves = 2 if chunk.config.gated_linear_unit else 1
    for index, layer in layers_of(chunk):
        yield on_output(layer.mlp.linear_fc1, index, record, lambda y: y.chunk(halves, dim=-1)[-1])


def _attach_down_projection_input(chunk: LanguageModel, record: Record) -> Iterator[RemovableHandle]:
    for index, layer in layers_of(chunk):
        yield on_input(layer.mlp.linear_fc2, index, record, unchanged)


def _attach_layers(chunk: LanguageModel, record: Record) -> Iterator[RemovableHandle]:
    def influence(index: int, module: Any, args: Any, given: dict[str, Any], output: tuple[torch.Tensor, Any]) -> None:
        record(index, block_influence(given["hidden_states"] if "hidden_states" in given else args[0], output[0]))

    for index, layer in layers_of(chunk):
        yield layer.register_forward_hook(partial(influence, index), with_kwargs=True)


HIDDEN = Measure("hidden", lambda a: (2 * a.num_layers + 1, a.hidden_size), False, _attach_hidden, rows_per_layer=2)
HEADS = Measure("heads", lambda a: (a.num_layers, a.num_attention_heads), True, _attach_heads)
GROUPS = Measure("groups", lambda a: (a.num_layers, a.num_query_groups), True, _attach_groups)
LAYERS = Measure("layers", lambda a: (a.num_layers, 1), False, _attach_layers)
# Recipe value of importance.neuron_site -> measure.
NEURON_SITES = {
    name: Measure(name, lambda a: (a.num_layers, a.ffn_hidden_size), True, attach)
    for name, attach in {
        "pre_activation": _attach_pre_activation,
        "down_projection_input": _attach_down_projection_input,
    }.items()
}
