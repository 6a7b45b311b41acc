"""The record of what a student keeps of its teacher, and its file. Pure.

A plan holds ascending indices into the teacher's global model, so it means the same at every layout. The file is
readable JSON and may be written by hand: everything in it is checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.files import kind_of, write_whole
from minitron_mcore.pruning.config import RESIDUAL_MATRICES, RESIDUALS
from minitron_mcore.pruning.ranking import Cut
from minitron_mcore.pruning.targets import TARGETS

FORMAT = "minitron_plan"


@dataclass(frozen=True)
class HeadResidual:
    """What kept heads absorb from dropped ones: head + (head - dropped), or with LaCo's sign head + (dropped - head).

    `rule`: "paper" (arXiv 2407.14679, section 2.3) or "laco" (arXiv 2402.11187; pairing heads one to one, it replaces
    the kept head by the dropped one). `matrices`: of RESIDUAL_MATRICES; key and value only if every KV group has one
    head. `pairs`: kept layer of the teacher -> (kept head, dropped head), global query-head indices.
    """

    rule: str
    matrices: list[str]
    pairs: dict[int, list[tuple[int, int]]]


@dataclass(frozen=True)
class PruningPlan:
    """What the student keeps of the teacher: global indices, ascending.

    `layers` [student layers] and `hidden` [student hidden_size] hold for the whole model; `ffn`, `heads` and `groups`
    map each kept layer of the teacher to its neurons, query heads and KV groups. Every kept group keeps equally many
    heads; `groups` may be left out, since it follows from the heads.

    `decided`: axis -> for each cut (in the order of the kept layers, then of their kept groups) the lowest score kept
    and the highest dropped; `cuts` holds the narrowest cut of each axis.

    Raises InputError, naming the list, if an index does not fit the two architectures.
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
    groups: dict[int, list[int]] = field(default_factory=dict)
    residual: HeadResidual | None = None
    decided: dict[str, list[list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        student = self.student.to_dict()
        for name, value in self.teacher.to_dict().items():
            if name not in TARGETS and student[name] != value:
                raise refusal(f"has student.{name}={student[name]}, which must be the teacher's {value}")
        _check_indices("layers", self.layers, self.student.num_layers, self.teacher.num_layers)
        _check_indices("hidden", self.hidden, self.student.hidden_size, self.teacher.hidden_size)
        self._check_layers("ffn", self.ffn)
        self._check_layers("heads", self.heads)
        for layer in self.layers:
            _check_indices(f"ffn.{layer}", self.ffn[layer], self.student.ffn_hidden_size, self.teacher.ffn_hidden_size)
            _check_indices(
                f"heads.{layer}", self.heads[layer], self.student.num_attention_heads, self.teacher.num_attention_heads
            )
        if not self.groups:
            object.__setattr__(self, "groups", {layer: self._groups_of(layer) for layer in self.layers})
        self._check_layers("groups", self.groups)
        for layer in self.layers:
            self._check_heads(layer)
        if self.residual is not None:
            check_residual(self.teacher, self.student, self.residual.rule, self.residual.matrices)
            self._check_pairs(self.residual.pairs)

    def _groups_of(self, layer: int) -> list[int]:
        """The KV groups of the kept heads, where any were dropped."""
        if self.student.num_query_groups == self.teacher.num_query_groups:
            return list(range(self.teacher.num_query_groups))
        return sorted({head // self.teacher.heads_per_group for head in self.heads[layer]})

    def _check_layers(self, axis: str, by_layer: dict[int, list[int]]) -> None:
        if sorted(by_layer) != self.layers:
            raise refusal(f"gives {axis} for the layers {sorted(by_layer)}, but keeps the layers {self.layers}")

    def _check_heads(self, layer: int) -> None:
        teacher, student = self.teacher, self.student
        _check_indices(f"groups.{layer}", self.groups[layer], student.num_query_groups, teacher.num_query_groups)
        of_heads = [head // teacher.heads_per_group for head in self.heads[layer]]
        for group in sorted({*of_heads, *self.groups[layer]}):
            if group not in self.groups[layer]:
                raise refusal(
                    f"keeps query heads of KV group {group} in heads.{layer}, but not the group itself in "
                    f"groups.{layer}={self.groups[layer]}"
                )
            if of_heads.count(group) != student.heads_per_group:
                raise refusal(
                    f"keeps {of_heads.count(group)} query heads of KV group {group} in heads.{layer}, but "
                    f"student.num_attention_heads={student.num_attention_heads} needs {student.heads_per_group} in each"
                )

    def _check_pairs(self, pairs: dict[int, list[tuple[int, int]]]) -> None:
        self._check_layers("residual.pairs", pairs)  # type: ignore[arg-type]
        q = self.teacher.heads_per_group
        for layer, of_layer in pairs.items():
            kept = [pair[0] for pair in of_layer]
            for first, second in of_layer:
                if first not in self.heads[layer] or second in self.heads[layer] or kept.count(first) > 1:
                    rule = "must be a kept head, at most once each, and the dropped head that it absorbs"
                elif not 0 <= second < self.teacher.num_attention_heads or (q > 1 and first // q != second // q):
                    rule = "must be two heads of one KV group, or of a layer whose groups have one head each"
                else:
                    continue
                raise refusal(f"has the pair {[first, second]} in residual.pairs.{layer}, which {rule}")

    def cost(self) -> dict[str, dict[str, int]]:
        """Parameters and forward FLOPs per token (at `settings.sequence_length`), of teacher and student."""
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
        """sha256 of what is kept, however it was decided. Groups follow from the heads."""
        kept: list[Any] = [
            self.teacher.to_dict(),
            self.student.to_dict(),
            self.layers,
            self.hidden,
            [(self.ffn[layer], self.heads[layer]) for layer in self.layers],
        ]
        if self.residual is not None:
            kept.append(asdict(self.residual))
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Readable text, with one line for each list of indices."""
        content = {
            "format": FORMAT,
            "teacher": self.teacher.to_dict(),
            "student": self.student.to_dict(),
            "cost": self.cost(),
            "cuts": {axis: asdict(cut) for axis, cut in self.cuts.items()},
            "decided": self.decided,
            "settings": self.settings,
            "warnings": self.warnings,
            "layers": self.layers,
            "hidden": self.hidden,
            **{
                axis: {str(layer): indices for layer, indices in by_layer.items()}
                for axis, by_layer in (("ffn", self.ffn), ("heads", self.heads), ("groups", self.groups))
            },
        }
        if (residual := self.residual) is not None:
            pairs = {str(layer): pairs for layer, pairs in residual.pairs.items()}
            content["residual"] = {"rule": residual.rule, "matrices": residual.matrices, "pairs": pairs}
        return _readable(content) + "\n"

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """Read what `to_json` wrote. Raises InputError if it is not a plan, or one that does not fit its models."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise refusal(f"is not JSON ({error})", "name the file that `minitron plan` wrote") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise refusal(f'lacks "format": "{FORMAT}"', "name the file that `minitron plan` wrote")
        if missing := [key for key in ("teacher", "student", "layers", "hidden", "ffn", "heads") if key not in data]:
            raise refusal(f"lacks {', '.join(missing)}")
        for key in ("teacher", "student", "ffn", "heads", "groups", "residual"):
            if key in data and not isinstance(data[key], dict):
                raise refusal(f"must map names to values in {key}")
        try:
            return PruningPlan(
                teacher=build_architecture(data["teacher"]),
                student=build_architecture(data["student"]),
                layers=data["layers"],
                hidden=data["hidden"],
                ffn=_by_layer(data["ffn"]),
                heads=_by_layer(data["heads"]),
                groups=_by_layer(data.get("groups", {})),
                residual=_read_residual(data["residual"]) if "residual" in data else None,
                cuts={axis: Cut(**cut) for axis, cut in data.get("cuts", {}).items()},
                decided=dict(data.get("decided", {})),
                settings=dict(data.get("settings", {})),
                warnings=list(data.get("warnings", [])),
            )
        except InputError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise refusal(f"cannot be read ({error})", "make the plan again") from error


def refusal(rule: str, remedy: str = "") -> InputError:
    """Of a plan as a whole; `load_plan` adds the file."""
    return InputError("plan", None, rule, remedy)


def check_residual(teacher: Architecture, student: Architecture, rule: str, matrices: Sequence[str]) -> None:
    """Raise InputError, naming the key, for head residuals that this student cannot have; "none" always fits."""
    key, choices = "prune.head_residual", ("none", *RESIDUALS)
    if rule not in choices:
        raise InputError(key, rule, "is not allowed", f"choose one of {', '.join(choices)}")
    one_each = teacher.heads_per_group == 1
    allowed = RESIDUAL_MATRICES if one_each else ("query", "output")
    for name in matrices:
        if name not in allowed:
            shares = ", because the query heads of a KV group share its key and value"
            why = f"holds {name}, which is not allowed{shares if name in RESIDUAL_MATRICES else ''}"
            raise InputError("prune.residual_matrices", list(matrices), why, f"choose from {', '.join(allowed)}")
    if rule == "none":
        return
    if not matrices or len({*matrices}) < len(matrices):
        why = f"must name one or more of {', '.join(allowed)}, each once"
        raise InputError("prune.residual_matrices", list(matrices), why)
    there, left = teacher.heads_per_group, student.heads_per_group
    if one_each:
        there, left = teacher.num_attention_heads, student.num_attention_heads
    if 2 * left < there:
        why = (
            f"needs at least half of the competing heads to stay, but student.num_attention_heads="
            f"{student.num_attention_heads} keeps {left} of {there}{'' if one_each else ' in each KV group'}"
        )
        raise InputError(key, rule, why, f"keep more heads, or set {key}=none")


def save_plan(plan: PruningPlan, path: Path) -> None:
    """Write `path`, whole or not at all. One rank calls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, plan.to_json())


def load_plan(path: str | Path, teacher: Architecture | None = None) -> PruningPlan:
    """Read `path` and check it, also against `teacher` where given. Raises InputError."""
    if not Path(path).is_file():
        raise InputError("plan", path, kind_of(path) or "does not exist", "name the file that `minitron plan` wrote")
    try:
        plan = PruningPlan.from_json(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        what = kind_of(path) or "is not JSON"
        raise InputError("plan", path, what, "name the file that `minitron plan` wrote") from error
    except InputError as error:
        inside = "" if error.key in ("", "plan") else f"holds {error.key}={error.value}, which "
        raise InputError("plan", path, inside + error.rule, error.remedy) from error
    if teacher is not None:
        check_same_model(plan.teacher, teacher, "plan", path)
    return plan


def check_same_model(stated: Architecture, teacher: Architecture, key: str, value: object = None) -> None:
    """Raise InputError, naming `key`, where a plan or scores are of another model than `teacher`."""
    for name, wanted in teacher.to_dict().items():
        if name != "init_method_std" and (there := stated.to_dict()[name]) != wanted:
            rule = f"was made for another model than this teacher: {name} is {there} there and {wanted} here"
            raise InputError(key, value, rule, f"make the {key} again from this teacher")


def _check_indices(name: str, indices: Any, count: int, size: int) -> None:
    """Raise InputError unless `indices` are `count` ascending whole numbers below `size`."""
    if not isinstance(indices, list) or any(type(index) is not int for index in indices):
        raise refusal(f"must have a list of whole numbers in {name}")
    if len(indices) != count:
        raise refusal(f"keeps {len(indices)} indices in {name}, but the student's shape needs {count}")
    if any(low >= high for low, high in pairwise(indices)):
        raise refusal(f"must have {name} in ascending order, each index once")
    if indices[0] < 0 or indices[-1] >= size:
        wrong = indices[0] if indices[0] < 0 else indices[-1]
        raise refusal(f"has the index {wrong} in {name}, but the teacher's are 0 to {size - 1}")


def _by_layer(data: dict[str, Any]) -> dict[int, Any]:
    return {int(layer): indices for layer, indices in data.items()}


def _read_residual(data: dict[str, Any]) -> HeadResidual:
    pairs = {
        layer: [(int(kept), int(gone)) for kept, gone in given] for layer, given in _by_layer(data["pairs"]).items()
    }
    return HeadResidual(rule=data["rule"], matrices=list(data["matrices"]), pairs=pairs)


def _readable(value: Any, indent: str = "") -> str:
    """JSON with an indented line for each entry of a mapping, and every list on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    rows = [f"{indent}  {json.dumps(key)}: {_readable(entry, indent + '  ')}" for key, entry in value.items()]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
