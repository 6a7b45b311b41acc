"""What the logit loss refuses, and what may become of its gradient after the sweep. One process, no group."""

import pytest
import torch

from minitron_mcore.distillation.logits.loss import logit_loss


def test_wrong_arguments_are_named() -> None:
    hidden, weight = torch.zeros(2, 1, 4), torch.zeros(8, 4)
    labels, mask = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    settings: dict = {"vocab_size": 8, "tp_group": None, "lm_weight": 1.0}
    for changes, message in (
        ({"vocab_size": 9}, "8 rows"),
        ({"kd_weight": 1.0}, "without a teacher"),
        ({"teacher_hidden_SBH": hidden}, "go together"),
        ({"teacher_hidden_SBH": hidden, "teacher_weight_VH": torch.zeros(9, 4)}, "padded vocabulary"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            logit_loss(hidden, weight, labels, mask, **(settings | changes))
    with pytest.raises(ValueError, match="must agree"):
        logit_loss(hidden, weight, labels.T, mask, **settings)


def test_second_backward_is_refused() -> None:
    hidden = torch.ones(2, 1, 4, requires_grad=True)
    output = logit_loss(
        hidden,
        torch.zeros(8, 4),
        torch.zeros(2, 1, dtype=torch.long),
        torch.ones(2, 1),
        vocab_size=8,
        tp_group=None,
        lm_weight=1.0,
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
            vocab_size=8,
            tp_group=None,
            lm_weight=1.0,
            recompute=recompute,
        )
        if in_buffer and not recompute:
            with pytest.raises(RuntimeError, match="factor 1"):
                (factor * output.loss).backward()
            return
        (factor * output.loss).backward()
        assert (weight.grad is None) == in_buffer
        gradients.append(weight.main_grad if in_buffer else weight.grad)  # type: ignore[attr-defined]
    torch.testing.assert_close(*gradients)
