"""A model without some of its layers, in memory: nothing is copied, rebuilt or loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from minitron_mcore.errors import InputError
from minitron_mcore.model.gpt import unwrap


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
            if forward is not None:
                layer.forward = forward
            else:
                vars(layer).pop("forward", None)


def _pass_on(
    hidden_states: torch.Tensor, *args: Any, context: torch.Tensor | None = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """TransformerLayer's forward, as an identity."""
    if torch.is_grad_enabled():
        # A stage's output must not be its own input: the pipeline's backward starts from the one and ends at the other.
        hidden_states = hidden_states.clone()
    return hidden_states, context
