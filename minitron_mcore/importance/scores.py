"""Scores of a model's prunable axes: plain arrays with global indices, and their file (safetensors)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.errors import InputError

AXES = ("hidden", "ffn", "heads", "layers")
# How closely scores are known, relative to an axis' largest: over layouts, and against exact arithmetic. In bf16 it is
# the rounding of the activations that counts (seen: 3e-3 on 240 tokens, less on more).
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


@dataclass(frozen=True)
class Scores:
    """Importance of the global model; larger is more important. float64 arrays.

    hidden [hidden_size], one score for the network; ffn [num_layers, ffn_hidden_size] and heads
    [num_layers, num_attention_heads], ranked within a layer (heads within their KV group); layers [num_layers], the
    block influence. `settings` say how they were made (importance section, teacher, data, precision, tolerance).
    """

    architecture: Architecture
    hidden: numpy.ndarray
    ffn: numpy.ndarray
    heads: numpy.ndarray
    layers: numpy.ndarray
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        a = self.architecture
        shapes = {
            "hidden": (a.hidden_size,),
            "ffn": (a.num_layers, a.ffn_hidden_size),
            "heads": (a.num_layers, a.num_attention_heads),
            "layers": (a.num_layers,),
        }
        for axis, shape in shapes.items():
            values = getattr(self, axis)
            if values.shape != shape:
                raise InputError(f"scores: {axis} has shape {values.shape} where the model needs {shape}")
            if not numpy.isfinite(values).all():
                where = numpy.argwhere(~numpy.isfinite(values))[0]
                raise InputError(f"scores: {axis} holds NaN or Inf at index {where}")


def save_scores(scores: Scores, path: Path) -> None:
    """Write `path` (safetensors, global indices); whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": "minitron_scores",
        "architecture": json.dumps(scores.architecture.to_dict()),
        "settings": json.dumps(scores.settings),
    }
    partial = path.with_name(path.name + ".tmp")
    save_file({axis: numpy.ascontiguousarray(getattr(scores, axis)) for axis in AXES}, str(partial), metadata=metadata)
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
    except SafetensorError as error:
        raise InputError(f"scores={path} cannot be read ({error}): score again") from error
    return Scores(
        architecture=build_architecture(json.loads(metadata["architecture"])),
        settings=json.loads(metadata["settings"]),
        **arrays,
    )
