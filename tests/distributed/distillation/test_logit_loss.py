"""The logit loss against plain log_softmax and autograd in float64 on the whole vocabulary, at TP 1, 2 and 4.

Values and all gradients, since a wrong factor of TP shows in gradients alone. Every rank holds the whole problem too
and computes the dense reference for itself. Gradients are compared by relative Frobenius norm of this rank's part.
"""

import itertools
import weakref
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitron_mcore.distillation.config import LEAST_CHUNK
from minitron_mcore.distillation.logits import loss, passes
from tests.distributed.logit_loss_problem import SCALE, Case, Problem, part, relative, run
from tests.distributed.ranks import run_on_ranks, test_device

# fp32 rounding: measured at most 6e-7 over all cases below.
TOLERANCE = 1e-5
# bf16 parameters and hidden states: the gradients handed to autograd are rounded once to bf16 (2^-9 of each entry at
# most, 2e-3 in norm as measured), and the ranks' parts of the hidden states' gradient are summed in bf16 (4.8e-3
# measured at TP 4).
BF16_TOLERANCE = 6e-3


def errors(case: Case) -> dict[str, float]:
    problem = Problem(case)
    hidden = (part(problem.hidden) if case.sequence_parallel else problem.hidden).clone().requires_grad_()
    weight = part(problem.weight).clone().requires_grad_()
    output = run(problem, weight, hidden)
    dense = problem.dense()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == case.dtype and weight.grad.dtype == case.dtype
    found = {
        "loss": output.loss.detach(),
        "lm_loss": output.sums["lm"],
        "kd_loss": output.sums.get("kd", torch.zeros(())),
        "num_tokens": output.num_tokens,
        "token_loss": output.token_loss * (problem.mask > 0),
    }
    assert ("kd" in output.sums) == bool(case.teacher or case.target)
    for name, key in (("teacher_lm_loss", "teacher_lm"), ("top1_agreement", "agreement")):
        assert (key in output.sums) == (name in dense)
        if key in output.sums:
            found[name] = output.sums[key]
    result = {name: relative(value, dense[name]) for name, value in found.items()}
    result["hidden"] = relative(hidden.grad, part(dense["hidden"]) if case.sequence_parallel else dense["hidden"])
    result["weight"] = relative(weight.grad, part(dense["weight"]))
    return result


def worst(cases: list[Case]) -> dict[str, tuple[float, Case]]:
    """For each quantity the largest error over the cases, and the case it belongs to."""
    result: dict[str, tuple[float, Case]] = {}
    for case in cases:
        # Every other pair with chunks in halves.
        with mock.patch.object(loss, "LEAST_CHUNK", 1 if case.seed // 2 % 2 else LEAST_CHUNK):
            found = errors(case)
        for name, error in found.items():
            if name not in result or not error <= result[name][0]:
                result[name] = (error, case)
    return result


def all_cases() -> list[Case]:
    """Vocabularies without padding, with some, and with whole shards of it (at TP 4, 33 and 24 of 48 rows)."""
    weights = [(1.0, 0.0, False), (0.0, 1.0, True), (0.3, 0.7, True), (0.5, 0.0, True)]
    cases: list[Case] = []
    for (lm_weight, kd_weight, teacher), temperature, mask, sequence_parallel in itertools.product(
        weights, (1.0, 2.0, 0.5), ("ones", "zeros", "fractions"), (False, True)
    ):
        case = Case(
            temperature=temperature,
            lm_weight=lm_weight,
            kd_weight=kd_weight,
            teacher=teacher,
            mask=mask,
            sequence_parallel=sequence_parallel,
            seed=len(cases),
        )
        # In turn, so that every size meets every mask and both settings of sequence parallel.
        vocab_size, chunk_size = ((48, 512), (37, 7), (33, 24), (24, 5))[5 * len(cases) // 2 % 4]
        cases.append(replace(case, vocab_size=vocab_size, chunk_size=chunk_size))
    return [*cases, replace(cases[0], chunk_size=1), replace(cases[-1], chunk_size=1)]


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_values_and_gradients_against_dense_float64(tensor_parallel: int) -> None:
    for rank, result in enumerate(run_on_ranks(worst, tensor_parallel, all_cases())):
        for name, (error, case) in result.items():
            assert error <= TOLERANCE, f"{name} on rank {rank}: {error} in {case}"


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_bf16_against_dense_float64_of_the_same_bf16_inputs(tensor_parallel: int) -> None:
    cases = [replace(case, dtype=torch.bfloat16) for case in all_cases()[::3]]
    for rank, result in enumerate(run_on_ranks(worst, tensor_parallel, cases)):
        for name, (error, case) in result.items():
            bound = BF16_TOLERANCE if name in ("hidden", "weight") else TOLERANCE
            assert error <= bound, f"{name} on rank {rank}: {error} in {case}"


def large_logits(case: Case) -> list[float]:
    """Logits of several hundred: exp of one overflows, and of most differences underflows."""
    problem = Problem(case)
    problem.hidden, problem.teacher_hidden = problem.hidden * 30, problem.teacher_hidden * 30
    hidden, weight = problem.hidden.clone().requires_grad_(), part(problem.weight).clone().requires_grad_()
    output, dense = run(problem, weight, hidden), problem.dense()
    assert hidden.grad is not None and weight.grad is not None
    values = [relative(output.sums[name], dense[f"{name}_loss"]) for name in ("lm", "kd")]
    return [*values, relative(hidden.grad, dense["hidden"]), relative(weight.grad, part(dense["weight"]))]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_large_logits(tensor_parallel: int) -> None:
    """Tolerance 1e-4: fp32 logits near 500 carry errors of 3e-5, which exp makes relative."""
    for temperature in (1.0, 2.0):
        case = Case(lm_weight=0.5, kd_weight=0.5, teacher=True, temperature=temperature)
        assert max(max(errors) for errors in run_on_ranks(large_logits, tensor_parallel, case)) <= 1e-4


def equal_models(case: Case) -> list[tuple[float, float, float]]:
    results = []
    for seed in range(5):
        problem = Problem(replace(case, seed=seed, teacher_hidden_size=case.hidden_size))
        problem.teacher_hidden, problem.teacher_weight = problem.hidden, problem.weight
        hidden, weight = problem.hidden.clone().requires_grad_(), part(problem.weight).clone().requires_grad_()
        output = run(problem, weight, hidden)
        assert hidden.grad is not None and weight.grad is not None
        results.append((output.sums["kd"].abs().item(), hidden.grad.norm().item(), weight.grad.norm().item()))
    return results


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equal_teacher_gives_no_loss_and_no_gradient(tensor_parallel: int, temperature: float) -> None:
    """Exactly none: both models go through the same operations."""
    case = Case(lm_weight=0.0, kd_weight=1.0, teacher=True, temperature=temperature, mask="zeros")
    for results in run_on_ranks(equal_models, tensor_parallel, case):
        assert max(max(result) for result in results) == 0.0


def frozen_parts(case: Case) -> tuple[bool, list[float]]:
    """No gradient in evaluation or for frozen parts, and the values do not depend on it."""
    problem = Problem(case)
    losses = []
    with torch.no_grad():
        hidden, weight = problem.hidden.clone().requires_grad_(), part(problem.weight).clone().requires_grad_()
        output = run(problem, weight, hidden)
        evaluated = output.loss.requires_grad
        losses.append(output.loss.item())
    for hidden_trains, weight_trains in ((True, True), (True, False), (False, True), (False, False)):
        hidden.requires_grad_(hidden_trains).grad = None
        weight.requires_grad_(weight_trains).grad = None
        losses.append(run(problem, weight, hidden).loss.item())
        assert (hidden.grad is not None, weight.grad is not None) == (hidden_trains, weight_trains)
        for name, gradient in (("hidden", hidden.grad), ("weight", weight.grad)):
            reference = problem.dense()[name]
            reference = part(reference) if name == "weight" else reference
            assert gradient is None or relative(gradient, reference) <= TOLERANCE, name
    return evaluated, losses


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_evaluation_and_frozen_parts(tensor_parallel: int) -> None:
    for case in (Case(), Case(teacher=True, kd_weight=0.5, temperature=2.0)):
        for evaluated, losses in run_on_ranks(frozen_parts, tensor_parallel, case):
            assert not evaluated
            assert len(set(losses)) == 1


class Tied(torch.nn.Module):
    """A head that is also the vocabulary-parallel embedding."""

    def __init__(self, problem: Problem, tied: bool):
        super().__init__()
        self.problem, self.tied = problem, tied
        self.weight = torch.nn.Parameter(part(problem.weight).clone())

    def forward(self, tokens: Tensor) -> Tensor:
        from megatron.core.tensor_parallel.mappings import (
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        if not self.tied:
            return self.problem.hidden[: tokens.shape[0]]
        rows = self.weight.shape[0]
        index = tokens - dist.get_rank() * rows
        here = (index >= 0) & (index < rows)
        looked_up = torch.nn.functional.embedding(index.masked_fill(~here, 0), self.weight) * here.unsqueeze(-1)
        join = reduce_from_tensor_model_parallel_region
        if self.problem.case.sequence_parallel:
            join = reduce_scatter_to_sequence_parallel_region
        return torch.tanh(join(looked_up, group=dist.group.WORLD))


def ddp_gradient(case: Case, tied: bool, wrap: bool) -> tuple[float, float]:
    """Relative error of the head's accumulated gradient over three microbatches, and the share of it that comes from
    the head alone. With `wrap`, inside Megatron's DDP with an fp32 gradient buffer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    problem = Problem(case)
    module = Tied(problem, tied)
    model: Any = module
    if wrap:
        config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
        model = DistributedDataParallel(config, settings, module)
        model.zero_grad_buffer()
    tokens = [torch.randint(case.vocab_size, problem.labels.shape).to(problem.labels.device) for _ in range(3)]
    for number, microbatch in enumerate(tokens):
        if wrap:
            for group in model.bucket_groups:
                group.is_last_microbatch = number == 2
        run(problem, module.weight, model(microbatch))
    if wrap:
        model.finish_grad_sync()
    gradient = getattr(module.weight, "main_grad" if wrap else "grad")
    assert gradient.dtype == (torch.float32 if wrap else case.dtype)

    total, head_only = (torch.zeros_like(problem.weight, dtype=torch.float64) for _ in range(2))
    for microbatch in tokens:
        embedding = problem.weight.double().requires_grad_()
        # The looked-up rows are rounded to the parameters' type, and so is what goes into the head.
        hidden = torch.tanh(torch.nn.functional.embedding(microbatch, embedding)) if tied else problem.hidden.double()
        dense_problem = Problem(case)
        dense_problem.hidden = hidden.detach().to(case.dtype)
        dense = dense_problem.dense()
        head_only += dense["weight"]
        total += dense["weight"]
        if tied:
            hidden.backward(dense["hidden"])
            assert embedding.grad is not None
            total += embedding.grad
    return relative(gradient, part(total)), (part(head_only).norm() / part(total).norm()).item()


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_bf16_head_accumulates_in_fp32_in_megatrons_buffer(tensor_parallel: int) -> None:
    """Within the tolerance of fp32: three microbatches' head gradients never pass through bf16. (CUDA's product rounds
    the logits' gradient, which the CPU's does not.)"""
    bound = TOLERANCE if test_device() == "cpu" else BF16_TOLERANCE
    for recompute in (False, True):
        scale = SCALE if recompute else 1.0
        case = Case(teacher=True, kd_weight=0.5, dtype=torch.bfloat16, vocab_size=48, recompute=recompute, scale=scale)
        for error, _ in run_on_ranks(ddp_gradient, tensor_parallel, case, tied=False, wrap=True):
            assert error <= bound


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_head_keeps_the_embeddings_gradient(tensor_parallel: int, wrap: bool, dtype: torch.dtype) -> None:
    bound = TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    for sequence_parallel, recompute in ((False, False), (True, False), (True, True)):
        case = Case(
            dtype=dtype,
            vocab_size=48,
            sequence_parallel=sequence_parallel and tensor_parallel > 1,
            recompute=recompute,
            scale=1.0 if wrap and not recompute else SCALE,
        )
        for error, head_share in run_on_ranks(ddp_gradient, tensor_parallel, case, tied=True, wrap=wrap):
            assert error <= bound
            assert abs(head_share - 1) > 0.05, "the embedding's gradient is too small for this test to see its loss"


def _is_stored(value: object) -> bool:
    return isinstance(value, Tensor) and value.untyped_storage().nbytes() > 0


class Allocations(TorchDispatchMode):
    """Largest tensor and largest sum of live storages that operations make, in bytes; and collectives called."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, int]] = {}
        self.largest = self.peak = self.collectives = 0

    def _drop(self, pointer: int) -> None:
        size, views = self.live[pointer]
        self.live[pointer] = (size, views - 1)
        if views == 1:
            del self.live[pointer]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if _is_stored(tensor)}
        result = function(*args, **(kwargs or {}))
        self.collectives += function.namespace == "c10d"
        for tensor in filter(_is_stored, tree_leaves(result)):
            pointer, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            if pointer in self.live or pointer not in given:  # else a view of what was there before
                self.live[pointer] = (size, self.live.get(pointer, (size, 0))[1] + 1)
                weakref.finalize(tensor, self._drop, pointer)
                self.largest = max(self.largest, size)
        self.peak = max(self.peak, sum(size for size, _ in self.live.values()))
        return result


def allocations(case: Case, least_chunk: int) -> tuple[int, int, int]:
    problem = Problem(case)
    hidden, weight = problem.hidden.clone().requires_grad_(), part(problem.weight).clone().requires_grad_()
    with (
        mock.patch.object(passes, "CACHED_ENTRIES", weight.shape[0]),
        mock.patch.object(loss, "LEAST_CHUNK", least_chunk),
        Allocations() as seen,
    ):
        run(problem, weight, hidden)
    return seen.largest, seen.peak, seen.collectives


@pytest.mark.skipif(test_device() != "cpu", reason="counts the CPU's buffers and operations")
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("teacher", [False, True])
def test_memory_does_not_grow_with_logits_and_one_collective_a_chunk(tensor_parallel: int, teacher: bool) -> None:
    """Twice the tokens may add hidden-sized buffers alone: at most 40 bytes a token and hidden dimension, where one
    more fp32 copy of the logits would add 4 * 4096 / TP."""
    case = Case(
        vocab_size=4096,
        rows=4096,
        hidden_size=8,
        teacher_hidden_size=8,
        batch=1,
        sequence=128,
        chunk_size=16,
        teacher=teacher,
        kd_weight=0.5 if teacher else 0.0,
    )
    shard = 4096 // tensor_parallel
    halves = 2 if tensor_parallel == 2 and teacher else 1  # of a chunk, which are no reason to hold more
    least = 8 if halves == 2 else LEAST_CHUNK
    short = run_on_ranks(allocations, tensor_parallel, case, least)
    long = run_on_ranks(allocations, tensor_parallel, replace(case, sequence=256), least)
    buffers = (2 if teacher else 1) * 4 * 16 * shard
    for (_, peak, _), (long_largest, long_peak, long_collectives) in zip(short, long, strict=True):
        assert long_largest <= buffers
        assert long_peak - peak <= 128 * 8 * 40 < 128 * 4 * shard
        # The buffers, temporaries of the one row that is worked on, the head's gradient (twice: a copy on its way to
        # autograd), and hidden-sized odds and ends.
        assert long_peak <= buffers + 4 * 4 * shard + 2 * 4 * shard * 8 + 256 * 8 * 40
        # One for each of 16 chunks or their halves, and the sum of the hidden states' gradient over the ranks.
        assert long_collectives == (0 if tensor_parallel == 1 else 16 * halves + 1)
