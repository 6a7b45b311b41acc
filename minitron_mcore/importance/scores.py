"""Scores of a model's prunable axes: plain arrays with global indices, and their file (safetensors)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.errors import InputError

AXES = ("hidden", "ffn", "heads", "layers")
# What depends on how activations are aggregated, and on the neuron site.
WIDTH_AXES = ("hidden", "ffn", "heads", "groups")
# How closely scores are known, relative to an axis' largest: over layouts, and against exact arithmetic. In bf16 it is
# the rounding of the activations that counts (seen: 3e-3 on 240 tokens, less on more).
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


def tolerance_of(precision: str, batch: str, sequence: str) -> float:
    """TOLERANCE of a pair of aggregations: in bf16 each variance, being made of squares, is known less closely.

    Seen: 9e-3 with one variance, 2.2e-2 with two. In fp32 the bound holds for all of them (seen: 1e-6).
    """
    variances = (batch == "var") + (sequence == "var")
    return TOLERANCE[precision] * (3**variances if precision == "bf16" else 1)


def axis_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every axis' scores."""
    a = architecture
    return {
        "hidden": (a.hidden_size,),
        "ffn": (a.num_layers, a.ffn_hidden_size),
        "heads": (a.num_layers, a.num_attention_heads),
        "groups": (a.num_layers, a.num_query_groups),
        "layers": (a.num_layers,),
    }


@dataclass(frozen=True)
class Scores:
    """Importance of the global model; larger is more important. float64 arrays; NaN and Inf are refused.

    hidden [hidden_size], one score for the network; ffn [num_layers, ffn_hidden_size], heads
    [num_layers, num_attention_heads] and groups [num_layers, num_query_groups] (KV groups; None where they were not
    scored), ranked within a layer (heads within their KV group); layers [num_layers], the block influence.

    `variants`: further aggregations and neuron sites from the same pass, by "BATCH/SEQUENCE/SITE", each a dictionary of
    WIDTH_AXES. `depth`: "METRIC@LENGTH" -> [num_layers - LENGTH + 1], entry s being how much worse the model gets
    without the layers s … s + LENGTH - 1. `settings` say how all were made (importance section, teacher, data,
    precision, tolerance).
    """

    architecture: Architecture
    hidden: numpy.ndarray
    ffn: numpy.ndarray
    heads: numpy.ndarray
    layers: numpy.ndarray
    settings: dict[str, Any] = field(default_factory=dict)
    groups: numpy.ndarray | None = None
    variants: dict[str, dict[str, numpy.ndarray]] = field(default_factory=dict)
    depth: dict[str, numpy.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        a, shapes = self.architecture, axis_shapes(self.architecture)
        for name, values in self.arrays():
            kind, _, rest = name.partition("/")
            if kind == "depth":
                shape: tuple[int, ...] = (a.num_layers - _block_length(rest) + 1,)
            else:
                shape = shapes[name.rpartition("/")[2]]
            if values.shape != shape:
                raise InputError(f"scores: {name} has shape {values.shape} where the model needs {shape}")
            if not numpy.isfinite(values).all():
                where = numpy.argwhere(~numpy.isfinite(values))[0]
                raise InputError(f"scores: {name} holds NaN or Inf at index {where}")

    def arrays(self) -> Iterator[tuple[str, numpy.ndarray]]:
        """(name in the file, values) of all there is: "hidden", "variants/l2/mean/SITE/hidden", "depth/lm_loss@1"."""
        for axis in AXES:
            yield axis, getattr(self, axis)
        if self.groups is not None:
            yield "groups", self.groups
        for variant, by_axis in self.variants.items():
            for axis, values in by_axis.items():
                yield f"variants/{variant}/{axis}", values
        for name, values in self.depth.items():
            yield f"depth/{name}", values

    @property
    def primary(self) -> str:
        """Name of the choice that hidden, ffn, heads and groups hold, like those of `variants`; "" where not known."""
        said = self.settings.get("importance", {})
        names = ("batch_aggregation", "sequence_aggregation", "neuron_site")
        if said.get("method", "activation") != "activation" or not all(name in said for name in names):
            return ""
        return "/".join(said[name] for name in names)

    def variant(self, name: str) -> Scores:
        """These scores with `name` ("BATCH/SEQUENCE/SITE") as the primary choice. Raises InputError where it is not."""
        if name == self.primary:
            return self
        if name not in self.variants:
            there = ", ".join(filter(None, [self.primary, *self.variants])) or "none"
            raise InputError(
                f"scores hold no variant {name!r}, but {there}: score again with it among importance.aggregations "
                "(BATCH/SEQUENCE) and importance.neuron_sites"
            )
        batch, sequence, site = name.split("/")
        settings = dict(self.settings)
        chosen = {"batch_aggregation": batch, "sequence_aggregation": sequence, "neuron_site": site}
        settings["importance"] = {**settings.get("importance", {}), **chosen}
        if settings.get("precision") in TOLERANCE:
            settings["tolerance"] = tolerance_of(settings["precision"], batch, sequence)
        others = {other: axes for other, axes in self.variants.items() if other != name}
        if self.primary:
            mine = {axis: getattr(self, axis) for axis in WIDTH_AXES}
            others[self.primary] = {axis: values for axis, values in mine.items() if values is not None}
        arrays: dict[str, Any] = {**self.variants[name]}
        return replace(self, **arrays, variants=others, settings=settings)

    def depth_of(self, metric: str, length: int = 1) -> numpy.ndarray:
        """What leaving out a block of `length` layers costs by `metric`, by the block's first layer: [L - length + 1].

        A block's influence is the sum of its layers'. Raises InputError where the metric was not measured.
        """
        if not 1 <= length <= len(self.layers):
            raise InputError(f"scores: a block of {length} layers is not in a model of {len(self.layers)}")
        if metric == "block_influence":
            return numpy.lib.stride_tricks.sliding_window_view(self.layers, length).sum(axis=1)
        if f"{metric}@{length}" not in self.depth:
            there = ", ".join(["block_influence", *self.depth])
            raise InputError(
                f"scores hold no {metric} of blocks of {length} layers, but {there}: score again with {metric} among "
                f"importance.depth_metrics and {length} among importance.block_lengths"
            )
        return self.depth[f"{metric}@{length}"]


def _block_length(name: str) -> int:
    metric, _, length = name.partition("@")
    if not metric or not length.isdecimal() or int(length) < 1:
        raise InputError(f"scores: depth holds {name!r}, which is no METRIC@LENGTH as in lm_loss@1")
    return int(length)


def save_scores(scores: Scores, path: Path) -> None:
    """Write `path` (safetensors, global indices); whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": "minitron_scores",
        "architecture": json.dumps(scores.architecture.to_dict()),
        "settings": json.dumps(scores.settings),
    }
    partial = path.with_name(path.name + ".tmp")
    arrays = {name: numpy.ascontiguousarray(values) for name, values in scores.arrays()}
    save_file(arrays, str(partial), metadata=metadata)
    os.replace(partial, path)


def load_scores(path: str | Path | None) -> Scores:
    """Read a scores file; raises InputError where it is missing, cut short or another file."""
    if not path:
        raise InputError("scores is not given: name the file that `minitron score` wrote")
    if not Path(path).is_file():
        raise InputError(f"scores={path} is not there: name the file that `minitron score` wrote")
    try:
        with safe_open(str(path), framework="numpy") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != "minitron_scores":
                raise InputError(f"scores={path} is no scores file: name the file that `minitron score` wrote")
            arrays = {axis: stored.get_tensor(axis) for axis in AXES}
            further = {name: stored.get_tensor(name) for name in sorted({*stored.keys()} - {*AXES})}
    except SafetensorError as error:
        raise InputError(f"scores={path} cannot be read ({error}): score again") from error
    return Scores(
        architecture=build_architecture(json.loads(metadata["architecture"])),
        settings=json.loads(metadata["settings"]),
        **arrays,
        **_further(further, f"scores={path}"),
    )


def _further(arrays: Mapping[str, numpy.ndarray], said_by: str) -> dict[str, Any]:
    """`groups`, `variants` and `depth` from the names in the file; files of earlier versions have none."""
    result: dict[str, Any] = {"groups": arrays.get("groups"), "variants": {}, "depth": {}}
    for name, values in arrays.items():
        kind, _, rest = name.partition("/")
        variant, _, axis = rest.rpartition("/")
        if kind == "variants" and axis in WIDTH_AXES and variant.count("/") == 2:
            result["variants"].setdefault(variant, {})[axis] = values
        elif kind == "depth" and rest:
            result["depth"][rest] = values
        elif name != "groups":
            raise InputError(f"{said_by} holds {name}, which no scores have: it is damaged or of another version")
    return result
