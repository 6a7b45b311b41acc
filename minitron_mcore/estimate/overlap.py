"""What a step waits for of its data-parallel communication, where that runs under the computation
(runtime/overlap.py). Pure.

Gradients are reduced bucket by bucket in the last microbatch's backward pass, from the last layer to the first: each
bucket when its last gradient is there, and the one before has been reduced. Whatever the links could do, the last
bucket comes after the pass: it holds the first layers and, on the first stage, the embedding. Weights are gathered from
the step on, bucket by bucket from the first layer on, under what runs ahead of the student's first forward pass and
under the part of that pass which comes before the layer that needs them. Later stages end their last backward pass
before the first one does, and begin their first forward pass after it. Communication is not taken to slow the
computation.

`place`: the first layer of a bucket, counted on its stage; the embedding lies with layer 0, the head after the last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.estimate.model import Setting, chunk_layers, shard_sizes
from minitron_mcore.estimate.rates import all_reduce, gather
from minitron_mcore.runtime.devices import Machine

# Megatron's, in parameters: so many, or so many for each data- and context-parallel rank.
SMALLEST_BUCKET, BUCKET_A_RANK = 40_000_000, 1_000_000


class Bucket(NamedTuple):
    """Parameters that travel together; place: of the first layer among theirs."""

    parameters: int
    place: int


def reduction(setting: Setting, machine: Machine, parameters: int) -> float:
    """Seconds that the fp32 gradients of so many take to their shards, at once. Instances of the optimizer do so each
    over its own ranks, and add up the shards between them."""
    shards, stride = setting.optimizer_shards, setting.parallel.tensor
    instances = setting.parallel.num_distributed_optimizer_instances
    seconds = gather(machine, 4 * parameters, shards, stride=stride)
    return seconds + all_reduce(machine, 4 * parameters / shards, instances, stride=stride * shards)


def gathering(setting: Setting, machine: Machine, parameters: int) -> float:
    """Seconds that so many weights take from their shards to all ranks, at once."""
    size = BYTES.get(setting.precision, 2) * parameters
    return gather(machine, size, setting.optimizer_shards, stride=setting.parallel.tensor)


def reduction_wait(setting: Setting, machine: Machine, layer_backward: float) -> float:
    """Seconds from the end of the first stage's last backward pass until the gradients of all stages are reduced."""
    s = setting

    def end(stage: int, layers: int) -> float:
        done = 0.0
        for bucket in _buckets_of(s, stage):
            done = max(done, (layers - bucket.place) * layer_backward) + reduction(s, machine, bucket.parameters)
        return done - layers * layer_backward

    return _longest(s, end, layer_backward)


def gathering_wait(setting: Setting, machine: Machine, layer_forward: float) -> float:
    """Seconds that the student's first forward passes wait for weights if they come at once; they wait for that much
    less as something else runs before."""
    s = setting

    def wait(stage: int, _: int) -> float:
        done = longest = 0.0
        for bucket in reversed(_buckets_of(s, stage)):
            done += gathering(s, machine, bucket.parameters)
            longest = max(longest, done - bucket.place * layer_forward)
        return longest

    return _longest(s, wait, layer_forward)


def _longest(setting: Setting, wait: Callable[[int, int], float], layer_seconds: float) -> float:
    """The longest `wait(stage, layers)`, less what the stages before it take for a pass over a chunk of theirs."""
    longest = before = 0.0
    for stage, chunks in enumerate(chunk_layers(setting.student, setting.parallel)):
        longest = max(longest, wait(stage, sum(chunks)) - before)
        before += sum(chunks) / len(chunks) * layer_seconds
    return longest


def _buckets_of(setting: Setting, stage: int) -> tuple[Bucket, ...]:
    s = setting
    least = s.ddp_bucket_size or max(SMALLEST_BUCKET, BUCKET_A_RANK * s.data_parallel * s.parallel.context)
    ends = stage == 0, stage == s.parallel.pipeline - 1
    return buckets(s.student, s.parallel.tensor, chunk_layers(s.student, s.parallel)[stage], ends, least)


@cache
def buckets(
    architecture: Architecture, tensor: int, chunks: tuple[int, ...], ends: tuple[bool, bool], least: int
) -> tuple[Bucket, ...]:
    """Those of a rank, in the order of backward: of a chunk's parameters from its last one on, as many as make `least`.
    Later stages have one, as Megatron has it, beside their copy of a tied head, which is one of its own; chunks after
    the first have one each (training/step.py).

    chunks: how many layers each has; ends: whether they are of the first stage, and of the last.
    """
    layer, embedding, head = shard_sizes(architecture, tensor)
    first, last = ends
    shared = not architecture.untie_embeddings_and_output_weights and first != last
    found, place = list[Bucket](), sum(chunks)
    for number in reversed(range(len(chunks))):
        sizes: list[tuple[int, int, bool]] = []  # parameters, place, whether they end a bucket
        if last and number == len(chunks) - 1:
            sizes += [(embedding, place, True)] if shared else []
            sizes.append((head, place, False))
        for _ in range(chunks[number]):
            place -= 1
            sizes += [(size, place, False) for size, _ in reversed(layer)]
        if first and number == 0:
            if shared:
                sizes[-1] = (*sizes[-1][:2], True)
            sizes.append((embedding, 0, shared))
        held = 0
        for size, at, closes in sizes:
            held += size
            if number == 0 and (closes or (first and held >= least)):
                found.append(Bucket(held, at))
                held = 0
        if held:
            found.append(Bucket(held, place))
    return tuple(found)
