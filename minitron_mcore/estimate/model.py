"""What the memory of a step depends on, and what a model needs on a rank: its weights, and what its pass keeps for
backward. Pure.

Legend: n tokens of a microbatch on a rank, m microbatches a step, T tensor-parallel size, P pipeline stages, v chunks a
stage, h hidden, f ffn, q and k widths of all query heads and of all key-value groups, V padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.distillation.config import HiddenStatesConfig, default_chunk_tokens
from minitron_mcore.layout import local_shape, parameter_table, split_layers
from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from minitron_mcore.runtime.config import ParallelConfig


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
    recompute: Recompute = KEEP_ALL  # of the student's pass
    on_cpu: bool = False
    section: str = "train"  # of the recipe, for the names of keys
    micro_batch_key: str = ""  # its full key, perhaps of a phase; empty: the section's
    local_ranks: int = 1  # ranks of a node, which share its host memory
    host_free: int | None = None  # bytes of a node's host memory; None: not known
    teacher: Architecture | None = None
    teacher_parallel: ParallelConfig | None = None  # None: the student's
    teacher_precision: str | None = None  # None: the student's
    teacher_placement: str = "resident"
    teacher_window: int = 0
    teacher_trained: bool = False  # corrected while it teaches, with gradients and an optimizer of its own
    teacher_chunk_tokens: int | None = None  # `loss_chunk_tokens` of the corrected teacher's own pass
    teacher_recompute: Recompute = KEEP_ALL
    hidden_states: HiddenStatesConfig | None = None  # losses between inner states; None: there are none

    @property
    def microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on a rank."""
        return self.micro_batch_size * self.sequence_length // self.parallel.context

    @property
    def ahead(self) -> int:
        """Microbatches whose teacher states are held at a time."""
        return min(self.teacher_window or self.microbatches, self.microbatches)

    @property
    def optimizer_shards(self) -> int:
        return self.data_parallel * self.parallel.context

    @property
    def world_size(self) -> int:
        return self.data_parallel * self.parallel.replica_ranks

    @property
    def teacher_layout(self) -> ParallelConfig:
        return self.teacher_parallel or self.parallel

    @property
    def teacher_element(self) -> int:
        """Bytes of an element of the teacher's weights and states; fp8 keeps them in bf16."""
        return BYTES.get(self.teacher_precision or self.precision, 2)


def local_parameters(architecture: Architecture, parallel: ParallelConfig, stage: int) -> int:
    """Parameters that a rank of `stage` holds; a head tied to the embedding counts twice where P > 1."""
    layers = sum(chunk_layers(architecture, parallel)[stage])
    first, last = stage == 0, stage == parallel.pipeline - 1
    tied = not architecture.untie_embeddings_and_output_weights
    layer, embedding, head = shard_sizes(architecture, parallel.tensor)
    return layers * sum(size for size, _ in layer) + embedding * (first or (tied and last)) + head * last


def chunk_layers(architecture: Architecture, parallel: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    """How many layers each chunk of each pipeline stage has."""
    return _chunk_layers(architecture.num_layers, parallel.pipeline, parallel.virtual_pipeline)


@cache
def _chunk_layers(num_layers: int, pipeline: int, virtual_pipeline: int | None) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(len, stage)) for stage in split_layers(num_layers, pipeline, virtual_pipeline))


@cache
def shard_sizes(architecture: Architecture, tensor: int) -> tuple[tuple[tuple[int, bool], ...], int, int]:
    """Of one of `tensor` shards: (numbers, whether it is a matrix) of each of a layer's parameters; numbers of the
    embedding; of final norm and output head."""
    layer: list[tuple[int, bool]] = []
    embedding = head = 0
    for parameter in parameter_table(architecture):
        shape = local_shape(parameter, architecture, tensor)
        if parameter.per_layer:
            layer.append((prod(shape), len(shape) == 2))
        elif parameter.is_embedding:
            embedding += prod(shape)
        else:
            head += prod(shape)
    return tuple(layer), embedding, head


def activations(setting: Setting, stage: int) -> int:
    """What autograd keeps of the microbatches in flight on `stage`, until their backward."""
    s = setting
    layer, mlp, boundary = _layer_parts(s)
    parallel = s.parallel
    chunks = chunk_layers(s.student, parallel)[stage]
    kept = sum(_kept(s.recompute, count, layer, mlp, boundary) for count in chunks)
    running = passes(s, stage)
    return running * kept // len(chunks) + running * boundary


def recomputed_activations(setting: Setting, stage: int) -> int:
    """The most that a backward on `stage` recomputes at a time."""
    layer, mlp, _ = _layer_parts(setting)
    recompute = setting.recompute
    if recompute.granularity == "selective":
        return mlp
    if recompute.granularity == "full":
        return layer * (recompute.num_layers if recompute.method == "uniform" else 1)
    return 0


def _layer_parts(setting: Setting) -> tuple[int, int, int]:
    """Bytes of a microbatch that a layer keeps, that its MLP keeps of these, and of a layer's input."""
    s, parallel, element = setting, setting.parallel, BYTES[setting.precision]
    length = s.tokens // s.micro_batch_size
    layer = layer_activations(s.student, s.tokens, length, parallel, element, on_cpu=s.on_cpu)
    mlp = mlp_activations(s.student, s.tokens, parallel, element)
    shard = parallel.tensor if parallel.sequence else 1
    return layer, mlp, element * s.tokens * s.student.hidden_size // shard


def _kept(recompute: Recompute, layers: int, layer: int, mlp: int, boundary: int) -> int:
    """Bytes that a pass keeps of a chunk of `layers`."""
    if recompute.granularity == "selective":
        return layers * (layer - mlp)
    if recompute.granularity != "full":
        return layers * layer
    if recompute.method == "uniform":
        return layers // recompute.num_layers * boundary
    again = min(recompute.num_layers, layers)
    return again * boundary + (layers - again) * layer


def passes(setting: Setting, stage: int) -> int:
    """Forward passes of a chunk of the student that wait for their backward on `stage`, at most."""
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
    sharded = element * (3 * q + 3 * k)
    sharded += 4 * a.num_attention_heads
    if a.qk_layernorm:
        sharded += (8 if wide_norm else element) * (q + k) + 4 * (a.num_attention_heads + a.num_query_groups)
    tables = 4 * element * int(a.kv_channels * a.rotary_percent) * length
    split = parallel.tensor if parallel.sequence else 1
    own = mlp_activations(a, tokens, parallel, element)
    return tokens * whole // split + tokens * sharded // parallel.tensor + own + tables


def mlp_activations(architecture: Architecture, tokens: int, parallel: ParallelConfig, element: int) -> int:
    """The part of `layer_activations` that comes after the input of the MLP."""
    width = (5 if architecture.gated_linear_unit else 2) * architecture.ffn_hidden_size
    return element * tokens * width // parallel.tensor


def largest_layer_output(architecture: Architecture, setting: Setting, element: int) -> int:
    """The two widest consecutive tensors of a layer."""
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
