"""What tensors an iteration's folder holds, as its `.metadata` says; their elements are not read. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.stored_names import Place, StoredNames
from minitron_mcore.checkpoint.unpickle import is_tensor, read_common, read_metadata
from minitron_mcore.errors import InputError
from minitron_mcore.layout import parameter_table

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
            self.names = StoredNames(self.tensors)
        except InputError as error:
            raise error.found_in(self.folder) from error

    def find(self, key: str, layer: int | None) -> tuple[Place, TensorStorageMetadata]:
        """Where a parameter is stored. Raises InputError if it is not."""
        place = self.names.find(key, layer)
        if place is None:
            of_layer = "" if layer is None else f" of layer {layer}"
            rule = f"holds no tensor {key}{of_layer}, which its architecture.yaml asks for"
            raise InputError("", self.folder, rule)
        return place, self.tensors[place.name]

    def dtype(self, key: str, layer: int | None = None) -> torch.dtype:
        """The stored dtype; if layers are stored one by one, that of `layer`, by default the first."""
        layers = None if layer is not None else self.names.layers(key)
        return self.find(key, layers[0] if layers else layer)[1].properties.dtype

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Global shape [L, …] of a parameter with layers, stacked or not, or [...] of another; None if not stored.
        Raises InputError if layers that are stored one by one are not 0 .. L - 1, in one shape."""
        layers = self.names.layers(key)
        if layers is None:
            return tuple(self.tensors[self.names.names[key, None]].size)
        if not layers:
            return None
        shapes = {tuple(self.find(key, layer)[1].size) for layer in layers}
        if len(shapes) > 1 or layers != list(range(len(layers))):
            rule = f"holds {key} for layers {layers} in shapes {sorted(shapes)}: all layers are needed, in one shape"
            raise InputError("", self.folder, rule)
        return (len(layers), *shapes.pop())

    def check(self, architecture: Architecture, said_by: str) -> None:
        """Raise InputError if the stored parameters are not those of `architecture`, which `said_by` describes.

        The optimizer, and whatever else is stored beside the model, is ignored.
        """
        table = parameter_table(architecture)
        for parameter in table:
            found = self.shape(parameter.key)
            if found is None:
                raise InputError("", self.folder, f"holds no {parameter.key}: {said_by} describes another model")
            wanted = parameter.shape(architecture)
            axes = ("num_layers", *parameter.axes) if parameter.per_layer else parameter.axes
            wanted = (architecture.num_layers, *wanted) if parameter.per_layer else wanted
            for axis, (is_there, needed) in zip(axes, zip(found, wanted, strict=False), strict=False):
                if is_there != needed or len(found) != len(wanted):
                    fields = [f"{name}={getattr(architecture, name)}" for name in FIELDS.get(axis, (axis,))]
                    rule = (
                        f"holds {parameter.key} of shape {found}, but {', '.join(fields)} in {said_by} means {wanted}"
                    )
                    raise InputError("", self.folder, rule)
        if other := sorted(self.names.keys() - {parameter.key for parameter in table}):
            raise InputError("", self.folder, f"holds {other[0]}, which the model in {said_by} does not have")
