"""How many bytes of memory a rank needs for what stands beside the trainings: scoring, evaluating, caching, which run a
model forward, and pruning, scoring by magnitude and exporting, which hold one parameter at a time, or a few blocks, in
host memory. Pure.

Weights and sums are exact; what a forward pass holds at once was fitted to the CPU's allocator and holds within 15%
there (tests/distributed/estimate/test_stage_peaks.py). Not counted: as in forecast.py.

Legend: n tokens of a microbatch on a rank, T tensor-parallel size, h hidden, f ffn, V padded vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.distillation.config import CacheConfig, default_chunk_tokens
from minitron_mcore.estimate.model import local_parameters
from minitron_mcore.files import BLOCK, MOST_THREADS
from minitron_mcore.importance.config import LOGIT_METRICS, TEXT_METRICS, ImportanceConfig, variant_names
from minitron_mcore.layout import axis_sizes, local_shape, parameter_table, split_layers
from minitron_mcore.runtime.config import ParallelConfig

Parts = dict[str, int]

# Microbatches a pipeline stage that are read ahead (model/schedule.py: GROUP; evaluation/held_out.py).
READ_AHEAD = {"score": 16, "cache": 16, "evaluate": 4, "reference": 16}
# Bytes an entry of a chunk of logits while ids are drawn from it: logits and means in fp32, and four tensors of 64-bit
# random numbers. While the likeliest are chosen: logits, a copy without them and their logarithms of sums; of a shard
# 64-bit keys of values and columns beside three 32-bit tensors.
_DRAWN, _CHOSEN, _CHOSEN_OF_SHARD = 40, 16, 36
MAGNITUDE_CHUNK = 2**22  # importance/magnitude.py: values that are in memory as float64 at a time
DEPTH_CHUNK = 512  # evaluation/token_values.py: tokens whose logits exist at a time


@dataclass(frozen=True)
class Pass:
    """A pass without gradients over microbatches of whole sequences."""

    verb: str
    model: Architecture
    parallel: ParallelConfig
    precision: str
    sequence_length: int
    micro_batch_size: int
    on_cpu: bool = False

    @property
    def element(self) -> int:
        return BYTES.get(self.precision, 2)

    @property
    def tokens(self) -> int:
        return self.micro_batch_size * self.sequence_length // self.parallel.context

    @property
    def vocabulary(self) -> int:
        """The rank's rows of the output head."""
        return self.model.padded_vocab_size // self.parallel.tensor


def forward_parts(run: Pass, stage: int) -> Parts:
    """Weights, what the widest layer holds at once, and the batch, on a rank of pipeline stage `stage`.

    A layer holds the block's input, the residual, the normed input and the output, n h each, under sequence parallelism
    a part of it but for the gathered input; and sharded over T: of an MLP 3 f, of a gated one fc1's output and the
    product of its halves; of attention queries, keys and values before and after rotation.
    """
    a, parallel = run.model, run.parallel
    widths = axis_sizes(a)
    sharded = max(3 * a.ffn_hidden_size, 2 * widths["qkv"] + 2 * widths["heads"])
    split = parallel.tensor if parallel.sequence else 1
    whole = a.hidden_size + 3 * a.hidden_size // split
    arriving = 2 * a.hidden_size // split if parallel.pipeline > 1 else 0  # from the stage before, and to the next
    return {
        "weights": run.element * local_parameters(a, parallel, stage),
        "layer at work": run.element * run.tokens * (whole + arriving + sharded // parallel.tensor),
        "batch": 28 * run.tokens * READ_AHEAD[run.verb] * parallel.pipeline,
    }


def _fullest(held: Parts, *phases: Parts) -> Parts:
    """What is `held` throughout, and the largest of the phases, which come one after another."""
    return held | max(phases, key=lambda phase: sum(phase.values()))


def evaluate_parts(run: Pass, stage: int) -> Parts:
    """`evaluate`: the loss by chunks of tokens, from the final hidden states, on the last stage."""
    held = forward_parts(run, stage)
    working = {"layer at work": held.pop("layer at work")}
    if stage < run.parallel.pipeline - 1:
        return held | working
    chunk = min(default_chunk_tokens(run.tokens), run.tokens)
    logits = 4 * chunk * run.vocabulary * (1 + run.on_cpu) + _widened_head(run)
    return _fullest(held, working, {"loss": logits + _final_states(run)})


def reference_parts(run: Pass, chunk_tokens: int | None, stage: int) -> Parts:
    """Log-probabilities of answers, before preferences are trained: those of counted tokens, whose final states are
    gathered, by chunks, on the last stage. At most, which is where every token counts."""
    held = forward_parts(run, stage)
    working = {"layer at work": held.pop("layer at work")}
    if stage < run.parallel.pipeline - 1:
        return held | working
    chunk = min(chunk_tokens or default_chunk_tokens(run.tokens), run.tokens)
    logits = 4 * chunk * run.vocabulary * (1 + run.on_cpu) + _widened_head(run)
    return _fullest(held, working, {"loss": logits + 2 * _final_states(run)})


def cache_parts(run: Pass, cache: CacheConfig, stage: int) -> Parts:
    """`cache`: the teacher's targets, from a chunk of its logits at a time, on the last stage."""
    held = forward_parts(run, stage)
    working = {"layer at work": held.pop("layer at work")}
    if stage < run.parallel.pipeline - 1:
        return held | working
    chosen = _CHOSEN if run.parallel.tensor == 1 else _CHOSEN_OF_SHARD
    each = chosen if cache.method == "top_k" else _DRAWN + 4 * (cache.proposal_temperature != 1)
    logits = each * min(cache.chunk_tokens, run.sequence_length) * run.vocabulary + _widened_head(run)
    return _fullest(held, working, {"targets": logits + _final_states(run)})


def score_parts(run: Pass, importance: ImportanceConfig, stage: int) -> Parts:
    """`score` by activations: the sums of the microbatch under way, in fp64 (Σ|S| alone on a GPU in fp32), and of all
    samples so far; at the end those of the whole model beside them. Depth metrics take logits of a chunk of tokens."""
    held, a, tensor = forward_parts(run, stage), run.model, run.parallel.tensor
    working = {"layer at work": held.pop("layer at work")}
    variants = [name.split("/") for name in variant_names(importance)]
    sequence = dict.fromkeys(name for _, name, _ in variants)
    sites = len(dict.fromkeys(site for *_, site in variants))
    sums = len(dict.fromkeys(name for each in sequence for name in _SUMS[each]))
    here = len([layer for chunk in _stage(run, stage) for layer in chunk])
    # (rows of a layer, channels of the model, of a rank)
    axes = [(2, a.hidden_size, a.hidden_size), (1, a.num_attention_heads, a.num_attention_heads // tensor)]
    axes += [(1, a.num_query_groups, a.num_query_groups // tensor)]
    axes += [(1, a.ffn_hidden_size, a.ffn_hidden_size // tensor)] * sites
    numbers = [rows * here * own for rows, _, own in axes]
    element = 8 if run.on_cpu or sums > 1 or list(sequence) != ["mean"] else 4
    recorded = element * sums * run.micro_batch_size * sum(numbers)
    # Of one axis at a time: its sums stacked, the values that follow, and these weighted and squared.
    added = 8 * run.micro_batch_size * max(numbers) * (sums + 3 * len(sequence))
    totals, merged = (16 * len(sequence) * a.num_layers * sum(row[0] * row[i] for row in axes) for i in (2, 1))
    held |= {"sums over samples": totals}
    phases = [
        {**working, "sums of a microbatch": recorded + _SCRATCH * run.on_cpu},
        {"sums of a microbatch": recorded + added, "final states": _final_states(run)},
        {"sums of the whole model": merged},
    ]
    if {*importance.depth_metrics} & {*TEXT_METRICS} and stage == run.parallel.pipeline - 1:
        states = 2 + bool({*importance.depth_metrics} & {*LOGIT_METRICS})
        logits = 4 * states * min(DEPTH_CHUNK, run.tokens) * run.vocabulary + _widened_head(run)
        phases.append({"logits": logits + (states - 1) * _final_states(run)})
    return _fullest(held, *phases)


# importance/aggregate.py: the sums that each aggregation is made from; on the CPU, two fp32 buffers of CACHED values.
_SCRATCH = 2 * 4 * 2**17
_SUMS = {"mean": ("abs",), "l2": ("square",), "var": ("sum", "square")}


def kept_states(run: Pass, importance: ImportanceConfig, data_parallel: int) -> int:
    """Bytes of host memory on a rank of the last stage that metrics of the logits keep: final states of its samples."""
    if not {*importance.depth_metrics} & {*LOGIT_METRICS}:
        return 0
    samples = -(-importance.num_samples // data_parallel)
    return samples * run.sequence_length * run.model.hidden_size * run.element


def prune_bytes(teacher: Architecture, student: Architecture, parallel: ParallelConfig, precision: str) -> int:
    """Host memory of a rank of `prune`: one parameter as it is stored, and the rank's span of it; or the span, what is
    kept of it, and that made contiguous. A gated fc1 is stored, and cut, in halves."""
    kept = {row.key: prod(local_shape(row, student, parallel.tensor)) for row in parameter_table(student)}
    most = 0
    for row in parameter_table(teacher):
        whole, span = prod(row.shape(teacher)), prod(local_shape(row, teacher, parallel.tensor))
        most = max(most, max(whole + span, span + 2 * kept[row.key]) // (2 if row.gated else 1))
    return BYTES.get(precision, 2) * most


def export_bytes(model: Architecture, precision: str) -> int:
    """Host memory of the first rank of `export` at most: for each thread a block, and what it is picked from."""
    largest = max(prod(row.shape(model)) for row in parameter_table(model))
    return MOST_THREADS * 2 * min(BLOCK, BYTES.get(precision, 2) * largest)


def magnitude_bytes(model: Architecture, precision: str) -> int:
    """Host memory of a rank of `score` by magnitude: one parameter, and the stored piece that it is filled from, half
    of it where it is a gated fc1; or a chunk of it in float64, and its squares."""
    most, size = 0, BYTES.get(precision, 2)
    for row in parameter_table(model):
        count = prod(row.shape(model))
        most = max(most, size * count * (3 if row.gated else 4) // 2, size * count + 16 * min(count, MAGNITUDE_CHUNK))
    return most


def _stage(run: Pass, stage: int) -> list[list[int]]:
    parallel = run.parallel
    return split_layers(run.model.num_layers, parallel.pipeline, parallel.virtual_pipeline)[stage]


def _final_states(run: Pass) -> int:
    return run.element * run.tokens * run.model.hidden_size


def _widened_head(run: Pass) -> int:
    """On CPU a product of bf16 with an fp32 result takes the head in fp32."""
    return 4 * run.vocabulary * run.model.hidden_size if run.on_cpu and run.element == 2 else 0
