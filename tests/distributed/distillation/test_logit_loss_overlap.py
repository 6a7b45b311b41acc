"""What runs between the start of a collective of the logit loss and the wait for it, as each rank calls it."""

from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.distillation.logits import loss
from minitron_mcore.model import vocab_parallel
from tests.distributed.logit_loss_problem import Case, Problem, part, run
from tests.distributed.ranks import run_on_ranks


def calls(case: Case) -> list[str]:
    """In order: a model's logits of how many tokens, a product with their gradient, a collective's start and wait."""
    problem, seen = Problem(case), list[str]()
    hidden, weight = problem.hidden.clone().requires_grad_(), part(problem.weight).clone().requires_grad_()

    class Work:
        def __init__(self, work: Any) -> None:
            self.work, self.number = work, sum("start" in call for call in seen)

        def wait(self) -> None:
            seen.append(f"wait {self.number}")
            self.work.wait()

    def gather(out: Tensor, sent: Tensor, *, group: Any, async_op: bool) -> Work:
        assert async_op
        work = Work(start(out, sent, group=group, async_op=True))
        seen.append(f"start {work.number}")
        return work

    def product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
        model = models.get(left.shape[1])
        seen.append(f"{model} {len(out)}" if model else "gradient")
        return multiply(out, left, right)

    models = {case.hidden_size: "student", case.teacher_hidden_size: "teacher"}  # neither is a shard's width
    start, multiply = dist.all_gather_into_tensor, vocab_parallel.product_
    with (
        mock.patch.object(loss, "LEAST_CHUNK", 4),
        mock.patch.object(vocab_parallel.dist, "all_gather_into_tensor", gather),
        mock.patch.object(loss, "product_", product),
    ):
        run(problem, weight, hidden)
    return seen


ONE_GATHER = """
student 4, teacher 4, start 0, student 4, teacher 4, start 1, wait 0, student 4, wait 1, gradient,
teacher 4, start 2, student 4, teacher 4, start 3, wait 2, student 3, wait 3, gradient,
teacher 3, start 4, student 2, teacher 2, start 5, wait 4, wait 5, gradient
"""
TWO_GATHERS = """
student 4, teacher 4, start 0, student 4, teacher 4, start 1, wait 0, start 2, wait 1, start 3, wait 2, student 4,
wait 3, gradient,
teacher 4, start 4, student 4, teacher 4, start 5, wait 4, start 6, wait 5, start 7, wait 6, student 3,
wait 7, gradient,
teacher 3, start 8, student 2, teacher 2, start 9, wait 8, start 10, wait 9, start 11, wait 10, wait 11, gradient
"""
NO_TEACHER = """
student 4, start 0, student 4, start 1, wait 0, wait 1, gradient,
student 4, start 2, student 4, start 3, wait 2, wait 3, gradient,
student 3, start 4, student 2, start 5, wait 4, wait 5, gradient
"""
# Chunks that are too small to be halved.
WHOLE = """
student 7, teacher 7, start 0, wait 0, gradient, student 7, teacher 7, start 1, wait 1, gradient,
student 7, teacher 7, start 2, wait 2, gradient
"""


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        (ONE_GATHER, {}),
        (ONE_GATHER, {"divergence": "reverse_kl"}),
        (TWO_GATHERS, {"divergence": "jensen_shannon"}),
        (TWO_GATHERS, {"top_k": 5}),
        (NO_TEACHER, {"teacher": False, "kd_weight": 0.0}),
        (WHOLE, {"chunk_size": 7}),
    ],
)
def test_a_collective_runs_beside_the_next_products(expected: str, changes: dict[str, Any]) -> None:
    """Each first half's beside the second's logits of both models, each second half's beside the student's logits of
    the next chunk's first half; the same on every rank."""
    tokens = {"sequence": 21, "batch": 1, "chunk_size": 8}
    case = Case(**{"teacher": True, "kd_weight": 0.5, "teacher_hidden_size": 20} | tokens | changes)  # type: ignore
    words = [word.strip() for word in expected.strip().split(",")]
    for seen in run_on_ranks(calls, 2, case):
        assert seen == words
