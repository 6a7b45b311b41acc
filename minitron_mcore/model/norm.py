"""RMSNorm and LayerNorm that allow sequence parallelism and Nemotron's zero-centred gamma.

Transformer Engine and Apex norms do both; this one stands in where neither is installed, since megatron-core's
WrappedTorchNorm refuses both.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def apply_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: TransformerConfig
) -> torch.Tensor:
    """The norm that `config` names, over the last axis of `x` [..., h]; weight and bias [h].

    LayerNorm1P (Nemotron) stores gamma - 1 (`layernorm_zero_centered_gamma`).
    """
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    width = (x.shape[-1],)
    if config.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(x, width, weight, config.layernorm_epsilon)
    return torch.nn.functional.layer_norm(x, width, weight, bias, config.layernorm_epsilon)


class Norm(torch.nn.Module):
    """A norm module for Megatron's layer specs; `weight.sequence_parallel` makes Megatron sum its gradients."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.config = config
        initial = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(initial(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apply_norm(x, self.weight, self.bias, self.config)
