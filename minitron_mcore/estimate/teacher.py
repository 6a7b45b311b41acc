"""The memory that the teacher needs: weights and states on a device, offloaded layers on the host. Pure."""

from __future__ import annotations

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.distillation.config import RELATION_BUFFER
from minitron_mcore.distillation.states.map import WIDE_SITES, Pair, holder, needs_projection, pairs, relation_heads
from minitron_mcore.distillation.teacher.blocks import aligned, flat_bytes, host_blocks, pinned_bytes
from minitron_mcore.estimate.model import Setting, chunk_layers, local_parameters, shard_sizes
from minitron_mcore.layout import axis_sizes, stage_of


def teacher_weights(setting: Setting, stage: int) -> int:
    """Bytes that stay on a device of the student's `stage`: embedding, head and `layer_kept` of each layer."""
    s, own = setting, setting.teacher_layout
    kept = layer_kept(s)
    counts = [layers_and_rest(s, place) for place in stages_beside(s, stage)]
    head = _head_parameters(s) if own != s.parallel and stage == s.parallel.pipeline - 1 else 0
    return max(layers * kept + s.teacher_element * rest for layers, rest in counts) + s.teacher_element * head


def stages_beside(setting: Setting, stage: int) -> range:
    """The teacher's stages that ranks of the student's `stage` hold. Megatron orders ranks by stage, in any layout."""
    pipeline, world = setting.teacher_layout.pipeline, setting.world_size
    each = world // setting.parallel.pipeline
    first, last = stage * each, stage * each + each - 1
    return range(first * pipeline // world, last * pipeline // world + 1)


def layer_kept(setting: Setting) -> int:
    """Bytes of one layer that stay on the device between its uses.

    In fp8 the weights are bf16, and Transformer Engine keeps the fp8 copies that the first microbatch of a pass makes:
    one byte per element of a matrix, as no gradient needs the transpose. Where the layer is kept elsewhere the copies
    are made afresh each time (`disable_parameter_transpose_cache`), and none stays.
    """
    s = setting
    if s.teacher_placement == "sharded":
        return _sharded_bytes(s) // _shards(s)
    if s.teacher_placement == "offloaded":
        return layer_bytes(s) if s.on_cpu else 0  # the host is the device there
    sizes = _layer_sizes(s)
    copies = sum(size for size, is_matrix in sizes if is_matrix) if s.teacher_precision == "fp8" else 0
    return s.teacher_element * sum(size for size, _ in sizes) + copies


def teacher_layers_at_work(setting: Setting) -> int:
    """Two whole layers while the teacher runs, if its layers are kept elsewhere."""
    if setting.teacher is None or setting.teacher_placement == "resident":
        return 0
    return 2 * (_sharded_bytes(setting) if setting.teacher_placement == "sharded" else layer_bytes(setting))


def host_bytes(setting: Setting) -> int:
    """Host memory that the ranks of a node use for offloaded layers, on the node that uses most; 0 if none are
    offloaded, or the host is the device.

    Each rank keeps its own copy in pinned blocks, beside the layer that it is reading.
    """
    s, own = setting, setting.teacher_layout
    if s.teacher is None or s.teacher_placement != "offloaded" or s.on_cpu:
        return 0
    layer = layer_bytes(s)
    pinned = sum(map(pinned_bytes, host_blocks(layer)))
    counts = [sum(chunks) for chunks in chunk_layers(s.teacher, own)]
    # Megatron orders ranks by stage.
    of_rank = [counts[rank * own.pipeline // s.world_size] * pinned + layer for rank in range(s.world_size)]
    return max(sum(of_rank[first : first + s.local_ranks]) for first in range(0, s.world_size, s.local_ranks))


def layer_bytes(setting: Setting) -> int:
    """Bytes of one layer of the teacher in one buffer."""
    return flat_bytes(setting.teacher_element * size for size, _ in _layer_sizes(setting))


def _sharded_bytes(setting: Setting) -> int:
    """Bytes of a layer cut into equal parts, each at a multiple of ALIGNMENT."""
    return aligned(layer_bytes(setting), _shards(setting))


def _shards(setting: Setting) -> int:
    """Ranks that hold the same shard of the teacher."""
    own = setting.teacher_layout
    return max(1, setting.world_size // (own.tensor * own.pipeline))


def _layer_sizes(setting: Setting) -> tuple[tuple[int, bool], ...]:
    """(numbers, whether it is a matrix) of a layer's parameters, on a rank."""
    assert setting.teacher is not None
    return shard_sizes(setting.teacher, setting.teacher_layout.tensor)[0]


def layers_and_rest(setting: Setting, stage: int) -> tuple[int, int]:
    """(layers, parameters of embedding, final norm and head) of the teacher's `stage`.

    In its own layout it keeps no head: the student's last stage has that, in the student's shards.
    """
    teacher, own = setting.teacher, setting.teacher_layout
    assert teacher is not None
    layers = sum(chunk_layers(teacher, own)[stage])
    rest = local_parameters(teacher, own, stage) - layers * sum(size for size, _ in _layer_sizes(setting))
    if own != setting.parallel and stage == own.pipeline - 1:
        is_embedding = not teacher.untie_embeddings_and_output_weights and own.pipeline == 1
        rest -= 0 if is_embedding else _head_parameters(setting, own.tensor)
    return layers, rest


def _head_parameters(setting: Setting, tensor: int = 0) -> int:
    """Parameters of the teacher's head in one of `tensor` shards; 0: as many as the student has."""
    assert setting.teacher is not None
    return setting.teacher.padded_vocab_size // (tensor or setting.parallel.tensor) * setting.teacher.hidden_size


def teacher_hidden_states(setting: Setting) -> int:
    """The final states [n, h] of every microbatch of a window, in the teacher's type."""
    s = setting
    assert s.teacher is not None
    shard = s.parallel.tensor if s.parallel.sequence else 1
    return s.ahead * s.tokens * s.teacher.hidden_size * s.teacher_element // shard


def last_inputs(setting: Setting, stage: int) -> int:
    """Bytes of the input that each of the teacher's chunks has received last: Megatron's models keep it."""
    s, own = setting, setting.teacher_layout
    assert s.teacher is not None
    shard = own.tensor if own.sequence else 1
    received = (own.virtual_pipeline or 1) - (stages_beside(s, stage)[-1] == 0)
    return received * s.teacher_element * s.tokens * s.teacher.hidden_size // shard


def travelling(setting: Setting, stage: int) -> int:
    """Bytes of the teacher's states, in a layout of its own, that ranks of the student's `stage` hold for others: each
    of the teacher's replicas runs its share of the global batch, and keeps all its states until they are sent."""
    s, own = setting, setting.teacher_layout
    if s.teacher is None or own == s.parallel:
        return 0
    replicas = s.world_size // own.replica_ranks
    runs = -(-s.ahead * s.data_parallel // replicas)
    # Of what the rank is to have itself there is no second copy, where it is cut alike.
    is_alike = own.sequence == s.parallel.sequence and (own.tensor == s.parallel.tensor or not own.sequence)
    beside, shard = stages_beside(s, stage), own.tensor if own.sequence else 1
    total = 0
    if own.pipeline - 1 in beside:
        kept = is_alike and stage == s.parallel.pipeline - 1
        total += (runs - kept * min(runs, s.ahead)) * s.tokens * s.teacher.hidden_size // shard
    if s.hidden_states is not None:
        depth, number = s.teacher.num_layers, runs * s.tokens
        for site, layer in {(pair.site, pair.teacher_layer) for pair in _pairs(s)}:
            is_wide = site in WIDE_SITES
            if stage_of(holder(site, layer, depth), depth, own.pipeline, own.virtual_pipeline) in beside:
                width = s.teacher.hidden_size // shard if is_wide else axis_sizes(s.teacher)["qkv"] // own.tensor
                total += number * width
    return s.teacher_element * total


# fp32 tensors that one loss holds at a time beside the projected state: copies of both states if they are bf16, unit
# vectors of both for a cosine, and their difference; for fp32 states its square too.
_COPIES = {("mse", 2): 3, ("mse", 4): 2, ("cosine", 2): 5, ("cosine", 4): 3}


def state_memory(setting: Setting, stage: int) -> tuple[int, int, int, int]:
    """(projection, targets, saved, working): what the losses of `setting` need on the student's pipeline stage `stage`;
    in bytes but for `projection`, in numbers.

    projection: the learned map's weight, which every rank holds.
    targets: the teacher's states, for every microbatch of a window.
    saved: of one microbatch, the losses' gradients that wait for backward.
    working: while one pair's loss is computed.
    """
    student, teacher, parallel, config = setting.student, setting.teacher, setting.parallel, setting.hidden_states
    if config is None or teacher is None:
        return 0, 0, 0, 0
    element, tokens = BYTES[setting.precision], setting.tokens
    depth = student.num_layers
    here = [
        pair
        for pair in _pairs(setting)
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
    projection = student.hidden_size * teacher.hidden_size * needs_projection(config.sites, student, teacher)
    return projection, setting.ahead * setting.teacher_element * sum(distinct.values()), element * saved, max(working)


def _pairs(setting: Setting) -> list[Pair]:
    """Every pair of states that a loss compares."""
    config, teacher = setting.hidden_states, setting.teacher
    assert config is not None and teacher is not None
    return pairs(config.sites, config.layers, setting.student.num_layers, teacher.num_layers)
