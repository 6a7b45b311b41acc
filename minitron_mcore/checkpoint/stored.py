"""What tensors an iteration's folder holds, as its `.metadata` says; their elements are not read.

They show, whoever wrote them, sizes, tying, biases and norms of their model:

    word_embeddings.weight [V, h]     linear_qkv.weight  [L, (heads + 2 groups) d, h]
    linear_fc1.weight [L, f or 2f, h] linear_proj.weight [L, h, heads d]
    linear_fc2.weight [L, h, f]       q_layernorm.weight [L, d]

Of heads, groups and the head dimension d one must be known; the two others follow. Names, whoever wrote them:

    ours, of layer 7                                  stored as
    decoder.layers.mlp.linear_fc2.weight   decoder.layers.mlp.linear_fc2.weight      [L, …], its 8th part
                                           decoder.layers.7.mlp.linear_fc2.weight    layers saved one by one
    decoder.layers.self_attention.linear_qkv.layer_norm_weight
                                           decoder.layers.7.input_layernorm.weight   the local layers' own name

and each of them behind `module.` or `model.`, as wrappers add it; a hybrid model's as in hybrid.py. Optimizer, random
states, Transformer Engine's `_extra_state` and what was trained beside the model are not part of the model. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.hybrid import gpt_names
from minitron_mcore.checkpoint.unpickle import is_tensor, read_common, read_metadata
from minitron_mcore.errors import InputError
from minitron_mcore.layout import BESIDE_THE_MODEL, LAYERS, checkpoint_key, parameter_table

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

# Which fields of an Architecture an axis of the layout table is made of.
FIELDS = {
    "vocab": ("padded_vocab_size",),
    "hidden": ("hidden_size",),
    "qkv": ("num_attention_heads", "num_query_groups", "kv_channels"),
    "heads": ("num_attention_heads", "kv_channels"),
    "head": ("kv_channels",),
    "ffn": ("ffn_hidden_size",),
    "gated_ffn": ("ffn_hidden_size",),
}
QKV, PROJ = LAYERS + "self_attention.linear_qkv.weight", LAYERS + "self_attention.linear_proj.weight"
FC1, FC2 = LAYERS + "mlp.linear_fc1.weight", LAYERS + "mlp.linear_fc2.weight"
HEADS = ("num_attention_heads", "num_query_groups", "kv_channels")
_PREFIX = re.compile(r"^(?:(?:module|model)\.)*")
_NOT_THE_MODEL = re.compile(
    r"(^|\.)(optimizer|chained_\d+|rng_state|rerun_state_machine_state|opt_param_scheduler)(\.|$)|_extra_state$"
)


class StoredTensors:
    """Shapes and dtypes of the tensors of one finished iteration, whatever layout and names it was saved under.

    `tensors`: their entries by stored name; `common`: what is stored beside them. Raises InputError if the iteration is
    damaged, or if one of its files asks for code to be run (see unpickle.py).
    """

    def __init__(self, place: Path) -> None:
        """`place`: the iteration's folder."""
        self.folder = place
        self.metadata = read_metadata(place)
        self.common = read_common(place, self.metadata)
        self.tensors: dict[str, Any] = {
            key: entry for key, entry in self.metadata.state_dict_metadata.items() if is_tensor(entry)
        }
        try:
            self.names = stored_names(self.tensors)
        except InputError as error:
            raise error.found_in(self.folder) from error

    def find(self, key: str, layer: int | None) -> tuple[str, int | None, TensorStorageMetadata]:
        """(name, index, entry) of the tensor that holds a parameter; index: which part of its leading axis is meant,
        None for all of it. Raises InputError if there is none."""
        names = self.names.get(key, {})
        if (name := names.get(layer) or names.get(None)) is None:
            of_layer = "" if layer is None else f" of layer {layer}"
            rule = f"holds no tensor {key}{of_layer}, which its architecture.yaml asks for"
            raise InputError("", self.folder, rule)
        return name, None if layer in names else layer, self.tensors[name]

    def dtype(self, key: str, layer: int | None = None) -> torch.dtype:
        """The stored dtype; if layers are stored one by one, that of `layer`, by default the first."""
        names = self.names.get(key, {})
        first = None if None in names else min((each for each in names if each is not None), default=None)
        return self.find(key, first if layer is None else layer)[2].properties.dtype

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Global shape [L, …] of a parameter with layers, stacked or not, or [...] of another; None if not stored.
        Raises InputError if layers that are stored one by one are not 0 .. L - 1, in one shape."""
        shapes = {layer: tuple(self.tensors[name].size) for layer, name in self.names.get(key, {}).items()}
        if None in shapes or not shapes:
            return shapes.get(None)
        layers, each = sorted(layer for layer in shapes if layer is not None), sorted(set(shapes.values()))
        if len(each) > 1 or layers != list(range(len(layers))):
            rule = f"holds {key} for layers {layers} in shapes {each}: all layers are needed, in one shape"
            raise InputError("", self.folder, rule)
        return (len(layers), *each[0])

    def check(self, architecture: Architecture, said_by: str) -> None:
        """Raise InputError if the stored parameters are not those of `architecture`, which `said_by` describes.

        The optimizer, and whatever else is stored beside the model, is ignored.
        """
        table = parameter_table(architecture)
        for parameter in table:
            found, wanted, axes = self.shape(parameter.key), parameter.shape(architecture), parameter.axes
            if found is None:
                raise InputError("", self.folder, f"holds no {parameter.key}: {said_by} describes another model")
            if parameter.per_layer:
                wanted, axes = (architecture.num_layers, *wanted), ("num_layers", *axes)
            if found != wanted:
                unlike = (axis for axis, here, there in zip(axes, found, wanted, strict=False) if here != there)
                axis = axes[0] if len(found) != len(wanted) else next(unlike)
                fields = ", ".join(f"{name}={getattr(architecture, name)}" for name in FIELDS.get(axis, (axis,)))
                rule = f"holds {parameter.key} of shape {found}, but {fields} in {said_by} means {wanted}"
                raise InputError("", self.folder, rule)
        if other := sorted(self.names.keys() - {parameter.key for parameter in table}):
            raise InputError("", self.folder, f"holds {other[0]}, which the model in {said_by} does not have")


def stored_names(stored: Iterable[str]) -> dict[str, dict[int | None, str]]:
    """Checkpoint key -> layer -> the name, among `stored`, of the tensor that holds it.

    The layer is None for all layers in one tensor, and for a parameter without layers.

    Raises InputError if two tensors are the same parameter, or if they belong to a hybrid model that is not a GPT.
    """
    names: dict[str, dict[int | None, str]] = {}
    of_model = {name: _PREFIX.sub("", name) for name in stored if not _NOT_THE_MODEL.search(name)}
    gpt = gpt_names(of_model.values())
    for name, plain in of_model.items():
        if plain.startswith(BESIDE_THE_MODEL):
            continue
        plain = gpt[plain]
        stacked = plain.startswith(LAYERS) and not plain.removeprefix(LAYERS)[:1].isdigit()
        key, layer = checkpoint_key(plain.replace(LAYERS, LAYERS + "0.", 1) if stacked else plain)
        other = names.setdefault(key, {}).setdefault(None if stacked else layer, name)
        if other != name:
            raise InputError("", f"{name} and {other}", "are the same parameter, stored twice")
    return names


def shown_fields(stored: StoredTensors) -> dict[str, Any]:
    """Fields of an Architecture that follow from the shapes and names of the tensors.

    Raises InputError if layers of one kind differ in shape.
    """
    embedding, fc1, fc2 = (stored.shape(key) for key in ("embedding.word_embeddings.weight", FC1, FC2))
    fields: dict[str, Any] = {
        "untie_embeddings_and_output_weights": stored.shape("output_layer.weight") is not None,
        "add_qkv_bias": stored.shape(LAYERS + "self_attention.linear_qkv.bias") is not None,
        "qk_layernorm": stored.shape(LAYERS + "self_attention.q_layernorm.weight") is not None,
        "normalization": "RMSNorm" if stored.shape("decoder.final_layernorm.bias") is None else "LayerNorm",
    }
    if embedding is not None:
        fields |= {"padded_vocab_size": embedding[0], "hidden_size": embedding[1]}
    if fc1 is not None and fc2 is not None:
        fields |= {"num_layers": fc2[0], "ffn_hidden_size": fc2[2], "gated_linear_unit": fc1[1] == 2 * fc2[2]}
    return fields


def shown_heads(stored: StoredTensors, known: Mapping[str, Any]) -> dict[str, int]:
    """All three of HEADS, from those that are `known` and the shapes; {} if they do not follow, or not evenly."""
    qkv, proj, norm = (stored.shape(key) for key in (QKV, PROJ, LAYERS + "self_attention.q_layernorm.weight"))
    if qkv is None or proj is None:
        return {}
    queries, keys = proj[2], (qkv[1] - proj[2]) // 2  # rows of all heads' queries, and of all groups' keys
    heads, groups, width = (known.get(name) for name in HEADS)
    if not width:
        whole, parts = (queries, heads) if heads else (keys, groups) if groups else (0, 0)
        width = norm[1] if norm is not None else _quotient(whole, parts)
    found = dict(zip(HEADS, (_quotient(queries, width), _quotient(keys, width), width), strict=True))
    return {name: value for name, value in found.items() if value} if all(found.values()) else {}


def _quotient(whole: int, parts: Any) -> int:
    """0 if it is not a whole number, or if `parts` is not a size."""
    sized = isinstance(parts, int) and parts > 0
    return whole // parts if sized and whole % parts == 0 else 0
