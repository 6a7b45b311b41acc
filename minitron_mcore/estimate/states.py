"""How many bytes the losses between inner states need on a rank. Pure.

Legend: n tokens of a microbatch on a rank, T tensor-parallel size, h_s and h_t hidden sizes of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.distillation.config import RELATION_BUFFER
from minitron_mcore.distillation.states.map import WIDE_SITES, Pair, holder, needs_projection, pairs, relation_heads
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.layout import axis_sizes, stage_of

# fp32 tensors that one loss holds at a time beside the projected state: copies of both states if they are bf16, unit
# vectors of both for a cosine, and their difference; for fp32 states its square too.
_COPIES = {("mse", 2): 3, ("mse", 4): 2, ("cosine", 2): 5, ("cosine", 4): 3}


@dataclass(frozen=True)
class StateMemory:
    """What the losses between inner states need on a pipeline stage; in bytes but for `projection`, in numbers.

    projection: the learned map's weight, which every rank holds.
    targets: the teacher's states, for every microbatch of a window.
    saved: of one microbatch, the losses' gradients that wait for backward.
    working: while one pair's loss is computed.
    """

    projection: int = 0
    targets: int = 0
    saved: int = 0
    working: int = 0


def state_memory(setting: Setting, stage: int) -> StateMemory:
    """What the losses of `setting` need on the student's pipeline stage `stage`."""
    student, teacher, parallel, config = setting.student, setting.teacher, setting.parallel, setting.hidden_states
    if config is None or teacher is None:
        return StateMemory()
    element, tokens = BYTES[setting.precision], setting.tokens
    depth = student.num_layers
    here = [
        pair
        for pair in pairs(config.sites, config.layers, depth, teacher.num_layers)
        if stage_of(holder(pair.site, pair.student_layer, depth), depth, parallel.pipeline, parallel.virtual_pipeline)
        == stage
    ]
    shard = {True: parallel.tensor if parallel.sequence else 1, False: parallel.tensor}

    def numbers(pair: Pair, model: Architecture) -> int:
        """Of a microbatch's state of the width of `model`, on a rank."""
        is_wide = pair.site in WIDE_SITES
        return tokens * (model.hidden_size if is_wide else axis_sizes(model)["qkv"]) // shard[is_wide]

    distinct = {(pair.site, pair.teacher_layer): numbers(pair, teacher) for pair in here}
    saved = sum(numbers(pair, teacher if pair.site in WIDE_SITES else student) for pair in here)
    working = [0]
    for pair in here:
        if pair.site in WIDE_SITES:
            working.append(numbers(pair, teacher) * (element + 4 * _COPIES[config.loss, element]))
        else:
            heads = relation_heads(config.relation_heads, student, teacher, parallel.tensor) // parallel.tensor
            length = tokens // setting.micro_batch_size
            sweep = min(RELATION_BUFFER, setting.micro_batch_size * heads * length * length)
            # Five of the sweep's buffers; queries of both in fp32, the student's gradient too.
            widths = [model.num_attention_heads * model.kv_channels for model in (student, student, teacher)]
            working.append(4 * (5 * sweep + tokens * sum(widths) // parallel.tensor))
    return StateMemory(
        projection=student.hidden_size * teacher.hidden_size if needs_projection(config.sites, student, teacher) else 0,
        targets=setting.ahead * setting.teacher_element * sum(distinct.values()),
        saved=element * saved,
        working=max(working),
    )
