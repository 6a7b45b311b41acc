"""Which inner state of the teacher each of the student's is compared with. Pure.

    site                 state                                                    read at
    embedding            output of the embedding, normed                          the input norm of layer 0
    block_output         output of layer l, normed                                the input norm of layer l + 1, or the
                                                                                  final norm after the last layer
    mlp_input            input of layer l's MLP, normed                           the pre-MLP norm of layer l
    attention_relation   queries, keys and values of layer l, as projected        linear_qkv of layer l

States are taken after a norm (arXiv 2407.14679, section 3): one that has no norm of its own after the norm that reads
it first. So a state lies on the pipeline stage of that norm, `holder`, which for a block output may be the next stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minitron_mcore.architecture import Architecture
from minitron_mcore.distillation.config import HiddenStatesConfig
from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig

KEY = "distill.hidden_states"
# Sites whose states are the residual stream's width: every channel on every tensor-parallel rank, and under sequence
# parallelism that rank's part of the sequence. An attention relation's state [s, b, G (q + 2) d] is the other way
# round: the whole sequence, and the rank's contiguous part of the channels (see layout.py).
WIDE_SITES = ("embedding", "block_output", "mlp_input")
# From the end, 0 being the last layer: the papers map 29 of 32 to 13 of 16.
_DEFAULT_DISTANCE = 2


@dataclass(frozen=True)
class Pair:
    """A state of the teacher and the one of the student that is compared with it; the embedding's layers are 0."""

    site: str
    teacher_layer: int
    student_layer: int


def pairs(
    sites: Sequence[str], layers: Sequence[Sequence[int]] | None, student_layers: int, teacher_layers: int
) -> list[Pair]:
    """Every pair that is compared: each of `sites` at each of `layers`, [[teacher layer, student layer], …] from 0.

    `student_layers`, `teacher_layers`: how many the models have. Without `layers` both models' third layer from the
    end, as in arXiv 2407.14679, table 17 (29 of 32 to 13 of 16, where a map at another depth did harm), or the first
    layer of a model that has fewer than three. At equal depth, width pruning, that is one and the same layer. The
    embedding is one pair, whatever `layers`. Raises InputError for a map that the models do not have.
    """
    distance = min(_DEFAULT_DISTANCE, student_layers - 1, teacher_layers - 1)
    chosen = [(teacher_layers - 1 - distance, student_layers - 1 - distance)] if layers is None else layers
    for teacher, student in chosen:
        for model, layer, count in (("teacher", teacher, teacher_layers), ("student", student, student_layers)):
            if not 0 <= layer < count:
                rule = f"pairs teacher layer {teacher} with student layer {student}, but the {model} has layers 0 to"
                raise InputError(f"{KEY}.layers", None, f"{rule} {count - 1}")
    return [Pair(site, *place) for site in sites for place in ([(0, 0)] if site == "embedding" else chosen)]


def needs_projection(sites: Sequence[str], student: Architecture, teacher: Architecture) -> bool:
    """Whether the student's states are lifted to the teacher's width to be compared."""
    return student.hidden_size != teacher.hidden_size and any(site in WIDE_SITES for site in sites)


def holder(site: str, layer: int, num_layers: int) -> int:
    """The layer on whose pipeline stage (and virtual chunk) the state lies."""
    if site == "embedding":
        return 0
    return min(layer + 1, num_layers - 1) if site == "block_output" else layer


def relation_heads(wanted: int, student: Architecture, teacher: Architecture, tensor_parallel: int) -> int:
    """Into how many heads queries, keys and values are cut for their relations (arXiv 2012.15828, section 3.2).

    `wanted` 0: as many as divide both models' query groups; tensor-parallel ranks then hold whole ones whenever they
    hold whole groups. Raises InputError where the heads cannot be cut so.
    """
    heads = wanted or math.gcd(student.num_query_groups, teacher.num_query_groups)
    for name, model in (("student", student), ("teacher", teacher)):
        for part, count in (("queries", model.num_attention_heads), ("keys", model.num_query_groups)):
            if count * model.kv_channels % heads:
                rule = f"does not divide the {count * model.kv_channels} channels of the {name}'s {part}"
                raise InputError(f"{KEY}.relation_heads", heads, rule)
    if heads % tensor_parallel:
        why = "" if wanted else " (the default, which divides both models' query groups)"
        rule = f"must be a multiple of parallel.tensor={tensor_parallel}, so that every rank holds whole heads"
        raise InputError(f"{KEY}.relation_heads", f"{heads}{why}", rule)
    return heads


def check_hidden_states(
    config: HiddenStatesConfig, student: Architecture, teacher: Architecture, parallel: ParallelConfig
) -> tuple[list[Pair], int]:
    """The pairs of a section `distill.hidden_states` for two models, and how many relation heads they have. Raises
    InputError, naming the key, for what these do not allow."""
    heads = 0
    if "attention_relation" in config.sites:
        if parallel.context > 1:
            rule = f"needs whole sequences, of which a rank has only a part with parallel.context={parallel.context}"
            raise InputError(f"{KEY}.sites", "attention_relation", rule, "leave one of the two out")
        heads = relation_heads(config.relation_heads, student, teacher, parallel.tensor)
    return pairs(config.sites, config.layers, student.num_layers, teacher.num_layers), heads
