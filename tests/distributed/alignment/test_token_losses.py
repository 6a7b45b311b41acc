"""Each token's loss, and the gradients of a sum with any weights, against log_softmax and autograd in float64.

fp32 rounding: as in test_logit_loss.py, whose sweep it is. Weights may be negative, as those of a rejected answer are.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from minitron_mcore.alignment.token_losses import token_losses
from minitron_mcore.distillation.logits.settings import LossSettings
from tests.distributed.distillation.test_logit_loss import BF16_TOLERANCE, TOLERANCE
from tests.distributed.logit_loss_problem import Case, Problem, part, relative
from tests.distributed.ranks import run_on_ranks


def errors(case: Case, into_main_grad: bool) -> dict[str, float]:
    """Relative errors of losses and of both gradients; the head's in `main_grad`, on top of what was there, or not."""
    problem = Problem(case)
    counted = problem.mask > 0
    weights = torch.randn(counted.shape, generator=torch.Generator().manual_seed(8)).to(counted.device)
    hidden = (part(problem.hidden) if case.sequence_parallel else problem.hidden).clone().requires_grad_()
    weight = part(problem.weight).clone().requires_grad_()
    if into_main_grad:
        weight.main_grad = torch.ones_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    losses = token_losses(
        hidden,
        weight,
        problem.labels,
        counted,
        LossSettings(case.vocab_size, chunk_tokens=case.chunk_size),
        tp_group=dist.group.WORLD,
        sequence_parallel=case.sequence_parallel,
    )
    assert losses.dtype == torch.float32
    # A loss that is no weighted sum: each token's weight is known after all of them.
    (case.scale * (weights * losses.double().square()).sum()).backward()
    assert hidden.grad is not None
    head = weight.main_grad - 1.0 if into_main_grad else weight.grad  # type: ignore[attr-defined]
    assert head is not None and (weight.grad is None) == into_main_grad

    exact_hidden, exact_weight = problem.hidden.double().requires_grad_(), problem.weight.double().requires_grad_()
    logits = (exact_hidden @ exact_weight.T)[..., : case.vocab_size]
    labels = problem.labels.clamp(min=0).unsqueeze(-1)
    exact = -logits.log_softmax(-1).gather(-1, labels).squeeze(-1) * counted
    (case.scale * (weights * exact.square()).sum()).backward()
    assert exact_hidden.grad is not None and exact_weight.grad is not None
    return {
        "losses": relative(losses.detach(), exact.detach()),
        "hidden": relative(hidden.grad, part(exact_hidden.grad) if case.sequence_parallel else exact_hidden.grad),
        "weight": relative(head, part(exact_weight.grad)),
    }


def worst(cases: list[Case]) -> dict[str, float]:
    found: dict[str, float] = {}
    for number, case in enumerate(cases):
        for name, error in errors(case, into_main_grad=number % 3 == 1).items():
            found[name] = max(found.get(name, 0.0), error)
    return found


def cases() -> list[Case]:
    grid = itertools.product(("ones", "zeros"), (False, True), ((48, 512), (37, 7), (33, 5)))
    drawn = [
        Case(mask=mask, sequence_parallel=split, vocab_size=vocab_size, chunk_size=chunk, seed=number)
        for number, (mask, split, (vocab_size, chunk)) in enumerate(grid)
    ]
    return [*drawn, replace(drawn[-1], chunk_size=None)]


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_against_float64(tensor_parallel: int) -> None:
    for found in run_on_ranks(worst, tensor_parallel, cases()):
        assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_bf16(tensor_parallel: int) -> None:
    for found in run_on_ranks(worst, tensor_parallel, [replace(case, dtype=torch.bfloat16) for case in cases()[::2]]):
        assert found["losses"] <= TOLERANCE and max(found.values()) <= BF16_TOLERANCE, found


def nothing_counts(case: Case) -> tuple[float, float, float]:
    problem = Problem(case)
    hidden, weight = problem.hidden.clone().requires_grad_(), part(problem.weight).clone().requires_grad_()
    none = torch.zeros_like(problem.mask, dtype=torch.bool)
    labels, settings = torch.full_like(problem.labels, -100), LossSettings(case.vocab_size)
    losses = token_losses(hidden, weight, labels, none, settings, tp_group=dist.group.WORLD)
    losses.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    with torch.no_grad():
        assert not token_losses(hidden, weight, labels, none, settings, tp_group=dist.group.WORLD).requires_grad
    return float(losses.detach().abs().max()), float(hidden.grad.abs().max()), float(weight.grad.abs().max())


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_no_token_counts(tensor_parallel: int) -> None:
    """As on a context-parallel rank whose part is padding."""
    assert run_on_ranks(nothing_counts, tensor_parallel, Case()) == [(0.0, 0.0, 0.0)] * tensor_parallel
