"""What the logit loss refuses, and what may become of its gradient after the sweep. One process, no group."""

from typing import Any

import pytest
import torch

from minitron_mcore.distillation.logits.loss import LogitLossOutput, Model, logit_loss
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.logits.sparse_target import SparseTarget


def call(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    vocab_size: int = 8,
    teacher: Model | SparseTarget | None = None,
    **settings: Any,
) -> LogitLossOutput:
    return logit_loss(
        hidden, weight, labels, mask, LossSettings(vocab_size, **settings), tp_group=None, teacher=teacher
    )


def test_wrong_arguments_are_named() -> None:
    hidden, weight = torch.zeros(2, 1, 4), torch.zeros(8, 4)
    labels, mask = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    for changes, message in (
        ({"vocab_size": 9}, "rows of the output head=8 must be at least vocab_size=9"),
        ({"kd_weight": 1.0}, "kd_weight=1.0 must be 0 without a teacher"),
        ({"teacher": Model(hidden, torch.zeros(9, 4))}, "=9 are not the student's 8: both models need one padded"),
    ):
        with pytest.raises(ValueError, match=message):
            call(hidden, weight, labels, mask, **changes)
    with pytest.raises(ValueError, match="must agree"):
        call(hidden, weight, labels.T, mask)


def test_second_backward_is_refused() -> None:
    hidden = torch.ones(2, 1, 4, requires_grad=True)
    output = logit_loss(
        hidden,
        torch.zeros(8, 4),
        torch.zeros(2, 1, dtype=torch.long),
        torch.ones(2, 1),
        LossSettings(vocab_size=8, lm_weight=1.0),
        tp_group=None,
    )
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        output.loss.backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_factor_of_a_loss_whose_gradient_is_in_main_grad_already(recompute: bool) -> None:
    """1 or nothing, unless the sweep waits for backward: and then main_grad holds the gradient times the factor."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 1, 4, requires_grad=True)
    gradients = []
    for factor, in_buffer in ((0.5, True), (0.5, False)):
        weight = torch.ones(8, 4, requires_grad=True)
        if in_buffer:
            weight.main_grad = torch.zeros(8, 4)  # type: ignore[attr-defined]
        output = logit_loss(
            hidden,
            weight,
            torch.zeros(2, 1, dtype=torch.long),
            torch.ones(2, 1),
            LossSettings(vocab_size=8, lm_weight=1.0, recompute=recompute),
            tp_group=None,
        )
        if in_buffer and not recompute:
            with pytest.raises(RuntimeError, match="factor 1"):
                (factor * output.loss).backward()
            return
        (factor * output.loss).backward()
        assert (weight.grad is None) == in_buffer
        gradients.append(weight.main_grad if in_buffer else weight.grad)  # type: ignore[attr-defined]
    torch.testing.assert_close(*gradients)
