"""Checkpoint tensors <-> Hugging Face tensors: a family's rows applied to an Architecture.

Legend: G query groups, q query heads in a group, d head dimension, f ffn, h hidden, V vocabulary. A layout applies to
whole tensors and to tensor-parallel parts: rank r's part of a checkpoint tensor consists of the contiguous r-th parts
of its Hugging Face tensors, along the same axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.families.find import known_families
from minitron_mcore.layout import Parameter, parameter_table


@dataclass(frozen=True)
class Layout:
    """How one checkpoint tensor (of one layer) becomes Hugging Face tensors, and back."""

    split: Callable[[torch.Tensor, Architecture], list[torch.Tensor]]
    join: Callable[[list[torch.Tensor], Architecture], torch.Tensor]


def _split_qkv(tensor: torch.Tensor, a: Architecture) -> list[torch.Tensor]:
    """[G (q + 2) d, …], each group's queries, key and value together -> q [G q d, …], k [G d, …], v [G d, …]."""
    groups = tensor.unflatten(0, (-1, a.heads_per_group + 2, a.kv_channels))
    return [part.flatten(0, 2) for part in groups.split((a.heads_per_group, 1, 1), dim=1)]


def _join_qkv(parts: list[torch.Tensor], a: Architecture) -> torch.Tensor:
    heads = (a.heads_per_group, 1, 1)
    groups = [part.unflatten(0, (-1, count, a.kv_channels)) for part, count in zip(parts, heads, strict=True)]
    return torch.cat(groups, dim=1).flatten(0, 2)


LAYOUTS = {
    "same": Layout(lambda tensor, a: [tensor], lambda parts, a: parts[0]),
    # [padded V, h] <-> [V, h]; the caller that joins parts adds the padding, which is on the last ranks.
    "vocab": Layout(lambda tensor, a: [tensor[: a.vocab_size]], lambda parts, a: parts[0]),
    # [2 f, h], gate then up <-> gate [f, h], up [f, h].
    "gate_up": Layout(lambda tensor, a: list(tensor.chunk(2)), lambda parts, a: torch.cat(parts)),
    "qkv": Layout(_split_qkv, _join_qkv),
}


@dataclass(frozen=True)
class Unit:
    """What is converted at once: one checkpoint tensor (of one layer), and the Hugging Face tensors it becomes."""

    parameter: Parameter
    layer: int | None
    names: tuple[str, ...]
    layout: Layout

    def shapes(self, architecture: Architecture) -> list[tuple[int, ...]]:
        """Shapes of the Hugging Face tensors, by name."""
        whole = torch.empty(self.parameter.shape(architecture), device="meta")
        return [tuple(part.shape) for part in self.layout.split(whole, architecture)]


def units(architecture: Architecture) -> list[Unit]:
    """Everything to convert, in the model's order: embedding, layer after layer, final norm, output head."""
    rows = {row.key: row for row in known_families()[architecture.family].tensors}
    parameters = parameter_table(architecture)

    def unit(parameter: Parameter, layer: int | None) -> Unit:
        row = rows[parameter.key]
        names = tuple(name.format(layer=layer) for name in row.names)
        return Unit(parameter, layer, names, LAYOUTS[row.layout])

    per_layer = [parameter for parameter in parameters if parameter.per_layer]
    first = parameters.index(per_layer[0])
    before, after = parameters[:first], parameters[first + len(per_layer) :]
    return [
        *(unit(parameter, None) for parameter in before),
        *(unit(parameter, layer) for layer in range(architecture.num_layers) for parameter in per_layer),
        *(unit(parameter, None) for parameter in after),
    ]
