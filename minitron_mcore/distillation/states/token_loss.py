"""Losses between a state of the student and one of the teacher: functions of tensors, without a model or a hook.

For a token with student state x, lifted by the projection where the widths differ, and teacher state y, of h channels:

    mse       |x - y|² / h
    cosine    1 - x·y / (|x| |y|)

Attention relations are in relation.py. Legend: s sequence, b batch, h channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# (student's state, teacher's) -> each token's loss [s, b] and its gradient in the student's state, fp32.
TokenLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# A relative loss below this is weighed as if it were this. The gradient of a loss r goes as sqrt(r), hence under the
# papers' weight as 1 / sqrt(r): at this r it is 10 times what it is where states have nothing in common, and below it
# less again. Rounding lies far below: of bf16 2^-9 of a number at most, 3e-6 as the relative square of two states'
# difference, and perhaps 1e-4 after many layers.
LEAST_DIFFERENCE = 1e-2
_LEAST_NORM = 1e-20


def token_mse(state_SBH: Tensor, target_SBH: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over channels of the squared difference, [s, b], and its gradient in the state, [s, b, h]; fp32."""
    change_SBH = state_SBH.float() - target_SBH.float()
    loss_SB = change_SBH.square().mean(-1)
    return loss_SB, change_SBH.mul_(2 / change_SBH.shape[-1])


def token_cosine(state_SBH: Tensor, target_SBH: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine, [s, b], and its gradient in the state, [s, b, h]; fp32.

    As half the squared distance of the unit vectors, which keeps its digits near 0.
    """
    state_SBH, target_SBH = state_SBH.float(), target_SBH.float()
    norm_SB1 = torch.linalg.vector_norm(state_SBH, dim=-1, keepdim=True).clamp_min(_LEAST_NORM)
    unit_SBH = state_SBH / norm_SB1
    change_SBH = unit_SBH - torch.nn.functional.normalize(target_SBH, dim=-1, eps=_LEAST_NORM)
    loss_SB = 0.5 * change_SBH.square().sum(-1)
    along_SB1 = (unit_SBH * change_SBH).sum(-1, keepdim=True)
    return loss_SB, change_SBH.addcmul_(unit_SBH, along_SB1, value=-1).div_(norm_SB1)


TOKEN_LOSSES = {"mse": token_mse, "cosine": token_cosine}


def dynamic_weight(weight: float, logits: float, states: float, size: float) -> float:
    """weight * L_logits / L_states (arXiv 2407.14679, section 3), with L_states taken as LEAST_DIFFERENCE * size at
    least: 0 <= alpha <= weight * L_logits / (LEAST_DIFFERENCE * size), and alpha * L_states <= weight * L_logits.

    All are means over the counted tokens; `size` is the losses' scale, see StateLosses. Rounding may leave a loss of
    equal models a little below 0.
    """
    weighed = max(states, LEAST_DIFFERENCE * size)
    return weight * max(logits, 0.0) / weighed if weighed > 0 else 0.0


def masked_sum(state_SBH: Tensor, target_SBH: Tensor, mask_SB: Tensor, token_loss: TokenLoss) -> Tensor:
    """The tokens' losses, each times its mask, added up: fp32, differentiable in the state."""

    def work(state_SBH: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
        loss_SB, gradient_SBH = token_loss(state_SBH, target_SBH)
        return torch.dot(loss_SB.flatten(), mask_SB.flatten()), gradient_SBH.mul_(mask_SB.unsqueeze(-1))

    return WithGradient.apply(state_SBH, work)


class WithGradient(torch.autograd.Function):
    """The loss of a state whose gradient is worked out with it: `work(state, whether the gradient is wanted)` -> both.

    Keeps for backward the gradient alone, in the state's type; autograd would keep several fp32 tensors."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, work: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]) -> Tensor:
        loss, gradient = work(state, ctx.needs_input_grad[0])
        if ctx.needs_input_grad[0] and gradient is not None:
            ctx.save_for_backward(gradient.to(state.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss).to(gradient.dtype), None
