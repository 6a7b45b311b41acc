"""The record of what a student keeps of its teacher, and its file. Pure.

A plan holds ascending indices into the teacher's global model, so it means the same at every layout. The file is
readable JSON and may be written by hand: everything in it is checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.files import kind_of, write_whole
from minitron_mcore.keys import OneOf
from minitron_mcore.pruning.config import RESIDUAL_MATRICES, RESIDUALS
from minitron_mcore.pruning.ranking import Cut
from minitron_mcore.pruning.targets import TARGETS

FORMAT = "minitron_plan"
# What is kept -> the size that says how much.
SIZES = dict(zip(("layers", "hidden", "ffn", "heads", "groups"), TARGETS, strict=True))

_REMEDY = "name the file that `minitron plan` wrote"
# In a file fields that follow from the family may be left out.
_Model = Annotated[
    Architecture, BeforeValidator(lambda fields: build_architecture(fields) if isinstance(fields, dict) else fields)
]
# Pydantic's errors that have words of their own.
_RULES = {
    "missing": "lacks {}",
    "dataclass_type": "must map names to values in {}",
    "dict_type": "must map names to values in {}",
    "list_type": "must have a list in {}",
    "int_type": "must have a whole number in {}",
}


@dataclass(frozen=True)
class HeadResidual:
    """What kept heads absorb from dropped ones: head + (head - dropped), or with LaCo's sign head + (dropped - head).

    `rule`: "paper" (arXiv 2407.14679, section 2.3) or "laco" (arXiv 2402.11187; pairing heads one to one, it replaces
    the kept head by the dropped one). `matrices`: of RESIDUAL_MATRICES; key and value only if every KV group has one
    head. `pairs`: kept layer of the teacher -> (kept head, dropped head), global query-head indices.
    """

    rule: Annotated[str, OneOf(*RESIDUALS)]
    matrices: list[Annotated[str, OneOf(*RESIDUAL_MATRICES)]]
    pairs: dict[int, list[tuple[int, int]]]


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """What the student keeps of the teacher: global indices, ascending.

    `layers` [student layers] and `hidden` [student hidden_size] hold for the whole model; `ffn`, `heads` and `groups`
    map each kept layer of the teacher to its neurons, query heads and KV groups. Every kept group keeps equally many
    heads; `groups` may be left out, since it follows from the heads.

    `decided`: axis -> for each cut (in the order of the kept layers, then of their kept groups) the lowest score kept
    and the highest dropped; `cuts` holds the narrowest cut of each axis.

    Raises InputError, naming the list, if an index does not fit the two architectures.
    """

    teacher: _Model
    student: _Model
    cuts: dict[str, Cut] = field(default_factory=dict)
    decided: dict[str, list[list[float]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    layers: list[int]
    hidden: list[int]
    ffn: dict[int, list[int]]
    heads: dict[int, list[int]]
    groups: dict[int, list[int]] = field(default_factory=dict)
    residual: HeadResidual | None = None

    def __post_init__(self) -> None:
        student = self.student.to_dict()
        for name, value in self.teacher.to_dict().items():
            if name not in TARGETS and student[name] != value:
                raise refusal(f"has student.{name}={student[name]}, which must be the teacher's {value}")
        for axis, size in SIZES.items():
            if axis == "groups" and not self.groups:
                object.__setattr__(self, "groups", {layer: self._groups_of(layer) for layer in self.layers})
            kept = getattr(self, axis)
            if isinstance(kept, dict):
                self._check_layers(axis, kept)
                kept = {f"{axis}.{layer}": kept[layer] for layer in self.layers}
            else:
                kept = {axis: kept}
            for name, indices in kept.items():
                _check_indices(name, indices, student[size], getattr(self.teacher, size))
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

    def _check_layers(self, axis: str, by_layer: dict[int, Any]) -> None:
        if sorted(by_layer) != self.layers:
            raise refusal(f"gives {axis} for the layers {sorted(by_layer)}, but keeps the layers {self.layers}")

    def _check_heads(self, layer: int) -> None:
        groups, student = self.groups[layer], self.student
        counts = Counter(head // self.teacher.heads_per_group for head in self.heads[layer])
        for group in sorted({*counts, *groups}):
            heads = f"query heads of KV group {group} in heads.{layer}, but"
            if group not in groups:
                raise refusal(f"keeps {heads} not the group itself in groups.{layer}={groups}")
            if counts[group] != student.heads_per_group:
                needed = f"student.num_attention_heads={student.num_attention_heads} needs {student.heads_per_group}"
                raise refusal(f"keeps {counts[group]} {heads} {needed} in each")

    def _check_pairs(self, pairs: dict[int, list[tuple[int, int]]]) -> None:
        self._check_layers("residual.pairs", pairs)
        q = self.teacher.heads_per_group
        for layer, of_layer in pairs.items():
            times = Counter(kept for kept, _ in of_layer)
            for first, second in of_layer:
                if first not in self.heads[layer] or second in self.heads[layer] or times[first] > 1:
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
        by_layer = [(self.ffn[layer], self.heads[layer]) for layer in self.layers]
        kept: list[Any] = [self.teacher.to_dict(), self.student.to_dict(), self.layers, self.hidden, by_layer]
        if self.residual is not None:
            kept.append(asdict(self.residual))
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Readable text, with one line for each list of indices."""
        fields = asdict(self)
        models = {name: fields.pop(name) for name in ("teacher", "student")}
        if self.residual is None:
            del fields["residual"]
        return _readable({"format": FORMAT, **models, "cost": self.cost(), **fields}) + "\n"

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """Read what `to_json` wrote. Raises InputError if it is not a plan, or one that does not fit its models."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise refusal(f"is not JSON ({error})", _REMEDY) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise refusal(f'lacks "format": "{FORMAT}"', _REMEDY)
        try:
            return _FILE.validate_json(text, strict=True)
        except TypeError as error:
            raise refusal(f"cannot be read ({error})", "make the plan again") from error
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(cause := first.get("ctx", {}).get("error"), InputError):
                raise cause from error
            alike = [each for each in error.errors() if each["type"] == first["type"] == "missing"] or [first]
            where = ", ".join(".".join(map(str, each["loc"])) for each in alike)
            unknown = f"cannot be read ({first['msg']} in {where})"
            raise refusal(_RULES.get(first["type"], unknown).format(where), "make the plan again") from error


_FILE = TypeAdapter(PruningPlan)


def refusal(rule: str, remedy: str = "") -> InputError:
    """Of a plan as a whole; `load_plan` adds the file."""
    return InputError("plan", None, rule, remedy)


def check_residual(teacher: Architecture, student: Architecture, rule: str, matrices: Sequence[str]) -> None:
    """Raise InputError, naming the key, for head residuals that this student cannot have; "none" always fits."""
    one_each = teacher.heads_per_group == 1
    allowed = RESIDUAL_MATRICES if one_each else ("query", "output")
    for name in matrices:
        if name not in allowed:
            why = f"holds {name}, which is not allowed, because the query heads of a KV group share its key and value"
            raise InputError("prune.residual_matrices", list(matrices), why, f"choose from {', '.join(allowed)}")
    if rule == "none":
        return
    if rule not in RESIDUALS:
        raise InputError("prune.head_residual", rule, "is not allowed", f"choose one of {', '.join(RESIDUALS)}")
    if not matrices or len({*matrices}) < len(matrices):
        why = f"must name one or more of {', '.join(allowed)}, each once"
        raise InputError("prune.residual_matrices", list(matrices), why)
    there, left = teacher.heads_per_group, student.heads_per_group
    if one_each:
        there, left = teacher.num_attention_heads, student.num_attention_heads
    if 2 * left < there:
        heads = f"{left} of {there}{'' if one_each else ' in each KV group'}"
        few = f"student.num_attention_heads={student.num_attention_heads} keeps {heads}"
        why = f"needs at least half of the competing heads to stay, but {few}"
        raise InputError("prune.head_residual", rule, why, "keep more heads, or set prune.head_residual=none")


def save_plan(plan: PruningPlan, path: str | Path) -> None:
    """Write `path`, whole or not at all. One rank calls."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, plan.to_json())


def load_plan(path: str | Path, teacher: Architecture | None = None) -> PruningPlan:
    """Read `path` and check it, also against `teacher` where given. Raises InputError."""
    if not Path(path).is_file():
        raise InputError("plan", path, kind_of(path) or "does not exist", _REMEDY)
    try:
        plan = PruningPlan.from_json(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError("plan", path, kind_of(path) or "is not JSON", _REMEDY) from error
    except InputError as error:
        inside = "" if error.key in ("", "plan") else f"holds {error.key}={error.value}, which "
        raise InputError("plan", path, inside + error.rule, error.remedy) from error
    if teacher is not None:
        check_same_model(plan.teacher, teacher, "plan", path)
    return plan


def check_same_model(stated: Architecture, teacher: Architecture, key: str, value: object = None) -> None:
    """Raise InputError, naming `key`, where a plan or scores are of another model than `teacher`."""
    if difference := teacher.difference(stated):
        rule = f"was made for another model than this teacher: {difference}"
        raise InputError(key, value, rule, f"make the {key} again from this teacher")


def _check_indices(name: str, indices: list[int], count: int, size: int) -> None:
    """Raise InputError unless `indices` are `count` ascending ones below `size`; a plan may be made by hand."""
    if not isinstance(indices, list) or any(type(index) is not int for index in indices):
        raise refusal(f"must have a list of whole numbers in {name}")
    if len(indices) != count:
        raise refusal(f"keeps {len(indices)} indices in {name}, but the student's shape needs {count}")
    if any(low >= high for low, high in pairwise(indices)):
        raise refusal(f"must have {name} in ascending order, each index once")
    if indices[0] < 0 or indices[-1] >= size:
        wrong = indices[0] if indices[0] < 0 else indices[-1]
        raise refusal(f"has the index {wrong} in {name}, but the teacher's are 0 to {size - 1}")


def _readable(value: Any, indent: str = "") -> str:
    """JSON with an indented line for each entry of a mapping, and every list on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    rows = [f"{indent}  {json.dumps(str(key))}: {_readable(entry, indent + '  ')}" for key, entry in value.items()]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
