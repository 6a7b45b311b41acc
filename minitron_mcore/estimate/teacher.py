"""The memory that the teacher needs: weights and states on a device, offloaded layers on the host. Pure."""

from __future__ import annotations

from math import prod

from minitron_mcore.distillation.teacher.blocks import aligned, flat_bytes, host_blocks, pinned_bytes
from minitron_mcore.estimate.model import local_parameters
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.layout import local_shape, parameter_table, split_layers


def teacher_weights(setting: Setting, stage: int) -> int:
    """Bytes that stay on a device of the student's `stage`: embedding, head and `layer_kept` of each layer."""
    s, own = setting, setting.teacher_layout
    kept = layer_kept(s)
    # In a layout of its own, any of its stages may share a rank with this one.
    stages = [stage] if own == s.parallel else range(own.pipeline)
    counts = [layers_and_rest(s, place) for place in stages]
    head = _head_parameters(s) if own != s.parallel and stage == s.parallel.pipeline - 1 else 0
    return max(layers * kept + s.teacher_element * rest for layers, rest in counts) + s.teacher_element * head


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
    stages = split_layers(s.teacher.num_layers, own.pipeline, own.virtual_pipeline)
    counts = [sum(map(len, chunks)) for chunks in stages]
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


def _layer_sizes(setting: Setting) -> list[tuple[int, bool]]:
    """(numbers, whether it is a matrix) of a layer's parameters, on a rank."""
    assert setting.teacher is not None
    teacher, tensor = setting.teacher, setting.teacher_layout.tensor
    shapes = [local_shape(row, teacher, tensor) for row in parameter_table(teacher) if row.per_layer]
    return [(prod(shape), len(shape) == 2) for shape in shapes]


def layers_and_rest(setting: Setting, stage: int) -> tuple[int, int]:
    """(layers, parameters of embedding, final norm and head) of the teacher's `stage`.

    In its own layout it keeps no head: the student's last stage has that, in the student's shards.
    """
    teacher, own = setting.teacher, setting.teacher_layout
    assert teacher is not None
    layers = sum(map(len, split_layers(teacher.num_layers, own.pipeline, own.virtual_pipeline)[stage]))
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
