"""Where a model's states are read, and how it runs without some of its layers.

Read are every norm, and the layers' linears, whatever layer spec they were built from.

Transformer Engine fuses a layer's norms into the linears after them, so that no module puts out the normed states:
there the linear's input is read, and the norm applied once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_mcore.errors import InputError
from minitron_mcore.model.gpt import LanguageModel, unwrap
from minitron_mcore.model.specs import apply_norm


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


@contextmanager
def without_layers(chunks: Sequence[torch.nn.Module], layers: Iterable[int]) -> Iterator[None]:
    """Within the `with`, the given layers (global numbers, the first is 0) pass on what comes in, [s, b, h], unchanged.

    At any layout: every rank names the same layers, those held by other stages are ignored; a pipeline stage
    may lose all of its own. No communication. Blocks nest. The layers are whole again afterwards, whatever was raised;
    hooks on a layer still run meanwhile. `chunks` may be wrapped in Megatron's DDP. Raises InputError for a layer that
    the model does not have.
    """
    models = [unwrap(chunk) for chunk in chunks]
    skipped = set(layers)
    count = models[0].config.num_layers
    for layer in sorted(skipped):
        if not 0 <= layer < count:
            raise InputError("", None, f"layer {layer} cannot be left out", f"the model has layers 0 to {count - 1}")
    mine = [layer for model in models for layer in model.decoder.layers if layer.layer_number - 1 in skipped]
    # An attribute of the object hides the class's method; a block around this one may have set it already.
    before: list[tuple[Any, Callable[..., Any] | None]] = [(layer, vars(layer).get("forward")) for layer in mine]
    try:
        for layer in mine:
            layer.forward = _pass_on
        yield
    finally:
        for layer, forward in before:
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _pass_on(
    hidden_states: torch.Tensor, *args: Any, context: torch.Tensor | None = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """TransformerLayer's forward, as an identity."""
    if torch.is_grad_enabled():
        # A stage's output must not be its own input: the pipeline's backward starts from the one and ends at the other.
        hidden_states = hidden_states.clone()
    return hidden_states, context
