"""A second opinion on the logit loss: NVIDIA ModelOpt's `LogitsKLLoss`, values and gradients, at TP 1 and 2.

At TP > 1 each of its ranks gives its own shard's part of the value, to be added up, and a gradient in its own logits.
"""

import itertools
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.distributed.logit_loss_problem import Case, Problem, part, relative, run
from tests.distributed.ranks import run_on_ranks

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")

# Both sides compute in fp32; measured at most 1e-6.
TOLERANCE = 1e-5


def second_opinion(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient of hidden states (whole), gradient of this rank's part of the head."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
    from megatron.core.transformer import TransformerConfig
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    case = problem.case
    config: Any = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=4, tensor_model_parallel_size=dist.get_world_size()
    )
    loss = LogitsKLLoss(config, temperature=case.temperature, reverse=case.divergence == "reverse_kl")
    hidden = problem.hidden.clone().requires_grad_()
    weight = part(problem.weight).clone().requires_grad_()
    student = copy_to_tensor_model_parallel_region(hidden, group=dist.group.WORLD) @ weight.T
    teacher = problem.teacher_hidden @ part(problem.teacher_weight).T
    by_token = loss(student, teacher)[0].transpose(0, 1)
    # It leaves out the factor temperature squared.
    value = case.kd_weight * case.temperature**2 * (by_token * problem.mask).sum()
    (case.scale * value).backward()
    assert hidden.grad is not None and weight.grad is not None
    value = value.detach()
    dist.all_reduce(value)
    return value, hidden.grad, weight.grad


def disagreements(cases: list[Case]) -> list[list[float]]:
    found = []
    for case in cases:
        problem = Problem(case)
        hidden, weight = problem.hidden.clone().requires_grad_(), part(problem.weight).clone().requires_grad_()
        value = run(problem, weight, hidden).loss.detach()
        assert hidden.grad is not None and weight.grad is not None
        mine = (value, hidden.grad, weight.grad)
        found.append([relative(a, b) for a, b in zip(mine, second_opinion(problem), strict=True)])
    return found


# At one rank the loss is compared with dense float64 too, in test_logit_loss.py.
@pytest.mark.parametrize("tensor_parallel", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_modelopt_agrees(tensor_parallel: int) -> None:
    cases = [
        Case(
            divergence=name,
            temperature=temperature,
            mask=mask,
            lm_weight=0.0,
            kd_weight=0.7,
            teacher=True,
            vocab_size=48,  # it knows nothing of padding
            chunk_size=7,
        )
        for name, temperature, mask in itertools.product(
            ("forward_kl", "reverse_kl"), (1.0, 2.0), ("ones", "fractions")
        )
    ]
    for results in run_on_ranks(disagreements, tensor_parallel, cases):
        for case, errors in zip(cases, results, strict=True):
            assert max(errors) <= TOLERANCE, (errors, case)
