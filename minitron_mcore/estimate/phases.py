"""What comes and goes within a step: its phases, one after another, of which the one that needs most counts. Pure.

Legend: as in model.py; e bytes of an element, C context-parallel size.
"""

from __future__ import annotations

from minitron_mcore.architecture import BYTES
from minitron_mcore.distillation.config import CACHED_ENTRIES, default_chunk_tokens
from minitron_mcore.estimate.model import (
    Setting,
    activations,
    boundary_bytes,
    chunk_layers,
    gathered_keys,
    local_parameters,
    mlp_activations,
    recomputed_activations,
)

Phase = dict[str, int]  # bytes by part


def training_phases(setting: Setting, stage: int, *, beside: int = 0, working: int = 0) -> list[Phase]:
    """Of the training pass and the step of `setting`'s student on pipeline stage `stage`, in no certain order.

    beside: numbers that are trained beside the model. working: bytes that a loss between inner states takes in a layer.
    """
    s = setting
    count = local_parameters(s.student, s.parallel, stage) + beside
    shard = -(-count // s.optimizer_shards)
    waiting = {"activations": activations(s, stage)}
    at_work = max(layer_at_work(s), working)
    found = [waiting | {"layer at work": at_work, "recomputed layers": recomputed_activations(s, stage)}]
    if stage == s.parallel.pipeline - 1:
        found.append(waiting | {"loss": loss_buffers(s)})
    if s.on_cpu:  # gradients are clipped parameter by parameter, gloo reduces a copy of them
        found.append({"optimizer's step": 4 * min(_largest_parameter(s, stage), shard)})
        if s.data_parallel * s.parallel.context > 1:
            found.append({"reduced gradients": 4 * _largest_buffer(s, stage, count)})
    else:  # torch's Adam works on all weights at once
        found.append({"optimizer's step": 0 if s.adam.is_aware else 4 * shard})
    return found


def weight_gradient(setting: Setting) -> int:
    """Bytes a number of a matrix's gradient, before it is added to the fp32 buffer; the CPU widens it for that."""
    element = BYTES[setting.precision]
    return element + (4 if setting.on_cpu and element < 4 else 0)


def layer_at_work(setting: Setting) -> int:
    """What backward holds at most, in the stage's last layer, beside all that forward has kept.

    Gradients of its input and output, 2 h, and of the widest tensors in between; or while a product's backward runs,
    fc2's input f and the gradient of fc2's weight, then fc1's output and weight, when what follows fc1 is given up. A
    gated activation's backward has the gradients of its output f and of its input 2 f, and one product f. Where
    attention gathers keys and values itself, it has four times their gradients, when all that follows attention is
    given up. In fp8 what comes back to fc1 is also there as two copies of a byte a number.
    """
    s, a, element = setting, setting.student, BYTES[setting.precision]
    tensor, heads = s.parallel.tensor, a.num_attention_heads * a.kv_channels
    ffn, hidden, gates = a.ffn_hidden_size // tensor, 2 * a.hidden_size, 2 if a.gated_linear_unit else 1
    weight = weight_gradient(s) * a.hidden_size * ffn
    wide = element * s.tokens
    copies = 2 * s.tokens * gates * ffn if s.fp8 else 0
    found = [
        wide * (hidden + max(2 * gates * ffn, 2 * heads // tensor)),
        copies + wide * (hidden + (1 + gates) * ffn),
        wide * (hidden + ffn) + weight,
        wide * (hidden - ffn) + gates * weight,
    ]
    if gathered := gathered_keys(s):
        found.append(wide * hidden + 2 * gathered - mlp_activations(s))
    return max(found)


def loss_buffers(setting: Setting) -> int:
    """The fp32 logits of a chunk of tokens of each model, and the gradient of the hidden states in their type.

    In bf16 the logits' gradient in bf16 too; on CPU instead bf16 heads in fp32, and logits of a few rows. Under
    sequence parallelism the gathered hidden states of both models. Where there are stages, what the last one has
    received ahead and the gradient that it has sent. The head's gradient goes straight into the gradient buffer. Of
    pairs of answers the states of the counted tokens, at most all, and their gradient (alignment/token_losses.py).
    """
    s, element = setting, BYTES[setting.precision]
    shard = s.student.padded_vocab_size // s.parallel.tensor
    chunk = min(s.loss_chunk_tokens or default_chunk_tokens(s.tokens), s.tokens)
    models = [(s.student.hidden_size, element)]
    if s.teacher is not None:
        models.append((s.teacher.hidden_size, s.teacher_element))
    buffers = 4 * chunk * shard * len(models) + element * s.student.hidden_size * s.tokens * (3 if s.preference else 1)
    if s.on_cpu:
        buffers += 4 * shard * sum(hidden for hidden, size in models if size < 4)
        buffers += 4 * max(shard, min(CACHED_ENTRIES, chunk * shard))
    elif element < 4:
        buffers += element * chunk * shard
    if s.parallel.sequence:
        buffers += s.tokens * sum(hidden * size for hidden, size in models)
    return buffers + (2 * boundary_bytes(s) if s.parallel.pipeline > 1 else 0)


def teacher_pass(setting: Setting) -> int:
    """The teacher's widest layer without gradients, in its own layout: the model's input, a block's input and its norm,
    3 h; fc1's output 2 f and the product of its halves, or without a gate 3 f in all too; or the fused projection,
    queries and keys after rotation, and attention's output, 3 q + 3 k."""
    s, a, tensor = setting, setting.teacher, setting.teacher_layout.tensor
    assert a is not None
    mlp = 3 * a.ffn_hidden_size
    attention = 3 * (a.num_attention_heads + a.num_query_groups) * a.kv_channels
    return s.teacher_element * s.tokens * (3 * a.hidden_size + max(mlp, attention) // tensor)


def _largest_parameter(setting: Setting, stage: int) -> int:
    """Numbers of the largest parameter on a rank."""
    s, a = setting, setting.student
    gates = 2 if a.gated_linear_unit else 1
    sizes = [gates * a.ffn_hidden_size]
    if stage in (0, s.parallel.pipeline - 1):
        sizes.append(a.padded_vocab_size)
    return a.hidden_size * max(sizes) // s.parallel.tensor


def _largest_buffer(setting: Setting, stage: int, count: int) -> int:
    """Numbers of the largest gradient buffer of a rank that trains `count`: each chunk has one of its own."""
    s = setting
    chunks = chunk_layers(s.student, s.parallel)[stage]
    table = s.student.padded_vocab_size * s.student.hidden_size // s.parallel.tensor
    rest = table * (stage in (0, s.parallel.pipeline - 1)) if len(chunks) > 1 else 0
    return (count - rest) * max(chunks) // sum(chunks) + rest
