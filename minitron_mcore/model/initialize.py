"""Random initialisation, seeded by (seed, global parameter name): the same model at every layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.layout import BESIDE_THE_MODEL, Parameter, checkpoint_key, parameter_table, shard_slices
from minitron_mcore.model.gpt import LanguageModel

# `named_parameters` of a chunk, or other tensors to be filled in their places, one after another.
Rows = Callable[[LanguageModel], Iterable[tuple[str, int | None, torch.Tensor]]]


def initialize(chunks: list[LanguageModel], architecture: Architecture, seed: int) -> None:
    """Fill this rank's parameters in place; one global parameter at a time is drawn on the host, in float32.

    Normal with `init_method_std`; output projections divided by sqrt(2 num_layers), as Megatron does. Every rank
    calls; no communication.
    """
    fill(chunks, architecture, lambda parameter, layer: draw(parameter, architecture, seed, layer))


def fill(
    chunks: list[LanguageModel], architecture: Architecture, whole: Callable[[Parameter, int | None], torch.Tensor]
) -> None:
    """Copy this rank's part of `whole(parameter, layer)`, a global parameter, into every parameter of the chunks."""
    table = {parameter.key: parameter for parameter in parameter_table(architecture)}
    for chunk in chunks:
        rank, size = chunk.tp_group.rank(), chunk.tp_group.size()
        for key, layer, tensor in named_parameters(chunk):
            with torch.no_grad():
                tensor.copy_(take_shard(whole(table[key], layer), table[key], architecture, rank, size))


def named_parameters(chunk: LanguageModel) -> list[tuple[str, int | None, torch.nn.Parameter]]:
    """(checkpoint key, global layer or None, local parameter) of every parameter of a chunk's model.

    What is trained beside the model is left out. A tied head on a last stage that holds no embedding is the embedding
    again.
    """
    rows = []
    first = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    for name, tensor in chunk.named_parameters():
        if name.startswith(BESIDE_THE_MODEL):
            continue
        key, index = checkpoint_key(name)
        if key == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
            key = "embedding.word_embeddings.weight"
        rows.append((key, None if index is None else first + index, tensor))
    return rows


def draw(parameter: Parameter, architecture: Architecture, seed: int, layer: int | None) -> torch.Tensor:
    """The global parameter (of one layer), float32 on the host; depends on nothing but (seed, name, shape)."""
    shape = parameter.shape(architecture)
    if parameter.initial in ("one", "zero"):
        return torch.full(shape, float(parameter.initial == "one"))
    std = architecture.init_method_std
    if parameter.initial == "scaled":
        std /= math.sqrt(2 * architecture.num_layers)
    return draw_normal(parameter.key if layer is None else f"{parameter.key}@{layer}", shape, std, seed)


def draw_normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    """Normal with mean 0, float32 on the host; depends on nothing but the arguments."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def take_shard(
    whole: torch.Tensor, parameter: Parameter, architecture: Architecture, rank: int, size: int
) -> torch.Tensor:
    """Tensor-parallel `rank`'s part of a global parameter, in that rank's order."""
    slices = shard_slices(parameter, architecture, rank, size)
    if not slices:
        return whole
    axis = parameter.shard_axis
    assert axis is not None
    return torch.cat([whole.narrow(axis, part.start, part.stop - part.start) for part in slices], dim=axis)
