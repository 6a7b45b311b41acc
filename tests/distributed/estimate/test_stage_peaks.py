"""The forecast of scoring, evaluating, caching, a reference's pass, pruning and magnitudes against torch's CPU
allocator at its peak; of exporting, on threads that it does not tell of, in tests/e2e/test_convert_memory.py.

Each within 12%: a forward pass is forecast by the widest layer's tensors, which were counted, not derived; the smaller
vectors and gloo's scratch are not counted. What a quicker case covers is slow.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.distillation.config import CacheConfig
from minitron_mcore.estimate.stages import (
    Pass,
    cache_parts,
    evaluate_parts,
    kept_states,
    magnitude_bytes,
    prune_bytes,
    reference_parts,
    score_parts,
)
from minitron_mcore.importance.config import ImportanceConfig
from minitron_mcore.runtime.config import ParallelConfig
from tests.distributed.memory_peak import count_every_thread, most_allocated
from tests.distributed.models import LAYOUTS, start_layout, tiny
from tests.distributed.ranks import run_on_ranks

LENGTH, TOLERANCE = 256, 0.12
SHAPE = {"vocab_size": 4096, "max_position_embeddings": LENGTH, "hidden_size": 256, "ffn_hidden_size": 768}
WHOLE = {**SHAPE, "num_attention_heads": 8, "vocab_size": 512}
SMALL = {**WHOLE, "hidden_size": 192, "ffn_hidden_size": 512}


@dataclass(frozen=True)
class Case:
    verb: str
    layout: str
    precision: str
    micro_batch_size: int
    family: str = "llama"
    section: dict[str, Any] = field(default_factory=dict)  # of the verb

    @property
    def model(self) -> Architecture:
        return tiny(self.family, **SHAPE)


@contextmanager
def peak(folder: str) -> Iterator[list[int]]:
    """A list that holds, after the `with`, the bytes that were allocated within at most."""
    from torch.profiler import ProfilerActivity, profile

    count_every_thread()
    gc.collect()
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.empty(1)  # the total before
        yield found
    found.append(most_allocated(profiler, folder))


def peak_of_pass(case: Case, folder: str) -> tuple[int, int]:
    """(pipeline stage, bytes at most) of a pass over a few microbatches, the model's weights among them."""
    from megatron.core import parallel_state

    from minitron_mcore.alignment.reference import segment_log_probs
    from minitron_mcore.distillation.cache.draw import make_targets
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.evaluation.held_out import mean_loss
    from minitron_mcore.importance.depth import measure_depth
    from minitron_mcore.importance.score import score_model
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.model.microbatch import Microbatch
    from minitron_mcore.model.schedule import evaluating, in_calls, visit_final_states

    world_size, parallel = LAYOUTS[case.layout]
    layout, shape, size = start_layout(parallel, world_size), case.model, case.micro_batch_size
    group = parallel_state.get_tensor_model_parallel_group()

    def batches() -> Iterator[Microbatch]:
        for _ in range(16 * layout.pipeline):
            ids = torch.randint(0, shape.vocab_size, (size, LENGTH + 1))
            position_ids = torch.arange(LENGTH).expand(size, LENGTH).contiguous()
            given = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(size, LENGTH), position_ids
            yield Microbatch(*given, samples=torch.arange(size), valid=torch.ones(size))

    chunks = build_model(shape, layout, case.precision, trainable=False)
    initialize(chunks, shape, seed=1)
    weights = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    with peak(folder) as found:
        if case.verb == "score":
            importance = ImportanceConfig(**case.section)
            score_model(chunks, batches(), shape, importance)
            if importance.depth_metrics:
                measure_depth(chunks, list(batches()), shape, importance.depth_metrics)
        elif case.verb == "evaluate":
            groups = in_calls(batches(), interleaved=len(chunks) > 1, each=4)
            mean_loss(list(chunks), groups, Objective(LossSettings(shape.vocab_size)))
        elif case.verb == "reference":
            count = 16 * layout.pipeline * size
            ids = numpy.random.default_rng(1).integers(0, shape.vocab_size, count * (LENGTH + 1), dtype=numpy.int32)
            starts = numpy.arange(count + 1) * (LENGTH + 1)
            full = SimpleNamespace(tokens=ids, counted=numpy.ones(len(ids), dtype=bool), starts=starts)
            segment_log_probs(chunks, full, range(count), LossSettings(shape.vocab_size), micro_batch_size=size)
        else:
            cache = CacheConfig(**case.section)
            settings = {**vars(cache), "vocab_size": shape.vocab_size, "temperature": 1.0, "seed": 3}

            def visit(chunk: Any, hidden: torch.Tensor, microbatch: Microbatch) -> None:
                how: Any = {"sequence_parallel": layout.sequence, "chunk_tokens": cache.chunk_tokens}
                assert microbatch.samples is not None
                make_targets(hidden, chunk.head_weight(), microbatch.samples, settings, tp_group=group, **how)

            with evaluating(chunks):
                for part in in_calls(batches(), interleaved=len(chunks) > 1):
                    visit_final_states(chunks, part, visit)
    return parallel_state.get_pipeline_model_parallel_rank(), weights + found[0]


def slow(*values: Any, **named: Any) -> Any:
    return pytest.param(Case(*values, **named), marks=pytest.mark.slow)


MANY = {"aggregations": ["l2/mean", "mean/var"], "neuron_sites": ["pre_activation"]}
DEPTH = {"depth_metrics": ["lm_loss", "logit_mse"]}


@pytest.mark.parametrize(
    "case",
    [
        slow("score", "TP2-SP", "bf16", 4, section=MANY),
        Case("score", "1", "fp32", 2),
        slow("score", "PP2", "fp32", 4, "nemotron"),
        slow("score", "1", "bf16", 2, section=DEPTH),
        slow("evaluate", "PP2-VPP2", "fp32", 4),
        Case("evaluate", "1", "bf16", 8, "nemotron"),
        slow("evaluate", "TP2", "bf16", 4),
        slow("evaluate", "TP2-SP", "fp32", 8),
        Case("reference", "1", "fp32", 4),
        slow("reference", "PP2", "bf16", 4),
        slow("reference", "TP2-SP", "fp32", 8, "nemotron"),
        Case("cache", "1", "fp32", 1, section={"proposal_temperature": 2.0}),
        slow("cache", "1", "bf16", 1, section={"method": "top_k"}),
        slow("cache", "TP2", "bf16", 1, section={"method": "top_k"}),
    ],
    ids=lambda case: f"{case.verb}-{case.layout}-{case.precision}",
)
def test_a_pass(case: Case, tmp_path: Path) -> None:
    world_size, layout = LAYOUTS[case.layout]
    parallel = ParallelConfig(**layout)
    run = Pass(case.verb, case.model, parallel, case.precision, LENGTH, case.micro_batch_size, on_cpu=True)
    for stage, measured in run_on_ranks(peak_of_pass, world_size, case, str(tmp_path)):
        host = 0
        if case.verb == "score":
            importance = ImportanceConfig(**case.section, num_samples=16 * case.micro_batch_size)
            parts, host = score_parts(run, importance, stage), kept_states(run, importance, 1)
        elif case.verb == "evaluate":
            parts = evaluate_parts(run, stage)
        elif case.verb == "reference":
            parts = reference_parts(run, None, stage)
        else:
            parts = cache_parts(run, CacheConfig(**case.section), stage)
        expected = sum(parts.values()) + host
        assert expected == pytest.approx(measured, rel=TOLERANCE), parts


def peaks_on_the_host(parallel: dict[str, Any], folder: str) -> tuple[int, int]:
    """Bytes that pruning, and scoring by magnitude, hold at most, of a checkpoint of one rank's pieces."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, model_state, save_state
    from minitron_mcore.importance.magnitude import magnitude_scores
    from minitron_mcore.importance.scores import random_scores
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.pruning.apply import prune_checkpoint
    from minitron_mcore.pruning.config import PruneConfig, StudentConfig
    from minitron_mcore.pruning.plan import make_plan
    from minitron_mcore.runtime.parallel import use_layout
    from minitron_mcore.runtime.start import start

    runtime, teacher, student = start(), tiny("llama", **WHOLE), tiny("llama", **SMALL)
    layout, (source, target) = ParallelConfig(**parallel), (Path(folder) / name for name in ("t", "s"))
    start_layout({}, runtime.world_size)
    chunks = build_model(teacher, ParallelConfig(), "fp32")
    initialize(chunks, teacher, seed=1)
    save_state(source, 0, model_state(as_chunks(chunks)), runtime)
    del chunks
    runtime.on_main(lambda: write_description(source, teacher, lineage={}, recipe="", save_tokenizer=None))
    sizes = {name: getattr(student, name) for name in ("hidden_size", "ffn_hidden_size")}
    plan = make_plan(random_scores(teacher, 1, {}), StudentConfig(**sizes), PruneConfig(), layout)
    use_layout(layout, runtime.world_size)
    with peak(folder) as pruning:
        prune_checkpoint((source, 0), plan, target, runtime)
    with peak(folder) as reading:
        magnitude_scores(source, 0, teacher)
    return pruning[0], reading[0]


def test_what_is_held_of_a_checkpoint(tmp_path: Path) -> None:
    """Two ranks cut a student out of whole parameters, and read whole ones for their magnitudes."""
    teacher, student = tiny("llama", **WHOLE), tiny("llama", **SMALL)
    ranks = run_on_ranks(peaks_on_the_host, 2, {"tensor": 2}, str(tmp_path))
    expected = prune_bytes(teacher, student, ParallelConfig(tensor=2), "fp32")
    assert expected == pytest.approx(max(pruned for pruned, _ in ranks), rel=TOLERANCE)
    assert magnitude_bytes(teacher, "fp32") == pytest.approx(max(read for _, read in ranks), rel=TOLERANCE)
