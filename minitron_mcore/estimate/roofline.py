"""How much memory a shape needs to serve, and how fast it may be: a roofline of prefill and decode. Pure.

Every operation takes the longer of two times: its floating-point operations at the rate that products reach, and the
bytes that it reads and writes at the memory's bandwidth; operations follow one another. Prefill is bound by the first,
decode at small batches by the second. Where the shape is cut over GPUs, each layer adds two all-reduces.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from minitron_mcore.architecture import Architecture
from minitron_mcore.estimate.config import ServingConfig
from minitron_mcore.estimate.measured import corrections
from minitron_mcore.estimate.rates import all_reduce, operation
from minitron_mcore.layout import parameter_table
from minitron_mcore.runtime.devices import Machine

# Bytes of a number; int4 has a bf16 scale for each 128 weights.
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int4": 0.5 + 2 / 128}
# Kernels of a layer: two norms with the residual sums, QKV, rotation with the write to the cache, attention and its
# reduction, projection, up and gate, activation, down.
KERNELS = 10


def serving_figures(architecture: Architecture, serving: ServingConfig, machine: Machine) -> dict[str, float]:
    """memory (`serving_memory`), prefill_latency (seconds until a batch has its first tokens), decode_latency (seconds
    of a step that makes one token of each sequence, in the middle of the output), latency (prefill, then output_tokens
    steps), prefill_throughput and decode_throughput (tokens a second of the batch).

    Corrected by the points that `serving.measured` names (measured.py). Raises InputError where `machine` lacks a
    figure, or the file cannot correct.
    """
    prefill, decode = (phase(architecture, serving, machine) for phase in (prefill_seconds, decode_seconds))
    if serving.measured is not None:
        factor = corrections(architecture, serving, machine, roofline=(prefill_seconds, decode_seconds))
        prefill, decode = prefill * factor["prefill"], decode * factor["decode"]
    return {
        "memory": serving_memory(architecture, serving),
        "prefill_latency": prefill,
        "decode_latency": decode,
        "latency": prefill + serving.output_tokens * decode,
        "prefill_throughput": serving.batch_size * serving.prompt_tokens / prefill,
        "decode_throughput": serving.batch_size / decode,
    }


def serving_memory(architecture: Architecture, serving: ServingConfig) -> int:
    """Bytes of the weights and of the KV cache of a batch at its full length, of all GPUs together.

    fp8 and int4 are of the layers' matrices alone; the rest is bf16, as serving engines have it.
    """
    tokens = serving.batch_size * (serving.prompt_tokens + serving.output_tokens)
    layers, rest = weight_bytes(architecture, serving)
    return ceil(layers + rest) + ceil(tokens * _cache_bytes(architecture, serving) * serving.tensor)


def weight_bytes(architecture: Architecture, serving: ServingConfig) -> tuple[float, float]:
    """(matrices of the layers, everything else): bytes of all GPUs. The padding of the vocabulary does not count."""
    narrow, wide = BYTES[serving.weights], 4.0 if serving.weights == "fp32" else 2.0
    layers = rest = 0.0
    for parameter in parameter_table(architecture):
        count = parameter.count(architecture, architecture.vocab_size)
        if parameter.per_layer and len(parameter.axes) == 2:
            layers += narrow * count
        else:
            rest += wide * count
    return layers, rest


def _cache_bytes(architecture: Architecture, serving: ServingConfig) -> float:
    """Of a token in all layers on one GPU: groups that are fewer than the GPUs lie on several of them."""
    groups = ceil(architecture.num_query_groups / serving.tensor)
    return architecture.num_layers * 2 * groups * architecture.kv_channels * BYTES[serving.kv_cache]


@dataclass(frozen=True)
class _Pass:
    """One forward pass: `tokens` of the batch, each of which attends to `context` tokens; `read` of them, summed over
    the sequences, are read from the cache; logits of `outputs` tokens."""

    tokens: int
    context: float
    read: float
    outputs: int


def prefill_seconds(architecture: Architecture, serving: ServingConfig, machine: Machine) -> float:
    """Of a batch of prompts: attention over the causal half, logits of the last token alone."""
    batch, prompt = serving.batch_size, serving.prompt_tokens
    return _seconds(architecture, serving, machine, _Pass(batch * prompt, (prompt + 1) / 2, batch * prompt, batch))


def decode_seconds(architecture: Architecture, serving: ServingConfig, machine: Machine) -> float:
    """Of a step that makes one token of each sequence, half of the output being made."""
    batch, context = serving.batch_size, serving.prompt_tokens + (serving.output_tokens + 1) / 2
    return _seconds(architecture, serving, machine, _Pass(batch, context, batch * context, batch))


def _seconds(architecture: Architecture, serving: ServingConfig, machine: Machine, now: _Pass) -> float:
    a, tensor = architecture, serving.tensor
    wide = "fp32" if serving.weights == "fp32" else "bf16"
    element = BYTES[wide]
    layers, _ = weight_bytes(a, serving)
    products = a.forward_flops_per_token(0, output_head=False)
    scores = a.num_layers * 4 * now.context * a.num_attention_heads * a.kv_channels
    head = 2 * a.hidden_size * a.vocab_size
    queries = a.num_layers * a.num_attention_heads * a.kv_channels
    # What a layer's products, norms and activation read and write of a token: its input and output about eight times
    # (norm, QKV, projection, residual sum, twice), queries, keys and values, and the MLP's width.
    width = (a.num_attention_heads + 2 * a.num_query_groups) * a.kv_channels
    inner = (4 if a.gated_linear_unit else 3) * a.ffn_hidden_size
    traffic = element * a.num_layers * (8 * a.hidden_size + (2 * width + inner) / tensor)
    seconds = operation(
        machine,
        now.tokens * products / tensor,
        layers / tensor + now.tokens * traffic,
        serving.weights if serving.weights == "fp8" else wide,
    )
    cache = now.read * _cache_bytes(a, serving)
    moved = cache + 2 * now.tokens * queries * element / tensor
    seconds += operation(machine, now.tokens * scores / tensor, moved, wide)
    logits = 4 * now.outputs * a.vocab_size
    head_bytes = element * a.hidden_size * a.vocab_size + logits
    seconds += operation(machine, now.outputs * head / tensor, head_bytes / tensor, wide)
    seconds += a.num_layers * KERNELS * machine.kernel_latency
    if tensor > 1:
        reduced = element * now.tokens * a.hidden_size
        seconds += 2 * a.num_layers * all_reduce(machine, reduced, tensor)
    return seconds
