"""A transformer written out from the formulas, dense and in float64: what sharded models are compared with.

It shares no code with the package but the table of parameter names and shapes. Everything is batch-first, and
differentiable by autograd.

Legend: b batch, s sequence, h hidden, f ffn, n query heads, g key-value groups, d head dimension, V padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.layout import LAYERS, parameter_table

Name = tuple[str, int | None]

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
INPUT_NORM = LAYERS + "self_attention.linear_qkv.layer_norm_"
QKV = LAYERS + "self_attention.linear_qkv.weight"
QKV_BIAS = LAYERS + "self_attention.linear_qkv.bias"
Q_NORM, K_NORM = (f"{LAYERS}self_attention.{part}_layernorm." for part in "qk")
PROJ = LAYERS + "self_attention.linear_proj.weight"
PRE_MLP_NORM = LAYERS + "mlp.linear_fc1.layer_norm_"
FC1 = LAYERS + "mlp.linear_fc1.weight"
FC2 = LAYERS + "mlp.linear_fc2.weight"
FINAL_NORM = "decoder.final_layernorm."


def draw_weights(architecture: Architecture, seed: int, dtype: torch.dtype = torch.float32) -> dict[Name, torch.Tensor]:
    """Global weights by (checkpoint key, layer): as initialised, but norms and biases differ by channel.

    Freshly initialised norms are all ones, which would hide a norm that is left out or taken from another site.
    """
    from minitron_mcore.model.initialize import draw

    weights = {}
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameter_table(architecture):
        for layer in range(architecture.num_layers) if parameter.per_layer else [None]:
            value = draw(parameter, architecture, seed, layer)
            if len(parameter.axes) == 1:
                value = value + 0.5 * torch.randn(value.shape, generator=generator)
            weights[parameter.key, layer] = value.to(dtype)
    return weights


def fill(chunks: list[Any], architecture: Architecture, weights: Mapping[Name, torch.Tensor]) -> None:
    """Put global weights into this rank's chunks of the sharded model, in place. Every rank calls."""
    from minitron_mcore.model import initialize

    initialize.fill(chunks, architecture, lambda parameter, layer: weights[parameter.key, layer])


class DenseModel:
    """The model of `architecture` with global `weights` by (checkpoint key, layer), copied to float64.

    `weights` of the object are leaves: call `requires_grad()` before `forward` to get their gradients.
    """

    def __init__(self, architecture: Architecture, weights: Mapping[Name, torch.Tensor]) -> None:
        self.architecture = architecture
        self.weights = {name: tensor.detach().to(torch.float64).clone() for name, tensor in weights.items()}

    def requires_grad(self) -> DenseModel:
        for tensor in self.weights.values():
            tensor.requires_grad_(True)
        return self

    def forward(self, tokens: torch.Tensor) -> dict[str, Any]:
        """tokens int64 [b, s] -> every state, float64.

        logits [b, s, V]; final_hidden [b, s, h], after the final norm; and lists by layer: layer_input, layer_output,
        input_normed, pre_mlp_normed [b, s, h], head_output [b, s, n, d], fc1_output [b, s, f or 2f (gate, then up)],
        fc2_input [b, s, f].
        """
        a = self.architecture
        states: dict[str, Any] = {
            name: []
            for name in (
                "layer_input",
                "input_normed",
                "head_output",
                "pre_mlp_normed",
                "fc1_output",
                "fc2_input",
                "layer_output",
            )
        }
        x = self.weights[EMBEDDING, None][tokens]
        for layer in range(a.num_layers):
            states["layer_input"].append(x)
            normed = self._norm(x, INPUT_NORM, layer)
            states["input_normed"].append(normed)
            heads = self._attention(self._qkv(normed, layer), layer)
            states["head_output"].append(heads)
            x = x + heads.flatten(2) @ self.weights[PROJ, layer].T

            normed = self._norm(x, PRE_MLP_NORM, layer)
            states["pre_mlp_normed"].append(normed)
            inner = normed @ self.weights[FC1, layer].T
            states["fc1_output"].append(inner)
            active = self._activation(inner)
            states["fc2_input"].append(active)
            x = x + active @ self.weights[FC2, layer].T
            states["layer_output"].append(x)
        states["final_hidden"] = self._norm(x, FINAL_NORM, None)
        head = self.weights[HEAD if a.untie_embeddings_and_output_weights else EMBEDDING, None]
        states["logits"] = states["final_hidden"] @ head.T
        return states

    def _norm(self, x: torch.Tensor, prefix: str, layer: int | None) -> torch.Tensor:
        a = self.architecture
        weight = self.weights[prefix + "weight", layer] + (1.0 if a.layernorm_zero_centered_gamma else 0.0)
        if a.normalization == "RMSNorm":
            return x / (x.square().mean(-1, keepdim=True) + a.layernorm_epsilon).sqrt() * weight
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + a.layernorm_epsilon).sqrt()
        return scaled * weight + self.weights[prefix + "bias", layer]

    def _qkv(self, normed: torch.Tensor, layer: int) -> torch.Tensor:
        """[b, s, g (q + 2) d]"""
        qkv = normed @ self.weights[QKV, layer].T
        return qkv + self.weights[QKV_BIAS, layer] if self.architecture.add_qkv_bias else qkv

    def _attention(self, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        """[b, s, g (q + 2) d] -> outputs of the heads [b, s, n, d], causal."""
        a = self.architecture
        groups, per_group = a.num_query_groups, a.num_attention_heads // a.num_query_groups
        qkv = qkv.unflatten(-1, (groups, per_group + 2, a.kv_channels))
        query, key, value = qkv[:, :, :, :per_group], qkv[:, :, :, per_group], qkv[:, :, :, per_group + 1]
        query = query.flatten(2, 3)
        if a.qk_layernorm:
            query, key = (self._norm(x, norm, layer) for x, norm in ((query, Q_NORM), (key, K_NORM)))
        query, key = self._rotate(query), self._rotate(key)
        query = query.unflatten(2, (groups, per_group))
        scores = torch.einsum("bsgqd,btgd->bgqst", query, key) / math.sqrt(a.kv_channels)
        length = scores.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return torch.einsum("bgqst,btgd->bsgqd", weights, value).flatten(2, 3)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of [b, s, heads, d]: of the first part of d, its two halves being real and imaginary."""
        a = self.architecture
        width = int(a.kv_channels * a.rotary_percent)
        turned, kept = x[..., :width], x[..., width:]
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * self._frequencies(width)
        real, imaginary = turned.chunk(2, dim=-1)
        turned = torch.cat(
            [real * angles.cos() - imaginary * angles.sin(), imaginary * angles.cos() + real * angles.sin()], dim=-1
        )
        return torch.cat([turned, kept], dim=-1)

    def _frequencies(self, width: int) -> torch.Tensor:
        """[width / 2], with Llama-3.1's scaling: long wavelengths are stretched, short ones kept, between linearly."""
        a = self.architecture
        frequencies = []
        for index in range(0, width, 2):
            frequency = a.rotary_base ** (-index / width)
            if (scaling := a.rope_scaling) is not None:
                turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
                span = scaling.high_freq_factor - scaling.low_freq_factor
                kept = min(max((turns - scaling.low_freq_factor) / span, 0.0), 1.0)
                frequency = kept * frequency + (1 - kept) * frequency / scaling.factor
            frequencies.append(frequency)
        return torch.tensor(frequencies, dtype=torch.float64)

    def _activation(self, inner: torch.Tensor) -> torch.Tensor:
        if self.architecture.activation == "squared_relu":
            return inner.clamp_min(0).square()
        gate, up = inner.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up
