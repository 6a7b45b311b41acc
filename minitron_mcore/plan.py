"""Scores + a target shape -> which global indices of every axis stay: pure data, before any weight is touched.

A plan holds indices of the teacher's global model in ascending order, so it means the same at every layout. It is a
readable JSON file and may be written by hand: everything in it is checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.families.find import find_family
from minitron_mcore.files import write_whole
from minitron_mcore.layout import check_tensor_parallel
from minitron_mcore.ranking import Cut, best, best_in_groups, closest, narrowest, without_block

FORMAT = "minitron_plan"
TARGETS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
LAYER_CHOICES = ("scattered", "contiguous")
TOLERANCE = 1e-5  # relative to an axis' largest score: how closely fp32 scores of two layouts agree


class ScoresLike(Protocol):
    """What a plan is made from; larger is more important. See importance/scores.py."""

    @property
    def architecture(self) -> Architecture: ...
    @property
    def hidden(self) -> numpy.ndarray: ...  # [hidden_size]
    @property
    def ffn(self) -> numpy.ndarray: ...  # [num_layers, ffn_hidden_size]
    @property
    def heads(self) -> numpy.ndarray: ...  # [num_layers, num_attention_heads]
    @property
    def layers(self) -> numpy.ndarray: ...  # [num_layers]
    @property
    def settings(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PruningPlan:
    """What the student keeps of the teacher: global indices, ascending.

    `layers` [student layers] and `hidden` [student hidden_size] hold for the whole model; `ffn` and `heads` map each
    kept layer of the teacher to its neurons and query heads. Every KV group stays, with equally many query heads.
    Raises InputError, naming the list, where an index does not fit the two architectures.
    """

    teacher: Architecture
    student: Architecture
    layers: list[int]
    hidden: list[int]
    ffn: dict[int, list[int]]
    heads: dict[int, list[int]]
    cuts: dict[str, Cut] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        student = self.student.to_dict()
        for name, value in self.teacher.to_dict().items():
            if name not in TARGETS and student[name] != value:
                raise InputError(f"plan: student.{name}={student[name]!r} must be the teacher's {value!r}")
        _check_indices("layers", self.layers, self.student.num_layers, self.teacher.num_layers)
        _check_indices("hidden", self.hidden, self.student.hidden_size, self.teacher.hidden_size)
        for axis, by_layer in (("ffn", self.ffn), ("heads", self.heads)):
            if sorted(by_layer) != self.layers:
                raise InputError(f"plan: {axis} has layers {sorted(by_layer)}, but the kept layers are {self.layers}")
        for layer in self.layers:
            _check_indices(f"ffn.{layer}", self.ffn[layer], self.student.ffn_hidden_size, self.teacher.ffn_hidden_size)
            _check_indices(
                f"heads.{layer}", self.heads[layer], self.student.num_attention_heads, self.teacher.num_attention_heads
            )
            groups = [head // self.teacher.heads_per_group for head in self.heads[layer]]
            for group in range(self.teacher.num_query_groups):
                if groups.count(group) != self.student.heads_per_group:
                    raise InputError(
                        f"plan: heads.{layer} keeps {groups.count(group)} query heads of KV group {group} where "
                        f"student.num_attention_heads={self.student.num_attention_heads} needs "
                        f"{self.student.heads_per_group} in each"
                    )

    def cost(self) -> dict[str, dict[str, int]]:
        """Parameters and forward FLOPs a token (at `settings.sequence_length`), of teacher and student."""
        length = self.settings.get("sequence_length", self.teacher.max_position_embeddings)
        return {
            name: {
                "parameters": model.num_parameters,
                "non_embedding_parameters": model.num_non_embedding_parameters,
                "forward_flops_per_token": model.forward_flops_per_token(length),
            }
            for name, model in (("teacher", self.teacher), ("student", self.student))
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of what is kept, whatever decided it."""
        kept = [
            self.teacher.to_dict(),
            self.student.to_dict(),
            self.layers,
            self.hidden,
            [(self.ffn[layer], self.heads[layer]) for layer in self.layers],
        ]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Readable: one line for each list of indices."""
        return (
            _readable(
                {
                    "format": FORMAT,
                    "teacher": self.teacher.to_dict(),
                    "student": self.student.to_dict(),
                    "cost": self.cost(),
                    "cuts": {axis: asdict(cut) for axis, cut in self.cuts.items()},
                    "settings": self.settings,
                    "warnings": self.warnings,
                    "layers": self.layers,
                    "hidden": self.hidden,
                    "ffn": {str(layer): indices for layer, indices in self.ffn.items()},
                    "heads": {str(layer): indices for layer, indices in self.heads.items()},
                }
            )
            + "\n"
        )

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """Read `to_json`'s text. Raises InputError where it is no plan, or one that does not fit."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InputError(f"plan: this is no JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(f'plan: "format": "{FORMAT}" is missing: `minitron plan` writes plans')
        if missing := [key for key in ("teacher", "student", "layers", "hidden", "ffn", "heads") if key not in data]:
            raise InputError(f"plan: {missing[0]} is missing")
        for key in ("teacher", "student", "ffn", "heads"):
            if not isinstance(data[key], dict):
                raise InputError(f"plan: {key} must map names to values")
        try:
            return PruningPlan(
                teacher=build_architecture(data["teacher"]),
                student=build_architecture(data["student"]),
                layers=data["layers"],
                hidden=data["hidden"],
                ffn={int(layer): indices for layer, indices in data["ffn"].items()},
                heads={int(layer): indices for layer, indices in data["heads"].items()},
                cuts={axis: Cut(**cut) for axis, cut in data.get("cuts", {}).items()},
                settings=dict(data.get("settings", {})),
                warnings=list(data.get("warnings", [])),
            )
        except InputError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"plan: it cannot be read ({error})") from error


def make_plan(
    scores: ScoresLike,
    student: Mapping[str, int | None],
    *,
    layers: str = "scattered",
    tensor: int = 1,
    pipeline: int = 1,
    sequence_length: int | None = None,
) -> PruningPlan:
    """Keep the most important indices of every axis; ties keep the lower index.

    `student`: TARGETS -> size; None or left out stays the teacher's. Heads are ranked within their KV group and as
    many are kept in each; neurons within their layer; hidden channels once for the network. `layers`: "scattered"
    keeps those of highest block influence, "contiguous" drops the block of least total influence. `tensor` and
    `pipeline`: the layout the student is meant for. `sequence_length`: for the FLOPs.

    Raises InputError naming student.<field>, prune.layers or the scores' axis. Source: arXiv 2407.14679, section 2.
    """
    teacher = scores.architecture
    target = student_shape(teacher, student, tensor, pipeline)
    for axis in ("hidden", "ffn", "heads", "layers"):
        if not numpy.isfinite(getattr(scores, axis)).all():
            raise InputError(f"scores: {axis} holds NaN or Inf: score again")
    if layers not in LAYER_CHOICES:
        raise InputError(f"prune.layers={layers!r} is not allowed: choose one of {', '.join(LAYER_CHOICES)}")
    kept_layers, layer_cut = (best if layers == "scattered" else without_block)(scores.layers, target.num_layers)
    hidden, hidden_cut = best(scores.hidden, target.hidden_size)
    cuts: dict[str, list[Cut]] = {"layers": [layer_cut], "hidden": [hidden_cut], "ffn": [], "heads": []}
    ffn: dict[int, list[int]] = {}
    heads: dict[int, list[int]] = {}
    for layer in kept_layers:
        ffn[layer], cut = best(scores.ffn[layer], target.ffn_hidden_size)
        heads[layer], group_cuts = best_in_groups(scores.heads[layer], teacher.num_query_groups, target.heads_per_group)
        cuts["ffn"].append(replace(cut, layer=layer))
        cuts["heads"] += [replace(cut, layer=layer) for cut in group_cuts]
    tolerance = float(scores.settings.get("tolerance", TOLERANCE))
    return PruningPlan(
        teacher=teacher,
        student=target,
        layers=kept_layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        cuts={axis: narrowest(places) for axis, places in cuts.items()},
        settings={
            "layers": layers,
            "tolerance": tolerance,
            "sequence_length": sequence_length or teacher.max_position_embeddings,
            "scores_fingerprint": scores_fingerprint(scores),
            "scores": dict(scores.settings),
        },
        warnings=[*_close_cuts(cuts, scores, tolerance, layers == "contiguous"), *_export_warnings(target)],
    )


def scores_fingerprint(scores: ScoresLike) -> str:
    """sha256 of the scored architecture and its scores."""
    digest = hashlib.sha256(json.dumps(scores.architecture.to_dict(), sort_keys=True).encode())
    for axis in ("hidden", "ffn", "heads", "layers"):
        digest.update(numpy.ascontiguousarray(getattr(scores, axis), dtype="<f8").tobytes())
    return digest.hexdigest()


def save_plan(plan: PruningPlan, path: Path) -> None:
    """Write `path`, whole or not at all. One rank calls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, plan.to_json())


def load_plan(path: str | Path, teacher: Architecture | None = None) -> PruningPlan:
    """Read `path` and check it, also against `teacher` where given. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"plan={path} is not there: name the file that `minitron plan` wrote")
    try:
        plan = PruningPlan.from_json(Path(path).read_text(encoding="utf-8"))
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"plan={path}: {str(error).removeprefix('plan: ')}") from error
    if teacher is not None:
        check_same_model(plan.teacher, teacher, f"plan={path} is for")
    return plan


def check_same_model(stated: Architecture, teacher: Architecture, what: str) -> None:
    """Raise InputError, beginning with `what`, where `stated` is another model than `teacher`."""
    for name, value in teacher.to_dict().items():
        if name != "init_method_std" and stated.to_dict()[name] != value:
            raise InputError(
                f"{what} another model than teacher.checkpoint: {name} is {stated.to_dict()[name]!r} "
                f"there and {value!r} in the checkpoint"
            )


def student_shape(teacher: Architecture, student: Mapping[str, int | None], tensor: int, pipeline: int) -> Architecture:
    """The teacher cut to `student` (TARGETS -> size or None). Raises InputError naming student.<field>."""
    wanted = {name: value for name, value in student.items() if value is not None}
    for name, value in wanted.items():
        if name not in TARGETS:
            raise InputError(f"student.{name}={value!r} cannot be pruned to: choose from {', '.join(TARGETS)}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"student.{name}={value!r} must be a whole number of at least 1")
        if value > getattr(teacher, name):
            raise InputError(
                f"student.{name}={value} is larger than the teacher's {getattr(teacher, name)}: "
                "pruning only makes a model smaller"
            )
    heads, groups = wanted.get("num_attention_heads", teacher.num_attention_heads), teacher.num_query_groups
    if heads % groups:
        raise InputError(
            f"student.num_attention_heads={heads} is no multiple of the teacher's num_query_groups="
            f"{groups}: every KV group stays and keeps as many query heads as the others"
        )
    target = teacher.replace(**wanted)
    if target.ffn_hidden_size % tensor:
        raise InputError(f"student.ffn_hidden_size={target.ffn_hidden_size} is no multiple of parallel.tensor={tensor}")
    if target.num_layers < pipeline:
        raise InputError(f"student.num_layers={target.num_layers} is fewer than parallel.pipeline={pipeline} stages")
    check_tensor_parallel(target, tensor)
    return target


def _close_cuts(cuts: dict[str, list[Cut]], scores: ScoresLike, tolerance: float, contiguous: bool) -> Iterator[str]:
    """Both scores at a cut may move by `tolerance` of the axis' largest; a block's total by that for each layer."""
    for axis, places in cuts.items():
        cut = closest(places)
        terms = cut.of - cut.kept if axis == "layers" and contiguous else 1
        if cut.gap() <= 2 * terms * tolerance * float(numpy.abs(getattr(scores, axis)).max()):
            where = "" if cut.layer is None else f" of layer {cut.layer}"
            where += "" if cut.group is None else f", KV group {cut.group}"
            yield (
                f"{axis}: the margin at the cut{where} is {cut.margin:.1e}, within the scores' tolerance of "
                f"{tolerance:.0e} of the largest: scores from another layout may keep another index"
            )


def _export_warnings(student: Architecture) -> Iterator[str]:
    try:
        find_family(student.family, "plan").refuse(student, "student")
    except InputError as error:
        yield f"{error}: export will refuse it"


def _check_indices(name: str, indices: Any, count: int, size: int) -> None:
    """Raise InputError unless `indices` are `count` ascending whole numbers below `size`."""
    if not isinstance(indices, list) or any(type(index) is not int for index in indices):
        raise InputError(f"plan: {name} must be a list of whole numbers")
    if len(indices) != count:
        raise InputError(f"plan: {name} keeps {len(indices)} indices where the student's shape needs {count}")
    if any(low >= high for low, high in pairwise(indices)):
        raise InputError(f"plan: {name} must be in ascending order, each index once")
    if indices[0] < 0 or indices[-1] >= size:
        wrong = indices[0] if indices[0] < 0 else indices[-1]
        raise InputError(f"plan: {name} holds {wrong}, but the teacher has the indices 0 to {size - 1}")


def _readable(value: Any, indent: str = "") -> str:
    """JSON with an indented line for each entry of a mapping, and every list on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    rows = [f"{indent}  {json.dumps(key)}: {_readable(entry, indent + '  ')}" for key, entry in value.items()]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
