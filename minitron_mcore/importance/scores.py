"""Scores of a model's prunable axes: plain arrays with global indices, and their file (safetensors). Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.files import SCORES_KIND, kind_of, whole_file
from minitron_mcore.tables import counted

AXES = ("hidden", "ffn", "heads", "layers")
# The axes whose scores depend on the aggregations and the neuron site.
WIDTH_AXES = ("hidden", "ffn", "heads", "groups")
# Error of scores relative to an axis' largest, between layouts and against exact arithmetic. In bf16 the rounding of
# the activations dominates (measured: 3e-3 on 240 tokens, less on more).
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
OF_WEIGHTS = 1e-12  # of magnitudes: float64 sums in another order


def tolerance_of(precision: str, batch: str, sequence: str) -> float:
    """TOLERANCE for a pair of aggregations: in bf16 each variance, a difference of squares, adds error.

    Measured: 9e-3 with one variance, 2.2e-2 with two. In fp32 one bound holds for all pairs (measured: 1e-6).
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
    without the layers s … s + LENGTH - 1. `settings`: how all of it was made (importance section, teacher, data,
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
        shapes = axis_shapes(self.architecture)
        for name, values in self.arrays():
            above, _, axis = name.rpartition("/")
            shape = self._depth_shape(axis) if above == "depth" else shapes[axis]
            if values.shape != shape:
                raise refusal(f"have the shape {values.shape} in {name}, but the model needs {shape}")
            if not numpy.isfinite(values).all():
                where = numpy.argwhere(~numpy.isfinite(values))[0]
                raise refusal(f"hold NaN or Inf in {name} at index {where}")

    def _depth_shape(self, name: str) -> tuple[int]:
        if not (match := re.fullmatch(r".+@0*([1-9]\d*)", name)):
            raise refusal(f"have a depth array {name!r}, whose name is not METRIC@LENGTH as in lm_loss@1")
        return (self.architecture.num_layers - int(match[1]) + 1,)

    def arrays(self) -> Iterator[tuple[str, numpy.ndarray]]:
        """(name in the file, values) of every array: "hidden", "variants/l2/mean/SITE/hidden", "depth/lm_loss@1"."""
        for axis in (*AXES, "groups") if self.groups is not None else AXES:
            yield axis, getattr(self, axis)
        nested = {f"variants/{name}": by_axis for name, by_axis in self.variants.items()} | {"depth": self.depth}
        for above, by_name in nested.items():
            yield from ((f"{above}/{name}", values) for name, values in by_name.items())

    @property
    def primary(self) -> str:
        """The choice that hidden, ffn, heads and groups hold, named as in `variants`; "" if unknown."""
        said = self.settings.get("importance", {})
        names = ("batch_aggregation", "sequence_aggregation", "neuron_site")
        if said.get("method", "activation") != "activation" or not all(name in said for name in names):
            return ""
        return "/".join(said[name] for name in names)

    def variant(self, name: str) -> Scores:
        """These scores with `name` ("BATCH/SEQUENCE/SITE") as the primary choice. Raises InputError if it is absent."""
        if name == self.primary:
            return self
        if name not in self.variants:
            there = ", ".join(filter(None, [self.primary, *self.variants])) or "none"
            remedy = "choose one of them, or score again with it in importance.aggregations and importance.neuron_sites"
            raise InputError("prune.variant", name, f"is not among the scores' variants ({there})", remedy)
        batch, sequence, site = name.split("/")
        chosen = {"batch_aggregation": batch, "sequence_aggregation": sequence, "neuron_site": site}
        settings = {**self.settings, "importance": {**self.settings.get("importance", {}), **chosen}}
        if settings.get("precision") in TOLERANCE:
            settings["tolerance"] = tolerance_of(settings["precision"], batch, sequence)
        others = {other: axes for other, axes in self.variants.items() if other != name}
        if self.primary:
            others[self.primary] = {axis: values for axis, values in self.arrays() if axis in WIDTH_AXES}
        arrays: dict[str, Any] = {**self.variants[name]}
        return replace(self, **arrays, variants=others, settings=settings)

    def depth_of(self, metric: str, length: int = 1) -> numpy.ndarray:
        """The cost by `metric` of leaving out a block of `length` layers, by its first layer: [L - length + 1].

        A block's influence is the sum of its layers' influences. Raises InputError if the metric was not measured.
        """
        if not 1 <= length <= len(self.layers):
            raise refusal(f"have no block of {length} layers, the model having {len(self.layers)}")
        if metric == "block_influence":
            return numpy.lib.stride_tricks.sliding_window_view(self.layers, length).sum(axis=1)
        if f"{metric}@{length}" not in self.depth:
            there = ", ".join(["block_influence", *self.depth])
            rule = f"was not measured for blocks of {counted(length, 'layer')}, only {there}"
            remedy = f"score again with {metric} in importance.depth_metrics and {length} in importance.block_lengths"
            raise InputError("prune.depth_metric", metric, rule, remedy)
        return self.depth[f"{metric}@{length}"]


def refusal(rule: str, remedy: str = "score again") -> InputError:
    """Of scores as a whole; `load_scores` adds the file."""
    return InputError("scores", None, rule, remedy)


def random_scores(architecture: Architecture, seed: int, settings: dict[str, Any] | None = None) -> Scores:
    """The baseline that every scoring method has to beat: uniform in [0, 1), from `seed` alone, with a stream for each
    axis. Any rank calls; all get the same."""
    arrays: dict[str, Any] = {
        axis: numpy.random.default_rng([abs(seed), place]).random(shape)
        for place, (axis, shape) in enumerate(axis_shapes(architecture).items())
    }
    said = {"importance": {"method": "random"}, **(settings or {})}
    return Scores(architecture=architecture, settings=said, **arrays)


def save_scores(scores: Scores, path: str | Path) -> None:
    """Write `path` (safetensors, global indices); whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": "minitron_scores",
        "architecture": json.dumps(scores.architecture.to_dict()),
        "settings": json.dumps(scores.settings),
    }
    arrays = {name: numpy.ascontiguousarray(values) for name, values in scores.arrays()}
    with whole_file(path) as partial:
        save_file(arrays, str(partial), metadata=metadata)


def load_scores(path: str | Path | None) -> Scores:
    """Read a scores file. Raises InputError if it is missing, truncated or some other file."""
    remedy = "name the file that `minitron score` wrote"
    if not path:
        raise InputError("scores", None, "is missing", remedy)
    if not Path(path).is_file():
        raise InputError("scores", path, kind_of(path) or "does not exist", remedy)
    try:
        with safe_open(str(path), framework="numpy") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != "minitron_scores":
                raise refusal("is not a scores file", remedy)
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return Scores(
            architecture=build_architecture(json.loads(metadata["architecture"])),
            settings=json.loads(metadata["settings"]),
            **{axis: arrays.pop(axis) for axis in AXES},
            **_further(arrays),
        )
    except InputError as error:
        raise InputError("scores", path, error.rule, error.remedy) from error
    except SafetensorError as error:
        kind = kind_of(path)
        rule = kind if kind and kind != SCORES_KIND else f"cannot be read ({error})"
        raise InputError("scores", path, rule, remedy) from error
    except (KeyError, ValueError) as error:
        raise InputError("scores", path, f"is damaged, its description cannot be read ({error})", remedy) from error


def _further(arrays: Mapping[str, numpy.ndarray]) -> dict[str, Any]:
    """`groups`, `variants` and `depth` from the names in the file; files of earlier versions have none of them."""
    result: dict[str, Any] = {"groups": arrays.get("groups"), "variants": {}, "depth": {}}
    for name, values in sorted(arrays.items()):
        if match := re.fullmatch(rf"variants/([^/]*/[^/]*/[^/]*)/({'|'.join(WIDTH_AXES)})", name):
            result["variants"].setdefault(match[1], {})[match[2]] = values
        elif name.startswith("depth/"):
            result["depth"][name.removeprefix("depth/")] = values
        elif name != "groups":
            raise refusal(f"holds {name}, which scores do not have, so that it is damaged or of another version")
    return result
