"""How long a training step takes on a machine, part by part. Pure.

The step is the busiest pipeline stage's work and what it waits for. Stages work at their own pace: m microbatches at
t_s seconds on stage s take

    m max t + (sum t - max t) / v        seconds, with v chunks a stage

which for equal stages is the bubble (P - 1) / v of 1F1B and of the interleaved schedule (arXiv 2104.04473, 2.2). The
teacher makes its own pass ahead, in each window; where it lies as the student does, the student's first microbatches
fill what the teacher's last ones leave empty. Not counted: validation, saving, and how the ranks' clocks differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from minitron_mcore.distillation.states.map import WIDE_SITES, holder, needs_projection, pairs
from minitron_mcore.estimate import teacher as teacher_memory
from minitron_mcore.estimate.model import Setting, corrected, local_parameters, narrow_layers, quantised_weights
from minitron_mcore.estimate.operations import Pass, Seconds, log_prob_seconds, loss_seconds
from minitron_mcore.estimate.overlap import gathering, gathering_wait, reduction, reduction_wait
from minitron_mcore.estimate.rates import all_reduce, gather, product, send, traffic
from minitron_mcore.estimate.stages import READ_AHEAD
from minitron_mcore.layout import axis_sizes, split_layers, stage_of
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.devices import Machine
from minitron_mcore.training.adam_state import FULL

# Bytes that the optimizer's step reads and writes: for each parameter of a rank (gradients set to zero, divided by the
# tokens), and for each of its share (norm and clipping, then Adam: fused on a GPU, torch's operations on the CPU).
EACH_PARAMETER, CLIPPED, FUSED_ADAM, TORCH_ADAM = 12, 12, 28, 80
PARTS = (
    "student",
    "recomputation",
    "teacher",
    "loss",
    "inner states' losses",
    "tensor-parallel communication",
    "context-parallel communication",
    "pipeline communication",
    "pipeline bubble",
    "teacher's layers fetched",
    "teacher's states sent",
    "data-parallel communication",
    "optimizer",
    "teacher's training",
    "data",
)


@dataclass(frozen=True)
class StepTime:
    """Seconds by part of PARTS, which add up; floating-point operations of the whole step (training/accounting.py)."""

    parts: dict[str, float]
    tokens: int
    gpus: int
    student_flops: float
    teacher_flops: float
    peak: float  # FLOP/s of a GPU in the student's precision

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total

    @property
    def flops_per_gpu(self) -> float:
        """FLOP/s of the models on each GPU."""
        return (self.student_flops + self.teacher_flops) / self.total / self.gpus

    @property
    def utilization(self) -> float:
        """Model FLOPs utilization, a share of the peak."""
        return self.flops_per_gpu / self.peak


Stage = dict[str, float]  # seconds of one microbatch by part


@dataclass(frozen=True)
class Share:
    """What a step takes whatever the number of its microbatches: of a microbatch on each of the student's stages, and
    of the teacher's where that one makes a pass ahead; of gradients, weights and optimizer. gathering: seconds that the
    student would wait for its weights if nothing ran ahead of it. corrected: of the teacher's own training, where it is
    trained."""

    student: Sequence[Stage]
    teacher: Sequence[Stage]
    synchronised: Stage
    gathering: float
    corrected: Share | None


def step_time(setting: Setting, machine: Machine) -> StepTime:
    """What a step of `setting` takes. Raises InputError where `machine` lacks a figure that it needs."""
    return _step_time(setting, machine, _share_of(setting, machine))


def step_times(settings: Sequence[Setting], machine: Machine) -> list[StepTime]:
    """What a step of each takes. What settings share that differ by their global batch size alone, as those of a
    ramp-up, is worked out once. Raises InputError as `step_time`."""
    known: list[tuple[Setting, Share]] = []
    found = []
    for setting in settings:
        alike = replace(setting, global_batch_size=0, micro_batch_key="")
        share = next((share for other, share in known if other == alike), None)
        if share is None:
            share = _share_of(setting, machine)
            known.append((alike, share))
        found.append(_step_time(setting, machine, share))
    return found


def _share_of(setting: Setting, machine: Machine) -> Share:
    s = setting
    runs_ahead = s.teacher is not None and not s.teacher_trained
    return Share(
        _student_stages(s, machine),
        _teacher_stages(s, machine) if runs_ahead else (),
        *_synchronisation(s, machine),
        _share_of(corrected(s), machine) if s.teacher_trained and s.teacher is not None else None,
    )


def _step_time(setting: Setting, machine: Machine, share: Share) -> StepTime:
    s, parts = setting, defaultdict(float, dict.fromkeys(PARTS, 0.0))
    windows = ceil(s.microbatches / s.ahead) if s.teacher is not None else 1
    _add_schedule(parts, share.student, s.microbatches, windows, s.parallel.virtual_pipeline or 1)
    teacher_flops = ahead = 0.0
    if s.teacher is not None:
        teacher_flops = s.teacher.forward_flops_per_token(s.length)
        if share.corrected is not None:
            teacher_flops *= 3
            parts["teacher's training"] = _step_time(corrected(s), machine, share.corrected).total
        else:
            ahead = _add_teacher(parts, s, machine, windows, share)
    for name, seconds in share.synchronised.items():
        parts[name] += seconds
    parts["data-parallel communication"] += max(0.0, share.gathering - ahead)
    tokens = s.global_batch_size * s.sequence_length
    # Token ids, labels, positions and masks, from the host.
    parts["data"] = 28 * s.tokens * s.microbatches / machine.host_bandwidth
    return StepTime(
        dict(parts),
        tokens,
        s.world_size,
        tokens * s.student.training_flops_per_token(s.length),
        tokens * teacher_flops,
        machine.peak(s.products),
    )


@dataclass(frozen=True)
class ForwardPass:
    """Over all sequences of a set once, without gradients."""

    seconds: float
    tokens: int
    flops: float


def reference_pass(setting: Setting, machine: Machine, sequences: int) -> ForwardPass:
    """What works out the log-probabilities of so many sequences, each as long as they may be (alignment/reference.py):
    by the model of `setting` before it is trained, `micro_batch_size` sequences at a time."""
    alone = replace(
        setting, sequence_length=setting.length, sides=1, teacher_parallel=None, teacher_placement="resident"
    )
    alone = replace(alone, teacher=alone.student, teacher_precision=None)
    stages, parts = _teacher_stages(alone, machine), defaultdict(float, dict.fromkeys(PARTS, 0.0))
    _merge(stages[-1], _by_part("loss", log_prob_seconds(student_pass(alone, machine), alone.loss_chunk_tokens)))
    microbatches = ceil(sequences / (alone.micro_batch_size * alone.data_parallel))
    calls = ceil(microbatches / (READ_AHEAD["reference"] * alone.parallel.pipeline))
    _add_schedule(parts, stages, microbatches, calls, alone.parallel.virtual_pipeline or 1)
    tokens = sequences * alone.length
    return ForwardPass(sum(parts.values()), tokens, tokens * alone.student.forward_flops_per_token(alone.length))


def student_pass(setting: Setting, machine: Machine) -> Pass:
    """The student's microbatches on a rank."""
    s = setting
    return Pass(machine, s.student, s.parallel, s.precision, s.tokens, s.length, s.on_cpu)


def teacher_pass(setting: Setting, machine: Machine) -> Pass:
    """The teacher's, in its own layout."""
    s, own = setting, setting.teacher_layout
    assert s.teacher is not None
    tokens = s.micro_batch_size * s.sequence_length // own.context
    return Pass(machine, s.teacher, own, s.teacher_precision or s.precision, tokens, s.length, s.on_cpu)


def _student_stages(setting: Setting, machine: Machine) -> list[Stage]:
    """What a microbatch takes on each stage, forward and backward."""
    s, passing = setting, student_pass(setting, machine)
    # By whether a layer's products are in fp8.
    passes = {False: passing} | ({True: replace(passing, precision="fp8")} if s.fp8 else {})
    step = {narrow: each.layer_forward() + each.layer_backward() for narrow, each in passes.items()}
    of_teacher = teacher_pass(s, machine) if s.teacher is not None and not s.teacher_trained else None
    of_teacher = replace(of_teacher, parallel=s.parallel, tokens=s.tokens) if of_teacher else None
    if s.teacher_trained and s.teacher is not None:
        of_teacher = replace(passing, model=s.teacher)
    loss = loss_seconds(passing, of_teacher, s.loss_chunk_tokens, again=s.preference)
    stages, last = [], s.parallel.pipeline - 1
    for number in range(s.parallel.pipeline):
        chunks, again, work = narrow_layers(s, number), Seconds(), Seconds()
        for narrow, each in passes.items():
            again += sum((_recomputed(s, each, chunk, narrow) for chunk in chunks), Seconds())
            work += step[narrow] * sum(chunk.count(narrow) for chunk in chunks)
        if number == 0:
            work += passing.embedding_forward() + passing.embedding_backward()
        stage = _by_part("student", work)
        _merge(stage, _by_part("recomputation", again))
        if number == last:
            _merge(stage, _by_part("loss", loss))
        stage["inner states' losses"] = _inner_states(s, machine, number)
        if s.parallel.pipeline > 1:
            # A chunk's states go on, and its gradients come back; the first and last parts of the model have one less.
            sends = 2 * len(chunks) * send(machine, passing.boundary(), world=s.world_size)
            stage["pipeline communication"] = _beside_work(s.parallel, sends, stage, s.on_cpu)
        stages.append(stage)
    return stages


def _beside_work(parallel: ParallelConfig, sends: float, stage: Stage, on_cpu: bool) -> float:
    """What is left of a stage's sends: the interleaved schedule alone works meanwhile (runtime/repairs.py)."""
    hides = parallel.virtual_pipeline is not None and not on_cpu
    return max(0.0, sends - sum(stage.values())) if hides else sends


def _recomputed(setting: Setting, passing: Pass, chunk: list[bool], narrow: bool) -> Seconds:
    """What backward works out again of a chunk's layers that are `narrow`, or not."""
    recompute = setting.recompute
    if recompute.granularity == "selective":
        return passing.mlp_forward() * chunk.count(narrow)
    if recompute.granularity != "full":
        return Seconds()
    again = chunk if recompute.method == "uniform" else chunk[: recompute.num_layers]
    return passing.layer_forward() * again.count(narrow)


def _inner_states(setting: Setting, machine: Machine, stage: int) -> float:
    """Losses between inner states: the learned map of the student's, three products, and some ten passes in fp32."""
    s, config, teacher = setting, setting.hidden_states, setting.teacher
    if config is None or teacher is None:
        return 0.0
    seconds, depth = 0.0, s.student.num_layers
    shard = s.parallel.tensor if s.parallel.sequence else 1
    maps = needs_projection(config.sites, s.student, teacher)
    for pair in pairs(config.sites, config.layers, depth, teacher.num_layers):
        place = holder(pair.site, pair.student_layer, depth)
        if stage_of(place, depth, s.parallel.pipeline, s.parallel.virtual_pipeline) != stage:
            continue
        if pair.site in WIDE_SITES:
            rows = s.tokens / shard
            seconds += traffic(machine, 40 * rows * teacher.hidden_size)
            if maps:
                seconds += 3 * product(machine, rows, s.student.hidden_size, teacher.hidden_size, s.precision)
        else:
            # Relations of queries, keys and values: scores of both models, forward and back.
            width = sum(axis_sizes(model)["heads"] for model in (s.student, s.student, s.student, teacher))
            length = s.tokens // s.micro_batch_size
            seconds += 3 * product(machine, s.tokens, width / s.parallel.tensor, length, "fp32")
            seconds += traffic(machine, 40 * s.tokens * length * config.relation_heads)
    return seconds


def _add_schedule(
    parts: dict[str, float], stages: Sequence[Stage], microbatches: int, windows: int, chunks: int
) -> None:
    """Add the busiest stage's time over all microbatches, and its bubble once a window."""
    totals = [sum(stage.values()) for stage in stages]
    busiest = totals.index(max(totals))
    for name, seconds in stages[busiest].items():
        parts[name] += microbatches * seconds
    parts["pipeline bubble"] += windows * (sum(totals) - totals[busiest]) / chunks


def _teacher_stages(setting: Setting, machine: Machine) -> list[Stage]:
    """What a microbatch of the teacher's own forward pass takes on each stage of its own layout, and what brings its
    layers."""
    s, own = setting, setting.teacher_layout
    assert s.teacher is not None
    passing = teacher_pass(s, machine)
    layer, fetch = passing.layer_forward(), _fetched(s, machine)
    # A layer is on its way while the one before it runs.
    waits = fetch if s.on_cpu else max(0.0, fetch - layer.total)
    stages = []
    for number, chunks in enumerate(split_layers(s.teacher.num_layers, own.pipeline, own.virtual_pipeline)):
        layers = sum(map(len, chunks))
        stage = _by_part("teacher", layer * layers + (passing.embedding_forward() if number == 0 else Seconds()))
        stage["teacher's layers fetched"] = waits * layers
        if own.pipeline > 1:
            sends = len(chunks) * send(machine, passing.boundary(), world=s.world_size)
            stage["pipeline communication"] = _beside_work(own, sends, stage, s.on_cpu)
        stages.append(stage)
    return stages


def _add_teacher(parts: dict[str, float], setting: Setting, machine: Machine, windows: int, share: Share) -> float:
    """Add the teacher's pass ahead of each window, and what brings its states. Returns for how long the links between
    data-parallel ranks are free before the student begins."""
    s, own = setting, setting.teacher_layout
    assert s.teacher is not None
    replicas = s.world_size // own.replica_ranks

    def run(microbatches: int) -> int:
        """Of so many on each of the student's replicas, what a replica of the teacher runs."""
        count = ceil(microbatches * s.data_parallel / replicas)
        return ceil(count / own.pipeline) * own.pipeline if own.virtual_pipeline else count

    count, last = run(s.ahead), run(s.microbatches - (windows - 1) * s.ahead)
    virtual = own.virtual_pipeline or 1
    _add_schedule(parts, share.teacher, (windows - 1) * count + last, windows, virtual)
    if own == s.parallel:
        parts["pipeline bubble"] -= windows * _filled(share.teacher, share.student, virtual)
    else:
        states = s.ahead * s.tokens * s.teacher.hidden_size * s.teacher_element
        shard = s.parallel.tensor if s.parallel.sequence else 1
        parts["teacher's states sent"] = windows * send(machine, states / shard, world=s.world_size)
    taken = max(stage["teacher"] for stage in share.teacher)
    if s.teacher_placement == "sharded":
        taken -= _fetched(s, machine) * ceil(s.teacher.num_layers / own.pipeline)
    return count * max(0.0, taken)


def _filled(teacher: Sequence[Stage], student: Sequence[Stage], chunks: int) -> float:
    """Of the bubble, where the student's first forward passes follow the teacher's last ones without a wait."""
    forward = [sum(stage.values()) / 3 for stage in student]
    ahead = [sum(stage.values()) for stage in teacher]
    return sum(map(min, ahead[:-1], forward[:-1])) / chunks


def _fetched(setting: Setting, machine: Machine) -> float:
    """Seconds that one of the teacher's layers takes to come, where it is not resident."""
    s, own = setting, setting.teacher_layout
    size = teacher_memory.layer_bytes(s) if s.teacher_placement != "resident" else 0
    if s.teacher_placement == "sharded":
        return gather(machine, size, s.world_size // (own.tensor * own.pipeline), stride=own.tensor)
    if s.teacher_placement == "offloaded":
        return traffic(machine, 2 * size) if s.on_cpu else size / machine.host_bandwidth
    return 0.0


def _synchronisation(setting: Setting, machine: Machine) -> tuple[Stage, float]:
    """(what a step takes at its end, how long the next one's first forward pass would wait): gradients reduced to their
    shards and weights gathered from them, over data- and context-parallel ranks; and the optimizer's own step. That of
    the stage with most parameters, or that everything waits for."""
    s, parallel, waits = setting, setting.parallel, 0.0
    count = max(local_parameters(s.student, parallel, stage) for stage in range(parallel.pipeline))
    reduced, gathered = reduction(s, machine, count), gathering(s, machine, count)
    if machine.overlap is not None:
        reduced, gathered = (1 - machine.overlap) * reduced, (1 - machine.overlap) * gathered
    elif not s.on_cpu:  # on the CPU both would share its cores
        passing = replace(student_pass(s, machine), precision=s.products)
        if s.overlap_grad_reduce is not False:
            reduced = reduction_wait(s, machine, passing.layer_backward().total)
        if s.overlap_param_gather is not False:
            gathered, waits = 0.0, gathering_wait(s, machine, passing.layer_forward().total)
    found = {"data-parallel communication": reduced + gathered}
    if parallel.pipeline > 1 and not s.student.untie_embeddings_and_output_weights:
        table = 4 * s.student.padded_vocab_size / parallel.tensor * s.student.hidden_size
        found["pipeline communication"] = all_reduce(machine, table, 2, stride=s.world_size // parallel.pipeline)
    # What its types save of 12 bytes of state is neither read nor written.
    adam = TORCH_ADAM if s.on_cpu else FUSED_ADAM - 2 * (FULL.bytes_each("bf16") - s.adam.bytes_each("bf16"))
    share = CLIPPED + adam + (0 if s.precision == "fp32" else 4)
    # Of each matrix in fp8, the bf16 weight read once and its two copies written (`quantised_weights`).
    casts = 2 * max(quantised_weights(s, stage) for stage in range(parallel.pipeline))
    found["optimizer"] = traffic(machine, count * (EACH_PARAMETER + share / s.optimizer_shards) + casts)
    return found, waits


def _by_part(name: str, work: Seconds) -> Stage:
    communication = ("tensor-parallel communication", work.tensor), ("context-parallel communication", work.context)
    return {name: work.compute, **dict(communication)}


def _merge(stage: Stage, more: Stage) -> None:
    for name, seconds in more.items():
        stage[name] = stage.get(name, 0.0) + seconds
