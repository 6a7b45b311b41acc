"""What the memory of a step depends on, and what a model needs on a rank: its weights, and what its pass keeps for
backward. Pure.

Legend: n tokens of a microbatch on a rank, m microbatches a step, T tensor-parallel size, P pipeline stages, v chunks a
stage, h hidden, f ffn, q and k widths of all query heads and of all key-value groups, V padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import prod

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.distillation.config import HiddenStatesConfig
from minitron_mcore.layout import local_shape, parameter_table, split_layers
from minitron_mcore.model.fp8 import Fp8
from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.training.adam_state import FULL, AdamState


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
    tp_comm_overlap: bool = False  # tensor-parallel ranks exchange states during products
    fp8: Fp8 | None = None  # which of the student's products are in fp8
    adam: AdamState = FULL  # the types of the optimizer's state
    on_cpu: bool = False
    overlap_grad_reduce: bool | None = None  # as the keys of training; None: on a GPU
    overlap_param_gather: bool | None = None
    ddp_bucket_size: int | None = None  # None: Megatron's
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
    teacher_fp8: Fp8 | None = None  # of its training
    teacher_adam: AdamState = FULL
    hidden_states: HiddenStatesConfig | None = None  # losses between inner states; None: there are none
    preference: bool = False  # pairs of answers are trained on, and the teacher is their reference
    async_save: bool = False  # a checkpoint is written while training goes on
    sides: int = 1  # sequences that lie side by side in a row of `sequence_length`: of a pair that is not packed, two

    @property
    def products(self) -> str:
        """The type of the student's products, by whose peak its step is measured."""
        return "fp8" if self.fp8 else self.precision

    @property
    def microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on a rank."""
        return self.micro_batch_size * self.sequence_length // self.parallel.context

    @property
    def length(self) -> int:
        """Tokens of what attends to itself alone."""
        return self.sequence_length // self.sides

    @property
    def ahead(self) -> int:
        """Microbatches whose teacher states are held at a time."""
        return min(self.teacher_window or self.microbatches, self.microbatches)

    @property
    def optimizer_shards(self) -> int:
        """Ranks over which the optimizer's state is cut: those of one instance."""
        return self.data_parallel * self.parallel.context // self.parallel.num_distributed_optimizer_instances

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


def narrow_layers(setting: Setting, stage: int) -> list[list[bool]]:
    """Of each layer of each of a stage's chunks, whether its products are in fp8."""
    s, parallel, total = setting, setting.parallel, setting.student.num_layers
    if s.fp8 is None:
        return [[False] * count for count in chunk_layers(s.student, parallel)[stage]]
    chunks = split_layers(total, parallel.pipeline, parallel.virtual_pipeline)[stage]
    return [[s.fp8.holds(layer, total) for layer in chunk] for chunk in chunks]


def quantised_weights(setting: Setting, stage: int) -> int:
    """Bytes of the fp8 copies of matrices that Transformer Engine keeps from a step's first microbatch on: two, one of
    them transposed, as products in fp8 want both factors row by row (on Hopper; newer devices may do with one)."""
    layers = sum(map(sum, narrow_layers(setting, stage)))
    sizes = shard_sizes(setting.student, setting.parallel.tensor)[0]
    return 2 * layers * sum(size for size, is_matrix in sizes if is_matrix)


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


def optimizer_state(setting: Setting, count: int, adam: AdamState) -> int:
    """Adam's two moments of a rank's share, in fp32 unless `adam` says otherwise; with bf16 weights, their copy too."""
    return adam.bytes_each(setting.precision) * -(-count // setting.optimizer_shards)


def corrected(setting: Setting) -> Setting:
    """The teacher's own training, of one that is corrected while it teaches."""
    s, teacher = setting, setting.teacher
    assert teacher is not None
    chunk, again = s.teacher_chunk_tokens, s.teacher_recompute
    alone = replace(s, student=teacher, teacher=None, teacher_trained=False, loss_chunk_tokens=chunk, recompute=again)
    return replace(alone, fp8=s.teacher_fp8, adam=s.teacher_adam)


def activations(setting: Setting, stage: int) -> int:
    """What autograd keeps of the microbatches in flight on `stage` until their backward.

    Beside what layers keep, a stage's output, which on CUDA is given up once it is sent; on the last stage the input of
    the final norm, and what that one keeps and gives.
    """
    s = setting
    boundary, parallel = boundary_bytes(s), s.parallel
    chunks = narrow_layers(s, stage)
    kept = sum(_kept(s, chunk) for chunk in chunks)
    running = passes(s, stage)
    outputs = boundary * (running if s.on_cpu else min(running, 1))
    if stage == parallel.pipeline - 1:
        shard = parallel.tensor if parallel.sequence else 1
        outputs += 2 * BYTES[s.precision] * s.tokens * s.student.hidden_size // shard - boundary
    return running * kept // len(chunks) + outputs


def uses_local_layers(setting: Setting) -> bool:
    """Whether layers are megatron-core's own, not Transformer Engine's (model/specs.py)."""
    return setting.on_cpu or setting.precision == "fp32"


def gathered_keys(setting: Setting) -> int:
    """Bytes of the keys and values that attention gathers over context-parallel ranks and keeps, 2 k C; 0 where
    Transformer Engine passes them from rank to rank."""
    s, a = setting, setting.student
    if s.parallel.context == 1 or not uses_local_layers(s):
        return 0
    whole = 2 * s.tokens * s.parallel.context
    return BYTES[s.precision] * whole * a.num_query_groups * a.kv_channels // s.parallel.tensor


def recomputed_activations(setting: Setting, stage: int) -> int:
    """The most that a backward on `stage` recomputes at a time."""
    recompute = setting.recompute
    narrow = all(map(all, narrow_layers(setting, stage)))
    if recompute.granularity == "selective":
        return mlp_activations(setting, narrow=narrow)
    if recompute.granularity == "full":
        layers = recompute.num_layers if recompute.method == "uniform" else 1
        return layers * layer_activations(setting, narrow=narrow)
    return 0


def boundary_bytes(setting: Setting) -> int:
    """Bytes of a layer's input, which is also what travels between stages."""
    s, shard = setting, setting.parallel.tensor if setting.parallel.sequence else 1
    return BYTES[s.precision] * s.tokens * s.student.hidden_size // shard


def _kept(setting: Setting, layers: list[bool]) -> int:
    """Bytes that a pass keeps of a chunk of `layers`, of each whether its products are in fp8."""
    recompute, boundary = setting.recompute, boundary_bytes(setting)
    if recompute.granularity == "full" and recompute.method == "uniform":
        return len(layers) // recompute.num_layers * boundary
    again = min(recompute.num_layers, len(layers)) if recompute.granularity == "full" else 0
    kept = again * boundary
    for narrow in set(layers[again:]):
        each = layer_activations(setting, narrow=narrow)
        each -= mlp_activations(setting, narrow=narrow) if recompute.granularity == "selective" else 0
        kept += layers[again:].count(narrow) * each
    return kept


def passes(setting: Setting, stage: int) -> int:
    """Forward passes of a chunk of the student that wait for their backward on `stage`, at most."""
    parallel = setting.parallel
    return passes_in_flight(parallel.pipeline, stage, parallel.virtual_pipeline or 1, setting.ahead)


def passes_in_flight(pipeline: int, stage: int, chunks: int, microbatches: int) -> int:
    """Forward passes of a chunk that wait for their backward, at most: Megatron's warm-up and the one that runs."""
    if chunks == 1:
        return min(pipeline - stage, microbatches)
    return min((pipeline - stage - 1) * 2 + (chunks - 1) * pipeline + 1, microbatches * chunks)


def layer_activations(setting: Setting, *, narrow: bool = False) -> int:
    """Bytes that one layer saves for backward of a microbatch, by an attention that keeps no scores.

    Whole on each rank, or its part of the sequence under sequence parallelism: the input of each of the two norms and
    the normed input of the product behind it, 4 h. Sharded over T: the fused projection's output q + 2 k (its values
    are read in backward), queries and keys after rotation q + k, attention's output q; where keys and values are
    gathered over context-parallel ranks these instead, of the whole sequence, and queries twice. Of a gated MLP fc1's
    output 2 f and fc2's input f; of another one fc1's activated output and fc2's input 2 f. In fp32: a norm's deviation
    a token, a head's logarithm of sums. Rotary tables: sine and cosine of queries and keys.

    narrow: its products are in fp8. Of its input each then keeps a copy of a byte a number: in place of the normed
    inputs and of fc2's, beside attention's output, which attention keeps too.
    """
    s, a, tensor, element = setting, setting.student, setting.parallel.tensor, BYTES[setting.precision]
    q, k = a.num_attention_heads * a.kv_channels, a.num_query_groups * a.kv_channels
    whole = 2 * ((element + (1 if narrow else element)) * a.hidden_size + 4)
    gathered = gathered_keys(s)
    sharded = element * (3 * q + (0 if gathered else 3 * k)) + 4 * a.num_attention_heads
    if a.qk_layernorm:  # the keys before it: on the CPU a part of the fused projection's output, which is kept anyway
        sharded += element * (q if s.on_cpu else q + k) + 4 * (a.num_attention_heads + a.num_query_groups)
    if narrow:
        sharded += q
    length = s.tokens // (s.micro_batch_size * s.sides)
    tables = 4 * element * int(a.kv_channels * a.rotary_percent) * length
    split = tensor if s.parallel.sequence else 1
    return (
        s.tokens * whole // split + s.tokens * sharded // tensor + gathered + mlp_activations(s, narrow=narrow) + tables
    )


def mlp_activations(setting: Setting, *, narrow: bool = False) -> int:
    """The part of `layer_activations` that comes after the input of the MLP."""
    s, a, element = setting, setting.student, BYTES[setting.precision]
    width = element * (3 if a.gated_linear_unit else 2) - (element - 1 if narrow else 0)
    return width * s.tokens * a.ffn_hidden_size // s.parallel.tensor
