"""RMSNorm, the gated activation and the rotation in few passes over memory, and with little kept for backward.

Torch's `rms_norm` is one kernel on CUDA. On the CPU it is a dozen elementwise operations, and keeps the normed input
beside the input: of a step on narrow models it took a sixth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean of x² over the last axis + epsilon) * weight, in x's type, worked out in fp32.

    x [..., h], weight [h], both of one type. Kept for backward are x and one fp32 number a row.
    """
    if x.is_cuda:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)
    return _RMSNorm.apply(x, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean x² + epsilon), g the gradient of the output and w the weight, the gradients are

    in x: r g w - x r³ (g x . w) / h        in w: sum over rows of r (g x)

    so that one product g x serves both, by two products with a vector.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        width, wanted = x.shape[-1], ctx.needs_input_grad
        wide = weight.float()
        both_Nh, inverse_N = (gradient.float() * x).reshape(-1, width), inverse.flatten()
        in_x = in_weight = None
        if wanted[1]:
            in_weight = torch.mv(both_Nh.t(), inverse_N).to(weight.dtype)
        if wanted[0]:
            factor_N = torch.mv(both_Nh, wide).mul_(inverse_N.pow(3)).div_(width)
            in_x = (gradient * wide).mul_(inverse).addcmul_(x, factor_N.view_as(inverse), value=-1.0).to(x.dtype)
        return in_x, in_weight, None


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up, [..., f], of the two halves of `both` [..., 2 f], which alone is kept for backward."""
    return _SwiGLU.apply(both)


class _SwiGLU(torch.autograd.Function):
    """The gradient of both halves is written where it belongs."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        in_both = torch.empty_like(both)
        in_gate, in_up = in_both.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), gradient, out=in_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=in_gate)
        return in_both


def rotary(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """x [s, b, n, d] with its first r <= d channels turned by `angles`, fp32 [s, 1, 1, r], which has each angle twice:
    channels c and c + r / 2 are a number's real and imaginary part. Takes the arguments of Transformer Engine's kernel.
    """
    assert not interleaved, "no family here has real and imaginary parts side by side"
    return _Rotary.apply(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def packed_rotary(x: Tensor, boundaries: Tensor, angles: Tensor, **others: Any) -> Tensor:
    """The same of packed segments x [t, n, d], each from its own beginning on; segments are never cut over ranks."""
    lengths = boundaries.diff().tolist()
    return rotary(x.unsqueeze(1), torch.cat([angles[:length] for length in lengths])).squeeze(1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        return _turned(gradient, cosine, -sine), None, None


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    width = cosine.shape[-1]
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x[..., :width], cosine, out=turned[..., :width])
    turned[..., width:] = x[..., width:]
    for start, other, sign in ((0, width // 2, -1.0), (width // 2, 0, 1.0)):
        here, there = slice(start, start + width // 2), slice(other, other + width // 2)
        turned[..., here].addcmul_(x[..., there], sine[..., here], value=sign)
    return turned
