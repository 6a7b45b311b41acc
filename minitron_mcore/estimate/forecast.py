"""How many bytes of memory a rank needs for a step, by part, before anything is allocated. Pure.

What is held for the whole run is exact except for the padding of Megatron's buffers; activations are what the layers
save for backward, tensor by tensor (see `layer_activations`), or recompute. Not counted: buffers of communication
libraries, fragmentation, and the process itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from minitron_mcore.architecture import BYTES
from minitron_mcore.estimate import model, teacher
from minitron_mcore.estimate.model import Setting
from minitron_mcore.tables import table

# Held from the first step to the last; the others come and go within a step.
STATIC = ("weights", "gradients", "optimizer state", "teacher weights", "teacher's training")


@dataclass(frozen=True)
class Forecast:
    """Bytes by part, of the rank that needs most."""

    parts: dict[str, int]
    stage: int  # its pipeline stage
    setting: Setting
    host: int = 0  # beside the devices, of a node's host memory
    beside: tuple[Setting, ...] = ()  # the run's other shapes, none of which needs more

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def static(self) -> int:
        return sum(self.parts.get(name, 0) for name in STATIC)

    def table(self) -> str:
        """One line per part, the largest first."""
        rows = [*sorted(self.parts.items(), key=lambda row: -row[1]), ("together", self.total)]
        rows.append(("host memory of a node", self.host))
        return table([(name, bytes_text(value)) for name, value in rows if value], indent="  ")

    def __str__(self) -> str:
        shown = sorted(((name, value) for name, value in self.parts.items() if value), key=lambda row: -row[1])
        return f"{bytes_text(self.total)} ({', '.join(f'{name} {bytes_text(value)}' for name, value in shown)})"


def bytes_text(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def forecast(setting: Setting) -> Forecast:
    """What the fullest pipeline stage needs, of a layout that can hold the models."""
    host = teacher.host_bytes(setting)
    stages = [Forecast(stage_parts(setting, stage), stage, setting, host) for stage in range(setting.parallel.pipeline)]
    return max(stages, key=lambda stage: stage.total)


def stage_parts(setting: Setting, stage: int) -> dict[str, int]:
    """Bytes by part on a rank of pipeline stage `stage`."""
    s, parallel = setting, setting.parallel
    element, last = BYTES[s.precision], stage == s.parallel.pipeline - 1
    projection, targets, saved, working = teacher.state_memory(s, stage)
    count = model.local_parameters(s.student, parallel, stage) + projection
    parts = {
        "weights": element * count,
        "gradients": 4 * count,
        "optimizer state": _optimizer_state(s, count),
        # tokens, labels and position_ids of 8 bytes, loss_mask of 4
        "batch": 28 * s.tokens * s.microbatches,
    }
    student_pass = {
        "activations": model.activations(s, stage),
        "layer at work": max(model.largest_layer_output(s.student, s, element), working),
    }
    phases = [  # one after another
        student_pass | {"loss": model.loss_buffers(s) if last else 0},
        student_pass | {"recomputed layers": model.recomputed_activations(s, stage)},
    ]
    if not s.on_cpu:  # torch's Adam works on all weights at once there
        phases.append({"optimizer's step": 4 * -(-count // s.optimizer_shards)})
    if s.teacher is not None:
        parts["teacher weights"] = teacher.teacher_weights(s, stage)
        if s.teacher_trained:
            numbers = model.local_parameters(s.teacher, parallel, stage)
            parts["teacher's training"] = 4 * numbers + _optimizer_state(s, numbers)
            phases.append({"teacher's training pass": _correction_pass(s, stage)})
        widest = 2 * model.largest_layer_output(s.teacher, s, s.teacher_element)
        phases.append({"teacher's forward": widest + teacher.teacher_layers_at_work(s)})
        if last:
            parts["teacher hidden states"] = teacher.teacher_hidden_states(s)
        parts["teacher's inner states"] = targets
        parts["inner states' losses"] = saved * model.passes(s, stage)
    return parts | max(phases, key=lambda phase: sum(phase.values()))


def _optimizer_state(setting: Setting, count: int) -> int:
    """Adam's two fp32 moments of a rank's share; with bf16 weights, their fp32 copy too."""
    return (8 if setting.precision == "fp32" else 12) * -(-count // setting.optimizer_shards)


def _correction_pass(setting: Setting, stage: int) -> int:
    """What the teacher's own training pass keeps: as any model of its shape, with the chunks of its own section."""
    s, shape = setting, setting.teacher
    assert shape is not None
    alone = replace(
        s, student=shape, teacher=None, loss_chunk_tokens=s.teacher_chunk_tokens, recompute=s.teacher_recompute
    )
    taught = model.activations(alone, stage) + model.largest_layer_output(shape, s, BYTES[s.precision])
    loss = model.loss_buffers(alone) if stage == s.parallel.pipeline - 1 else 0
    return taught + max(loss, model.recomputed_activations(alone, stage))
