"""How many bytes of memory a rank needs for a step, by part, before anything is allocated. Pure.

Without recomputation of activations. What is held for the whole run is exact but for the padding of Megatron's buffers;
activations are what the layers save for backward, tensor by tensor (see `layer_activations`). Not counted: buffers of
communication libraries, fragmentation, and the process itself.

Legend: n tokens of a microbatch on a rank, m microbatches a step, T tensor-parallel size, P pipeline stages, v chunks a
stage, h hidden, f ffn, q and k widths of all query heads and of all key-value groups, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.distillation.config import LEAST_CHUNK, HiddenStatesConfig, default_chunk_tokens
from minitron_mcore.distillation.state_memory import StateMemory, projection_size, state_memory
from minitron_mcore.errors import InputError
from minitron_mcore.layout import check_tensor_parallel, local_shape, parameter_table, split_layers
from minitron_mcore.runtime.config import ParallelConfig

# Held from the first step to the last; the others come and go within a step.
STATIC = ("weights", "gradients", "optimizer state", "teacher weights", "teacher's training")


@dataclass(frozen=True)
class Setting:
    """Everything that the memory of a step depends on."""

    student: Architecture
    parallel: ParallelConfig
    precision: str
    data_parallel: int
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    loss_chunk_tokens: int | None  # None: config.default_chunk_tokens
    recompute_loss: bool = False
    on_cpu: bool = False
    section: str = "train"  # of the recipe, for the names of keys
    teacher: Architecture | None = None
    teacher_parallel: ParallelConfig | None = None  # None: the student's
    teacher_precision: str | None = None  # None: the student's
    teacher_placement: str = "resident"
    teacher_window: int = 0
    teacher_trained: bool = False  # corrected as it teaches: then it has gradients and an optimizer too
    hidden_states: HiddenStatesConfig | None = None  # losses between inner states; None: none

    @property
    def microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def tokens(self) -> int:
        """Of a microbatch, on a rank."""
        return self.micro_batch_size * self.sequence_length // self.parallel.context

    @property
    def ahead(self) -> int:
        """Microbatches for which the teacher's states are there at a time."""
        return min(self.teacher_window or self.microbatches, self.microbatches)

    @property
    def optimizer_shards(self) -> int:
        return self.data_parallel * self.parallel.context


@dataclass(frozen=True)
class Forecast:
    """Bytes by part, of the rank that needs most."""

    parts: dict[str, int]
    stage: int  # its pipeline stage
    setting: Setting

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def static(self) -> int:
        return sum(self.parts.get(name, 0) for name in STATIC)

    def table(self) -> str:
        """A line for each part, the largest first."""
        rows = [*sorted(self.parts.items(), key=lambda row: -row[1]), ("together", self.total)]
        return "\n".join(f"  {name:<26}{bytes_text(value):>12}" for name, value in rows if value)

    def __str__(self) -> str:
        shown = sorted(((name, value) for name, value in self.parts.items() if value), key=lambda row: -row[1])
        return f"{bytes_text(self.total)} ({', '.join(f'{name} {bytes_text(value)}' for name, value in shown)})"

    def advice(self, count: int = 3) -> list[str]:
        """The `count` changes of one key that save most, each with what it saves."""
        saved: dict[str, tuple[int, str]] = {}
        for key, words, setting in _changes(self.setting):
            saving = self.total - forecast(setting).total
            if saving > max(saved.get(key, (0, ""))[0], self.total // 100):
                saved[key] = (saving, f"{words} saves {bytes_text(saving)}")
        return [words for _, words in sorted(saved.values(), reverse=True)[:count]]


def bytes_text(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def forecast(setting: Setting) -> Forecast:
    """What the fullest pipeline stage needs. Raises InputError for a layout that cannot hold the models."""
    check_tensor_parallel(setting.student, setting.parallel.tensor)
    stages = [Forecast(stage_parts(setting, stage), stage, setting) for stage in range(setting.parallel.pipeline)]
    return max(stages, key=lambda stage: stage.total)


def stage_parts(setting: Setting, stage: int) -> dict[str, int]:
    """Bytes by part on a rank of pipeline stage `stage`."""
    s, parallel = setting, setting.parallel
    element, last = BYTES[s.precision], stage == s.parallel.pipeline - 1
    count = local_parameters(s.student, parallel, stage) + projection_size(s.hidden_states, s.student, s.teacher)
    states = _states(s, stage)
    # Adam's two moments, in fp32; beside bf16 weights the fp32 weights themselves.
    state = (8 if s.precision == "fp32" else 12) * -(-count // s.optimizer_shards)
    parts = {"weights": element * count, "gradients": 4 * count, "optimizer state": state}
    # tokens, labels and position_ids of 8 bytes, loss_mask of 4
    parts["batch"] = 28 * s.tokens * s.microbatches
    student_pass = {
        "activations": activations(s, stage),
        "layer at work": max(_largest_layer_output(s.student, s, element), states.working),
        "loss": loss_buffers(s) if last else 0,
    }
    phases = [student_pass]  # one after another
    if not s.on_cpu:  # torch's Adam works on all weights at once there
        phases.append({"optimizer's step": 4 * -(-count // s.optimizer_shards)})
    if s.teacher is not None:
        parts["teacher weights"] = teacher_weights(s, stage)
        if s.teacher_trained:
            numbers = local_parameters(s.teacher, parallel, stage)
            moments = (8 if s.precision == "fp32" else 12) * -(-numbers // s.optimizer_shards)
            parts["teacher's training"] = 4 * numbers + moments
        if s.teacher_trained:
            alone = replace(s, student=s.teacher, teacher=None)
            taught = activations(alone, stage) + _largest_layer_output(s.teacher, s, element)
            phases.append({"teacher's training pass": taught + (loss_buffers(alone) if last else 0)})
        working = 2 * _largest_layer_output(s.teacher, s, _teacher_element(s))
        phases.append({"teacher's forward": working + teacher_layers_at_work(s, stage)})
        if last:
            parts["teacher hidden states"] = teacher_hidden_states(s)
        parts["teacher's inner states"] = states.targets
        parts["inner states' losses"] = states.saved * _passes(s, stage)
    return parts | max(phases, key=lambda phase: sum(phase.values()))


def local_parameters(architecture: Architecture, parallel: ParallelConfig, stage: int) -> int:
    """Numbers that a rank of `stage` holds; a head tied to the embedding is there twice where P > 1."""
    layers = sum(map(len, split_layers(architecture.num_layers, parallel.pipeline, parallel.virtual_pipeline)[stage]))
    first, last = stage == 0, stage == parallel.pipeline - 1
    tied = not architecture.untie_embeddings_and_output_weights
    total = 0
    for parameter in parameter_table(architecture):
        size = prod(local_shape(parameter, architecture, parallel.tensor))
        if parameter.per_layer:
            total += layers * size
        elif parameter.key.startswith("embedding."):
            total += size * (first or (tied and last))
        else:
            total += size * last
    return total


def activations(setting: Setting, stage: int) -> int:
    """What autograd keeps of the microbatches that are under way on `stage` before their backward."""
    s, parallel = setting, setting.parallel
    stages = split_layers(s.student.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    chunks = [len(layers) for layers in stages[stage]]
    element = BYTES[s.precision]
    shard = parallel.tensor if parallel.sequence else 1
    length = s.tokens // s.micro_batch_size
    layer = layer_activations(s.student, s.tokens, length, parallel, element, on_cpu=s.on_cpu)
    boundary = element * s.tokens * s.student.hidden_size // shard  # a chunk's output
    running = _passes(s, stage)
    layers = running * sum(chunks) // len(chunks)
    return layers * layer + running * boundary


def _passes(setting: Setting, stage: int) -> int:
    parallel = setting.parallel
    return passes_in_flight(parallel.pipeline, stage, parallel.virtual_pipeline or 1, setting.microbatches)


def passes_in_flight(pipeline: int, stage: int, chunks: int, microbatches: int) -> int:
    """Forward passes of a chunk that wait for their backward, at most: Megatron's warm-up and the one that runs."""
    if chunks == 1:
        return min(pipeline - stage, microbatches)
    return min((pipeline - stage - 1) * 2 + (chunks - 1) * pipeline + 1, microbatches * chunks)


def layer_activations(
    architecture: Architecture, tokens: int, length: int, parallel: ParallelConfig, element: int, *, on_cpu: bool
) -> int:
    """Bytes that one layer saves for backward of `tokens` tokens in sequences of `length`, by an attention that keeps
    no scores.

    Whole on each rank, or its part of the sequence under sequence parallelism: the input of each of the two norms and
    the normed input of the product behind it, 4 h. Sharded over T: the fused projection's output q + 2 k (its values
    are read in backward), queries and keys after rotation q + k, attention's output q; of a gated MLP fc1's output 2 f,
    the activated gate, the other half and fc2's input 3 f; of another one fc1's activated output and fc2's input 2 f.
    In fp32: a norm's deviation a token, a head's logarithm of sums. Rotary tables: sine and cosine of queries and keys.
    On CPU an RMS norm keeps its input and the normed input in fp32.
    """
    a = architecture
    q, k = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    wide_norm = on_cpu and a.normalization == "RMSNorm"
    norm = 8 + element if wide_norm else 2 * element
    whole = 2 * (norm * a.hidden_size + 4)
    sharded = element * (3 * q + 3 * k + (5 if a.gated_linear_unit else 2) * a.ffn_hidden_size)
    sharded += 4 * a.num_attention_heads
    if a.qk_layernorm:
        sharded += (8 if wide_norm else element) * (q + k) + 4 * (a.num_attention_heads + a.num_query_groups)
    tables = 4 * element * int(a.kv_channels * a.rotary_percent) * length
    split = parallel.tensor if parallel.sequence else 1
    return tokens * whole // split + tokens * sharded // parallel.tensor + tables


def _largest_layer_output(architecture: Architecture, setting: Setting, element: int) -> int:
    """The two widest neighbours that a layer works on at a time."""
    a = architecture
    widest = max((3 if a.gated_linear_unit else 2) * a.ffn_hidden_size, 2 * a.num_attention_heads * a.kv_channels)
    return setting.tokens * element * (2 * a.hidden_size + widest // setting.parallel.tensor)


def loss_buffers(setting: Setting) -> int:
    """The fp32 logits of a chunk of tokens of each model, and the gradient of the hidden states in their type.

    In bf16 the logits' gradient in bf16 too, or on CPU both heads in fp32; on CPU a product may copy a chunk of logits.
    The head's gradient goes straight into the gradient buffer.
    """
    s = setting
    shard = s.student.padded_vocab_size // s.parallel.tensor
    chunk = min(s.loss_chunk_tokens or default_chunk_tokens(s.tokens), s.tokens)
    models = 1 if s.teacher is None else 2
    buffers = 4 * chunk * shard * (models + s.on_cpu)
    if s.precision == "bf16":
        widths = s.student.hidden_size + (s.teacher.hidden_size if s.teacher is not None else 0)
        buffers += 4 * shard * widths if s.on_cpu else 2 * chunk * shard
    return buffers + BYTES[s.precision] * s.student.hidden_size * s.tokens


def teacher_weights(setting: Setting, stage: int) -> int:
    """What stays: all; or embedding and head with, where sharded, a part of each layer."""
    s = setting
    ranks, own = s.optimizer_shards * s.parallel.tensor * s.parallel.pipeline, s.teacher_parallel or s.parallel
    shards = max(1, ranks // (own.tensor * own.pipeline))
    kept = {"resident": lambda layers: layers, "sharded": lambda layers: -(-layers // shards), "offloaded": lambda _: 0}
    counts = [layers_and_rest(s, place) for place in _teacher_stages(s, stage)]
    head = _head_parameters(s) if own != s.parallel and stage == s.parallel.pipeline - 1 else 0
    return _teacher_element(s) * (max(kept[s.teacher_placement](layers) + rest for layers, rest in counts) + head)


def teacher_layers_at_work(setting: Setting, stage: int) -> int:
    """While the teacher runs: two whole layers, where they lie elsewhere."""
    s = setting
    if s.teacher is None or s.teacher_placement == "resident":
        return 0
    parallel = s.teacher_parallel or s.parallel
    return _teacher_element(s) * 2 * _layer_parameters(s.teacher, parallel)


def _teacher_stages(setting: Setting, stage: int) -> list[int]:
    """Stages of the teacher that may lie on a rank of the student's `stage`: any, where it has a layout of its own."""
    parallel = setting.teacher_parallel or setting.parallel
    return [stage] if parallel == setting.parallel else list(range(parallel.pipeline))


def layers_and_rest(setting: Setting, stage: int) -> tuple[int, int]:
    """The teacher's numbers in layers, and in embedding, final norm and head, on its stage `stage`.

    In a layout of its own it keeps no head: the student's last stage has that, in its own shards.
    """
    teacher, parallel = setting.teacher, setting.teacher_parallel or setting.parallel
    assert teacher is not None
    stages = split_layers(teacher.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    layers = sum(map(len, stages[stage])) * _layer_parameters(teacher, parallel)
    rest = local_parameters(teacher, parallel, stage) - layers
    if parallel != setting.parallel and stage == parallel.pipeline - 1:
        is_embedding = not teacher.untie_embeddings_and_output_weights and parallel.pipeline == 1
        rest -= 0 if is_embedding else teacher.padded_vocab_size // parallel.tensor * teacher.hidden_size
    return layers, rest


def _head_parameters(setting: Setting) -> int:
    """Numbers of the teacher's head in the student's shards."""
    assert setting.teacher is not None
    return setting.teacher.padded_vocab_size // setting.parallel.tensor * setting.teacher.hidden_size


def _layer_parameters(architecture: Architecture, parallel: ParallelConfig) -> int:
    """Numbers of one layer on a rank."""
    rows = [parameter for parameter in parameter_table(architecture) if parameter.per_layer]
    return sum(prod(local_shape(parameter, architecture, parallel.tensor)) for parameter in rows)


def teacher_hidden_states(setting: Setting) -> int:
    """The final states [n, h] of every microbatch of a window, in the teacher's type."""
    s, teacher = setting, setting.teacher
    assert teacher is not None
    shard = s.parallel.tensor if s.parallel.sequence else 1
    return s.ahead * s.tokens * teacher.hidden_size * _teacher_element(s) // shard


def _states(setting: Setting, stage: int) -> StateMemory:
    s = setting
    if s.hidden_states is None or s.teacher is None:
        return StateMemory()
    return state_memory(
        s.hidden_states,
        s.student,
        s.teacher,
        s.parallel,
        stage=stage,
        tokens=s.tokens,
        micro_batch_size=s.micro_batch_size,
        ahead=s.ahead,
        element=BYTES[s.precision],
        teacher_element=_teacher_element(s),
    )


def _teacher_element(setting: Setting) -> int:
    return BYTES.get(setting.teacher_precision or setting.precision, 2)


def _changes(setting: Setting) -> Iterator[tuple[str, str, Setting]]:
    """(key, what to set, the setting then) for every change of one key that leaves the run what it is."""
    s, section = setting, setting.section
    if s.micro_batch_size > 1:
        yield "micro_batch_size", f"{section}.micro_batch_size=1", replace(s, micro_batch_size=1)
    if (s.loss_chunk_tokens or default_chunk_tokens(s.tokens)) > LEAST_CHUNK:
        change = replace(s, loss_chunk_tokens=LEAST_CHUNK)
        yield "chunk", f"{section}.loss_chunk_tokens={LEAST_CHUNK}", change
    if s.teacher is not None and not s.teacher_trained:  # such a one takes neither key
        window = s.parallel.pipeline
        if window < (s.teacher_window or s.microbatches):
            yield "window", f"{section}.teacher_window={window}", replace(s, teacher_window=window)
        for placement in ("offloaded", *(["sharded"] if s.data_parallel > 1 else [])):
            yield "placement", f"teacher.placement={placement}", replace(s, teacher_placement=placement)
    parallel = s.parallel
    parts = parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1)
    if parallel.tensor > 1 and not parallel.sequence and s.sequence_length % parts == 0:
        yield "sequence", "parallel.sequence=true", replace(s, parallel=replace(parallel, sequence=True))
    for name in ("tensor", "pipeline"):
        wider = replace(parallel, **{name: 2 * getattr(parallel, name)})
        data_parallel = s.data_parallel // 2 or 1
        ranks = "" if s.data_parallel > 1 else " on twice the ranks"
        change = replace(s, parallel=wider, data_parallel=data_parallel)
        if _holds(change) and (s.data_parallel == 1 or s.data_parallel % 2 == 0):
            yield name, f"parallel.{name}={getattr(wider, name)}{ranks}", change
    wider_data = replace(s, data_parallel=2 * s.data_parallel)
    if wider_data.microbatches and s.global_batch_size % (s.micro_batch_size * wider_data.data_parallel) == 0:
        yield "data", "twice as many ranks at the same parallel.*", wider_data


def _holds(setting: Setting) -> bool:
    models = [(setting.student, setting.parallel)]
    if setting.teacher is not None:
        models.append((setting.teacher, setting.teacher_parallel or setting.parallel))
    if setting.microbatches < 1 or setting.data_parallel < 1:
        return False
    if setting.parallel.virtual_pipeline and setting.microbatches % setting.parallel.pipeline:
        return False
    try:
        for architecture, parallel in models:
            check_tensor_parallel(architecture, parallel.tensor)
            split_layers(architecture.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    except InputError:
        return False
    return True
