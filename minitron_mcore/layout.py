"""Where every parameter's axes lie: the one table behind counting, initialising, sharding, pruning and naming.

Global shapes; h hidden, f ffn, G query groups, q query heads in a group, d head dimension, V padded vocabulary.
Tensor-parallel rank r of R holds the contiguous r-th part of the sharded axis (marked |):

    embedding.word_embeddings.weight          [V|, h]
    self_attention.linear_qkv.weight          [G|(q+2)d, h]    a group: q query heads, key, value, d rows each
    self_attention.linear_qkv.bias            [G|(q+2)d]       where add_qkv_bias (Qwen2)
    self_attention.q_layernorm, k_layernorm   [d]              where qk_layernorm (Qwen3)
    self_attention.linear_proj.weight         [h, G|qd]
    mlp.linear_fc1.weight, not gated          [f|, h]
    mlp.linear_fc1.weight, gated              [2|f, h]         on each rank [gate_r ; up_r]; globally gate, then up
    mlp.linear_fc2.weight                     [h, f|]
    norms                                     [h]
    output_layer.weight (untied)              [V|, h]

In a checkpoint the layers of one kind are one tensor with the layer as leading axis: `decoder.layers.mlp...`, [L, ...].
Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import TYPE_CHECKING

from minitron_mcore.errors import InputError

if TYPE_CHECKING:
    from minitron_mcore.architecture import Architecture

LAYERS = "decoder.layers."
# What is trained and stored beside a model without being one of its parameters (see distillation/states/projection.py).
BESIDE_THE_MODEL = ("state_projection.",)


@dataclass(frozen=True)
class Parameter:
    """One row of the table. `axes` name what each axis is: vocab, hidden, qkv, heads, head, ffn or gated_ffn.

    `initial`: how random initialisation fills it: "normal", "scaled" (output projections, std / sqrt(2 L)),
    "one" or "zero".
    """

    key: str
    axes: tuple[str, ...]
    shard_axis: int | None
    initial: str

    @property
    def per_layer(self) -> bool:
        return self.key.startswith(LAYERS)

    @property
    def is_embedding(self) -> bool:
        return self.key.startswith("embedding.")

    @property
    def gated(self) -> bool:
        return "gated_ffn" in self.axes

    def shape(self, architecture: Architecture, vocab_size: int | None = None) -> tuple[int, ...]:
        """Global shape of the parameter (of one layer, where it has layers); the padded vocabulary by default."""
        sizes = axis_sizes(architecture)
        if vocab_size is not None:
            sizes["vocab"] = vocab_size
        return tuple(sizes[axis] for axis in self.axes)

    def count(self, architecture: Architecture, vocab_size: int) -> int:
        layers = architecture.num_layers if self.per_layer else 1
        return layers * prod(self.shape(architecture, vocab_size))


def axis_sizes(architecture: Architecture) -> dict[str, int]:
    """Global size of every named axis."""
    a = architecture
    return {
        "vocab": a.padded_vocab_size,
        "hidden": a.hidden_size,
        "qkv": (a.num_attention_heads + 2 * a.num_query_groups) * a.kv_channels,
        "heads": a.num_attention_heads * a.kv_channels,
        "head": a.kv_channels,
        "ffn": a.ffn_hidden_size,
        "gated_ffn": 2 * a.ffn_hidden_size,
    }


def parameter_table(architecture: Architecture) -> list[Parameter]:
    """Every stored parameter of `architecture`, in checkpoint order."""
    norm_parts = ("weight", "bias") if architecture.normalization == "LayerNorm" else ("weight",)
    fc1 = "gated_ffn" if architecture.gated_linear_unit else "ffn"
    one = "zero" if architecture.layernorm_zero_centered_gamma else "one"
    initial = {"weight": one, "bias": "zero"}

    def norm(prefix: str) -> list[Parameter]:
        return [Parameter(prefix + part, ("hidden",), None, initial[part]) for part in norm_parts]

    attention = [Parameter(LAYERS + "self_attention.linear_qkv.weight", ("qkv", "hidden"), 0, "normal")]
    if architecture.add_qkv_bias:
        attention.append(Parameter(LAYERS + "self_attention.linear_qkv.bias", ("qkv",), 0, "zero"))
    if architecture.qk_layernorm:
        attention += [
            Parameter(f"{LAYERS}self_attention.{part}_layernorm.{side}", ("head",), None, initial[side])
            for part in "qk"
            for side in norm_parts
        ]
    rows = [
        Parameter("embedding.word_embeddings.weight", ("vocab", "hidden"), 0, "normal"),
        *norm(LAYERS + "self_attention.linear_qkv.layer_norm_"),
        *attention,
        Parameter(LAYERS + "self_attention.linear_proj.weight", ("hidden", "heads"), 1, "scaled"),
        *norm(LAYERS + "mlp.linear_fc1.layer_norm_"),
        Parameter(LAYERS + "mlp.linear_fc1.weight", (fc1, "hidden"), 0, "normal"),
        Parameter(LAYERS + "mlp.linear_fc2.weight", ("hidden", "ffn"), 1, "scaled"),
        *norm("decoder.final_layernorm."),
    ]
    if architecture.untie_embeddings_and_output_weights:
        rows.append(Parameter("output_layer.weight", ("vocab", "hidden"), 0, "normal"))
    return rows


# The local layer spec names a layer's norms by module; checkpoints use Transformer Engine's names for both specs.
_LOCAL_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def checkpoint_key(parameter_name: str) -> tuple[str, int | None]:
    """A module's parameter name -> (checkpoint key, layer index on its stage or None).

    `decoder.layers.3.input_layernorm.weight` -> (`decoder.layers.self_attention.linear_qkv.layer_norm_weight`, 3).
    """
    match = _LAYER_NAME.fullmatch(parameter_name)
    if match is None:
        return parameter_name, None
    inner = match.group(2)
    for local, stored in _LOCAL_NORMS.items():
        if inner.startswith(local):
            inner = stored + inner.removeprefix(local)
    return LAYERS + inner, int(match.group(1))


def shard_slices(parameter: Parameter, architecture: Architecture, rank: int, size: int) -> list[slice]:
    """The parts of the sharded axis that tensor-parallel `rank` of `size` holds, in its local order.

    One slice, but for a gated fc1: its gate part, then its up part. Empty where the parameter is replicated.
    """
    if parameter.shard_axis is None:
        return []
    full = parameter.shape(architecture)[parameter.shard_axis]
    halves = 2 if parameter.gated else 1
    part = full // halves // size
    return [
        slice(half * full // halves + rank * part, half * full // halves + (rank + 1) * part) for half in range(halves)
    ]


def local_shape(parameter: Parameter, architecture: Architecture, size: int) -> tuple[int, ...]:
    """Shape of one tensor-parallel rank's part."""
    shape = list(parameter.shape(architecture))
    if parameter.shard_axis is not None:
        shape[parameter.shard_axis] //= size
    return tuple(shape)


def check_tensor_parallel(architecture: Architecture, size: int, key: str = "parallel.tensor") -> None:
    """Raise InputError, with the arithmetic, where `size` does not divide what it shards."""
    for name in ("num_query_groups", "ffn_hidden_size", "padded_vocab_size"):
        if (count := getattr(architecture, name)) % size:
            rule = f"does not divide {name}={count} ({count} / {size} = {count / size:g})"
            raise InputError(key, size, rule, f"choose a divisor of {count}")


def stage_parameters(architecture: Architecture, pipeline: int, stage: int) -> list[tuple[Parameter, int | None]]:
    """(parameter, layer) of everything that `stage` of `pipeline`, not interleaved, writes, in checkpoint order.

    Embedding on the first stage, which has a tied output head's weight; final norm and output head on the last.
    """
    (layers,) = split_layers(architecture.num_layers, pipeline)[stage]
    return [
        (parameter, layer)
        for parameter in parameter_table(architecture)
        for layer in (layers if parameter.per_layer else [None])
        if parameter.per_layer or stage == (0 if parameter.is_embedding else pipeline - 1)
    ]


def stage_of(layer: int, num_layers: int, pipeline: int, virtual_pipeline: int | None = None) -> int:
    """The pipeline stage that holds `layer` of a model of `num_layers`."""
    stages = split_layers(num_layers, pipeline, virtual_pipeline)
    return next(stage for stage, chunks in enumerate(stages) if any(layer in chunk for chunk in chunks))


def split_layers(
    num_layers: int, pipeline: int, virtual_pipeline: int | None = None, key: str = "parallel"
) -> list[list[list[int]]]:
    """Global layer indices of every stage and virtual chunk: result[stage][chunk] -> layers.

    The split is even where pipeline x virtual divides the layers. Otherwise the first parts take one more each, because
    the last one also computes the output head and the loss. Raises InputError, naming the recipe's section `key`, where
    there are too few layers.
    """
    chunks = pipeline * (virtual_pipeline or 1)
    if num_layers < chunks:
        interleaved = f" x {key}.virtual_pipeline={virtual_pipeline}" if virtual_pipeline else ""
        rule = f"is fewer than the {chunks} stages of {key}.pipeline={pipeline}{interleaved}"
        raise InputError("num_layers", num_layers, rule, "use fewer stages")
    base, extra = divmod(num_layers, chunks)
    layers = iter(range(num_layers))
    ranges = [list(islice(layers, base + (index < extra))) for index in range(chunks)]
    # Interleaving: chunk c of stage s is the (c * pipeline + s)-th part of the model.
    return [[ranges[chunk * pipeline + stage] for chunk in range(virtual_pipeline or 1)] for stage in range(pipeline)]
