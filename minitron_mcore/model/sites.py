"""Where a model's states are read: every norm, and the layers' linears, whatever layer spec they were built from.

Transformer Engine fuses a layer's norms into the linears after them, so that no module puts out the normed states:
there the linear's input is read, and the norm applied once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.norm import apply_norm


def layers_of(chunk: LanguageModel) -> Iterator[tuple[int, Any]]:
    """(global index, TransformerLayer) of a chunk's layers."""
    for layer in chunk.decoder.layers:
        yield layer.layer_number - 1, layer


def norm_sites(chunk: LanguageModel) -> Iterator[tuple[int, torch.nn.Module, Any]]:
    """(row, norm, linear after it) of every norm of a chunk; the linear is None after the final norm.

    Rows: 2l the input norm of layer l, 2l + 1 its pre-MLP norm, 2L the final norm of a model with L layers.
    """
    for index, layer in layers_of(chunk):
        yield 2 * index, layer.input_layernorm, layer.self_attention.linear_qkv
        yield 2 * index + 1, layer.pre_mlp_layernorm, layer.mlp.linear_fc1
    if chunk.decoder.final_layernorm is not None:
        yield 2 * chunk.config.num_layers, chunk.decoder.final_layernorm, None


def fused_norm(linear: Any, config: TransformerConfig) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The norm fused into a linear, as a function of the linear's input [s, b, h]; None where there is none."""
    weight, bias = getattr(linear, "layer_norm_weight", None), getattr(linear, "layer_norm_bias", None)
    return None if weight is None else lambda x_SBH: apply_norm(x_SBH, weight, bias, config)
