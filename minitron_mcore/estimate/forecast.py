"""How many bytes of memory a rank needs for a step, by part, before anything is allocated; what helps where that is too
much, and what is said where memory runs out after all. Pure.

What is held for the whole run is exact except for the padding of Megatron's buffers; activations are what the layers
save for backward, tensor by tensor (see `layer_activations`), or recompute. Not counted: buffers of communication
libraries, fragmentation, and the process itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.distillation.config import LEAST_CHUNK, default_chunk_tokens
from minitron_mcore.errors import InputError, MemoryExhaustedError
from minitron_mcore.estimate import model, teacher
from minitron_mcore.estimate.model import Setting
from minitron_mcore.estimate.phases import teacher_pass, training_phases
from minitron_mcore.layout import check_tensor_parallel, split_layers
from minitron_mcore.model.fp8 import fp8_of
from minitron_mcore.model.recompute import Recompute, recompute_of
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.config import INSTANCES, ParallelConfig
from minitron_mcore.runtime.exhausted import is_out_of_memory
from minitron_mcore.runtime.user_buffers import BUFFERS
from minitron_mcore.runtime.world import Memory, World
from minitron_mcore.tables import table
from minitron_mcore.training.adam_state import AdamState
from minitron_mcore.training.budget import Timetable, size_keys
from minitron_mcore.training.config import TrainConfig

# Held from the first step to the last; the others come and go within a step.
STATIC = ("weights", "fp8 weights", "gradients", "optimizer state", "teacher weights", "teacher's training")


@dataclass(frozen=True)
class Forecast:
    """Bytes by part, of the rank that needs most."""

    parts: dict[str, int]
    setting: Setting
    host: int = 0  # beside the devices, of a node's host memory
    snapshot: int = 0  # beside the devices, of a node's host memory, while a checkpoint is written in the background
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
        rows += [("host memory of a node", self.host), ("checkpoint, in a node's host memory", self.snapshot)]
        return table([(name, bytes_text(value)) for name, value in rows if value], indent="  ")

    def __str__(self) -> str:
        shown = sorted(((name, value) for name, value in self.parts.items() if value), key=lambda row: -row[1])
        where = "on the CPU" if self.setting.on_cpu else "on a GPU"
        return f"{bytes_text(self.total)} {where} ({', '.join(f'{name} {bytes_text(value)}' for name, value in shown)})"


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
    stages = [
        Forecast(stage_parts(setting, stage), setting, host, _snapshot(setting, stage))
        for stage in _stages_that_count(setting)
    ]
    fullest = max(stages, key=lambda stage: stage.total)
    return replace(fullest, snapshot=max(stage.snapshot for stage in stages))


def _stages_that_count(setting: Setting) -> Iterable[int]:
    """The stages of which one is the fullest. Each needs at most what the one before needs, as the first has the
    embedding, the most layers and the most passes under way; but for the last, which has the head, and for inner states
    and a teacher in its own layout, which lie where they lie."""
    every = range(setting.parallel.pipeline)
    moved = setting.hidden_states is not None and setting.hidden_states.sites
    return every if moved or setting.teacher_layout != setting.parallel else dict.fromkeys((every[0], every[-1]))


def stage_parts(setting: Setting, stage: int) -> dict[str, int]:
    """Bytes by part on a rank of pipeline stage `stage`."""
    s, parallel = setting, setting.parallel
    element, last = BYTES[s.precision], stage == s.parallel.pipeline - 1
    projection, targets, saved, working = teacher.state_memory(s, stage)
    count = model.local_parameters(s.student, parallel, stage) + projection
    parts = {
        "weights": element * count,
        "gradients": 4 * count,
        "optimizer state": model.optimizer_state(s, count, s.adam),
        # tokens, labels and position_ids of 8 bytes, loss_mask of 4
        "batch": 28 * s.tokens * s.microbatches,
    }
    if s.async_save and s.on_cpu:  # a fork shares them until they are written to again
        parts["checkpoint being written"] = parts["weights"] + parts["gradients"] + parts["optimizer state"]
    if s.tp_comm_overlap and parallel.sequence:
        parts["user buffers"] = BUFFERS * 2 * s.tokens * s.student.hidden_size
    if s.fp8 is not None:
        parts["fp8 weights"] = model.quantised_weights(s, stage)
    phases = training_phases(s, stage, beside=projection, working=working)
    if parallel.sequence and model.uses_local_layers(s):  # of what all layers gather
        wide = max([s.student, *([s.teacher] if s.teacher and s.teacher_trained else [])], key=lambda a: a.hidden_size)
        parts["gathered states"] = element * s.tokens * wide.hidden_size
    if s.teacher is not None:
        parts["teacher weights"] = teacher.teacher_weights(s, stage)
        if s.teacher_trained:
            numbers = model.local_parameters(s.teacher, parallel, stage)
            parts["teacher's training"] = 4 * numbers + model.optimizer_state(s, numbers, s.teacher_adam)
            parts["teacher's training"] += model.quantised_weights(model.corrected(s), stage)
            if s.async_save and s.on_cpu:
                parts["checkpoint being written"] += parts["teacher weights"] + parts["teacher's training"]
            phases.append({"teacher's training pass": _correction_pass(s, stage)})
        at_work = teacher_pass(s) + teacher.teacher_layers_at_work(s)
        phases.append({"teacher's forward": at_work, "teacher's states on their way": teacher.travelling(s, stage)})
        parts["teacher's last input"] = teacher.last_inputs(s, stage)
        if last:
            parts["teacher hidden states"] = teacher.teacher_hidden_states(s)
        parts["teacher's inner states"] = targets
        parts["inner states' losses"] = saved * model.passes(s, stage)
    return parts | max(phases, key=lambda phase: sum(phase.values()))


def _snapshot(setting: Setting, stage: int) -> int:
    """Host memory of a node that holds, of each rank, the weights and its share of fp32 weights and moments. 0 where
    the host is the device."""
    s = setting
    if not s.async_save or s.on_cpu:
        return 0
    trained = [s.student, *([s.teacher] if s.teacher and s.teacher_trained else [])]
    counts = [model.local_parameters(each, s.parallel, stage) for each in trained]
    return s.local_ranks * sum(BYTES[s.precision] * count + 12 * -(-count // s.optimizer_shards) for count in counts)


def _correction_pass(setting: Setting, stage: int) -> int:
    """What the teacher's own training pass keeps: as any model of its shape, with the chunks of its own section."""
    return max(sum(phase.values()) for phase in training_phases(model.corrected(setting), stage))


def settings_of(
    recipe: Recipe,
    section: str,
    architecture: Architecture,
    timetable: Timetable,
    world: World,
    teacher: Architecture | None = None,
    sides: int = 0,
) -> list[Setting]:
    """One setting for each shape in the `timetable` of the recipe's `section`, that of the smallest batch first.

    sides: of a training on pairs of answers, the sequences that a row of theirs is; its teacher is the reference, which
    lies as the student does. 0: of any other.
    """
    train: TrainConfig = getattr(recipe, section)
    distill, shapes = recipe.distill, dict.fromkeys(start.shape for start in timetable.starts)
    taught: dict[str, Any] = {
        "teacher": teacher,
        "teacher_precision": recipe.teacher.precision,
        "teacher_placement": recipe.teacher.placement,
    }
    if not sides:
        taught |= {
            "teacher_parallel": recipe.teacher.parallel,
            "teacher_window": distill.teacher_window,
            "teacher_trained": distill.correct_teacher,
            "teacher_chunk_tokens": recipe.correct.loss_chunk_tokens,
            "teacher_recompute": recompute_of(recipe.correct),
            "teacher_fp8": fp8_of(recipe.correct),
            "teacher_adam": AdamState.of(recipe.correct),
            "hidden_states": distill.hidden_states,
        }
    return [
        Setting(
            student=architecture,
            parallel=recipe.parallel,
            precision=recipe.precision,
            data_parallel=world.size // recipe.parallel.replica_ranks,
            sequence_length=shape.sequence_length,
            global_batch_size=shape.global_batch_size,
            micro_batch_size=shape.micro_batch_size,
            loss_chunk_tokens=train.loss_chunk_tokens,
            recompute=recompute_of(train),
            tp_comm_overlap=train.tp_comm_overlap,
            fp8=fp8_of(train),
            adam=AdamState.of(train),
            on_cpu=world.device == "cpu",
            overlap_grad_reduce=train.overlap_grad_reduce,
            overlap_param_gather=train.overlap_param_gather,
            ddp_bucket_size=train.ddp_bucket_size,
            section=section,
            micro_batch_key=size_keys(train, shape, section)["micro_batch_size"],
            local_ranks=world.local_size,
            host_free=world.memory.host_free if world.memory else None,
            async_save=train.async_save,
            preference=sides > 0,
            sides=sides or 1,
            **(taught if teacher else {}),
        )
        for shape in sorted(shapes, key=lambda shape: shape.global_batch_size)
    ]


def forecast_run(
    recipe: Recipe,
    section: str,
    architecture: Architecture,
    timetable: Timetable,
    world: World,
    teacher: Architecture | None = None,
    sides: int = 0,
) -> Forecast:
    """The most that any shape in the `timetable` of the recipe's `section` needs on a rank.

    teacher: the one that runs beside the student; None: none does. sides: as in `settings_of`. Raises InputError where
    what is held throughout (weights, gradients, optimizer, teacher) exceeds a device's memory, or offloaded layers
    exceed a node's.
    """
    found = fullest(settings_of(recipe, section, architecture, timetable, world, teacher, sides))
    if world.memory is not None:
        _refuse(found, world.memory)
    return found


def fullest(settings: Sequence[Setting]) -> Forecast:
    """That of the setting which needs most, of those of a run, in the order of `settings_of`."""
    largest = largest_of(settings)
    found = max(map(forecast, largest), key=lambda found: found.total)
    return replace(found, beside=tuple(setting for setting in largest if setting is not found.setting))


def largest_of(settings: Sequence[Setting]) -> list[Setting]:
    """Those of which one needs most: of a batch size that ramps up, the last."""
    return [*{(each.sequence_length, each.micro_batch_size, each.micro_batch_key): each for each in settings}.values()]


def forecast_words(expected: Forecast, memory: Memory | None) -> list[str]:
    """The lines a user sees: the forecast beside what is free, then a warning for each memory that falls short."""
    said = f"memory of a rank: forecast {expected}"
    if memory is None:
        return [said]
    said += f"; free {bytes_text(memory.free)} of {bytes_text(memory.total)}"
    if host := expected.host + expected.snapshot:
        there = f"free {bytes_text(memory.host_free)} of {bytes_text(memory.host_total)}"
        said += f"; host memory of a node: forecast {bytes_text(host)}, {there}"
    lines = [said]
    if expected.total > memory.free:
        exceeds = f"WARNING: the forecast exceeds the free memory by {bytes_text(expected.total - memory.free)}"
        lines.append(": ".join(filter(None, [exceeds, "; ".join(advice(expected))])))
    if expected.host > memory.host_free:
        lines.append(
            f"WARNING: teacher.placement=offloaded needs {bytes_text(expected.host - memory.host_free)} more of a "
            f"node's host memory than is free, {_copies(expected)}, and the system may kill the run without a message: "
            f"{_HOST_REMEDY}"
        )
    elif host > memory.host_free:
        key = f"{expected.setting.section}.async_save"
        lines.append(
            f"WARNING: {key}=true needs {bytes_text(expected.snapshot)} of a node's host memory while a checkpoint is "
            f"written, {bytes_text(host - memory.host_free)} more than is free: set {key}=false"
        )
    return lines


_HOST_REMEDY = "set teacher.placement=sharded, or a teacher.parallel with more shards"


def _copies(expected: Forecast) -> str:
    ranks = expected.setting.local_ranks
    return f"with a copy on each of {ranks:,} ranks" if ranks > 1 else "with a copy on its one rank"


def _refuse(expected: Forecast, memory: Memory) -> None:
    if expected.static > memory.total:
        held = ", ".join(f"{name} {bytes_text(expected.parts[name])}" for name in STATIC if expected.parts.get(name))
        needs = f"needs {bytes_text(expected.static)} on a rank before a token is read ({held})"
        remedy = "; ".join(["change parallel.*, teacher.placement or the number of ranks", *advice(expected)[:1]])
        rule = f"{needs}, and a rank has {bytes_text(memory.total)}"
        raise InputError(expected.setting.section, None, rule, remedy)
    if expected.host > memory.host_total:
        needs = f"needs {bytes_text(expected.host)} of host memory on a node, {_copies(expected)}"
        rule = f"{needs}, and a node has {bytes_text(memory.host_total)}"
        raise InputError("teacher.placement", "offloaded", rule, _HOST_REMEDY)


def advice(found: Forecast, count: int = 3) -> list[str]:
    """The `count` changes of a single key that save most, each with its saving over the whole run, in words."""
    saved: dict[str, tuple[int, str]] = {}
    for key, words, changes in _changes(found.setting):
        changed = [replace(found.setting, **changes)]
        for shape in found.beside:
            is_elsewhere = key == "micro_batch_size" and shape.micro_batch_key != found.setting.micro_batch_key
            changed.append(shape if is_elsewhere else replace(shape, **changes))
        if not all(map(holds, changed)):
            continue
        saving = found.total - max(forecast(shape).total for shape in changed)
        if saving > max(saved.get(key, (0, ""))[0], found.total // 100):
            saved[key] = (saving, f"{words} saves {bytes_text(saving)}")
    return [words for _, words in sorted(saved.values(), reverse=True)[:count]]


def _changes(setting: Setting) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(key, what to set, the changed fields of Setting) for every change of one key that does not change results."""
    s, section, parallel = setting, setting.section, setting.parallel
    if s.micro_batch_size > 1:
        yield "micro_batch_size", f"{s.micro_batch_key or f'{section}.micro_batch_size'}=1", {"micro_batch_size": 1}
    if (s.loss_chunk_tokens or default_chunk_tokens(s.tokens)) > LEAST_CHUNK:
        yield "chunk", f"{section}.loss_chunk_tokens={LEAST_CHUNK}", {"loss_chunk_tokens": LEAST_CHUNK}
    if s.async_save and s.on_cpu:
        yield "async_save", f"{section}.async_save=false", {"async_save": False}
    again = "at the cost of one more forward pass,"
    if s.recompute.granularity != "full":
        yield "recompute", f"{section}.recompute_granularity=full, {again}", {"recompute": Recompute("full")}
    if s.teacher_trained and s.teacher_recompute.granularity != "full":
        yield "correct", f"correct.recompute_granularity=full, {again}", {"teacher_recompute": Recompute("full")}
    if s.teacher_trained and (s.teacher_chunk_tokens or default_chunk_tokens(s.tokens)) > LEAST_CHUNK:
        yield "correct chunk", f"correct.loss_chunk_tokens={LEAST_CHUNK}", {"teacher_chunk_tokens": LEAST_CHUNK}
    if s.teacher is not None and not s.teacher_trained:  # a trained teacher takes neither key
        if not s.preference and parallel.pipeline < (s.teacher_window or s.microbatches):
            yield "window", f"{section}.teacher_window={parallel.pipeline}", {"teacher_window": parallel.pipeline}
        if s.data_parallel > 1:
            yield "placement", "teacher.placement=sharded", {"teacher_placement": "sharded"}
        offloaded = replace(s, teacher_placement="offloaded")
        if s.host_free is None or teacher.host_bytes(offloaded) <= s.host_free:
            yield "placement", "teacher.placement=offloaded", {"teacher_placement": "offloaded"}
    parts = parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1)
    if parallel.tensor > 1 and not parallel.sequence and s.length % parts == 0:
        yield "sequence", "parallel.sequence=true", {"parallel": replace(parallel, sequence=True)}
    if parallel.num_distributed_optimizer_instances > 1:
        alone = replace(parallel, num_distributed_optimizer_instances=1)
        yield "instances", f"parallel.{INSTANCES}=1", {"parallel": alone}
    if s.data_parallel == 1 or s.data_parallel % 2 == 0:
        ranks = "" if s.data_parallel > 1 else " on twice the ranks"
        for name in ("tensor", "pipeline"):
            wider = replace(parallel, **{name: 2 * getattr(parallel, name)})
            fields = {"parallel": wider, "data_parallel": s.data_parallel // 2 or 1}
            yield name, f"parallel.{name}={getattr(wider, name)}{ranks}", fields
    yield "data", "twice as many ranks at the same parallel.*", {"data_parallel": 2 * s.data_parallel}


def holds(setting: Setting) -> bool:
    """Whether a run can have this setting."""
    s = setting
    is_whole = is_whole_batch(s.global_batch_size, s.micro_batch_size, s.data_parallel, s.parallel)
    instances = s.parallel.num_distributed_optimizer_instances
    return is_whole and s.data_parallel * s.parallel.context % instances == 0 and holds_models(setting)


def is_whole_batch(batch: int, micro_batch: int, data_parallel: int, parallel: ParallelConfig) -> bool:
    """Whether a global batch is whole microbatches on every rank, as many as the interleaved schedule needs."""
    microbatches, rest = divmod(batch, micro_batch * data_parallel)
    return not rest and not (parallel.virtual_pipeline and microbatches % parallel.pipeline)


def holds_models(setting: Setting) -> bool:
    """Whether its layout can hold both models."""
    try:
        for shape, parallel in ((setting.student, setting.parallel), (setting.teacher, setting.teacher_layout)):
            if shape is not None:
                check_tensor_parallel(shape, parallel.tensor)
                split_layers(shape.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    except InputError:
        return False
    return True


@contextmanager
def explaining_memory(expected: Forecast, when: str) -> Iterator[None]:
    """Within the `with`, memory that runs out is raised as MemoryExhaustedError, with what was needed and what helps.

    when: what was going on, in words.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryExhaustedError) or not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        lines = [f"out of memory {when}: {said[:300]}", "the forecast of a rank:", expected.table()]
        if helpful := advice(expected):
            lines += ["what helps most:", *(f"  {line}" for line in helpful)]
        raise MemoryExhaustedError("\n".join(lines)) from error
