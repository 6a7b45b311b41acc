"""The parts of a layer that are not products, against their formulas in float64, and what they keep for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minitron_mcore.model.elementwise import packed_rotary, rms_norm, rotary, swiglu

S, B, HEADS, WIDTH = 6, 3, 4, 20
# Rounding of the type, a few times over.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 5e-3}


def norm_in_float64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight


def gate_in_float64(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def turn_in_float64(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """As complex numbers."""
    half = angles.shape[-1] // 2
    numbers = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(
        torch.ones_like(angles[..., :half]), angles[..., :half]
    )
    return torch.cat((numbers.real, numbers.imag, x[..., 2 * half :]), -1)


def angles_of(width: int, length: int = S) -> torch.Tensor:
    """[s, 1, 1, width]"""
    steps = torch.outer(torch.arange(length).float(), 7.0 ** -torch.arange(0, 1, 2 / width))
    return torch.cat((steps, steps), -1)[:, None, None]


def heads(dtype: torch.dtype) -> torch.Tensor:
    """[s, b, n, d], not contiguous: as keys come out of the fused projection."""
    whole = torch.randn(S, B, HEADS, 2 * WIDTH, generator=torch.Generator().manual_seed(1))
    return whole.to(dtype)[..., WIDTH:]


CASES: dict[
    str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], Callable[[torch.dtype], list[Any]]]
] = {
    "norm": (
        lambda x, weight: rms_norm(x, weight, 1e-3),
        norm_in_float64,
        lambda dtype: [heads(dtype), torch.linspace(-1, 2, WIDTH).to(dtype)],
    ),
    "gate": (swiglu, gate_in_float64, lambda dtype: [3 * heads(dtype)]),
    "rotation": (rotary, turn_in_float64, lambda dtype: [heads(dtype), angles_of(WIDTH)]),
    "half of the channels turned": (rotary, turn_in_float64, lambda dtype: [heads(dtype), angles_of(WIDTH // 2)]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    ours, formula, inputs = CASES[name]
    given = inputs(dtype)
    trained = [tensor for tensor in given if tensor.dtype == dtype and tensor.shape[1:3] != (1, 1)]
    for tensor in trained:
        tensor.requires_grad_()
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    output, expected = ours(*given), formula(*wide)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert output.dtype == dtype
    output.backward(gradient)
    expected.backward(gradient.double())
    pairs = [(output, expected), *((tensor.grad, other.grad) for tensor, other in zip(trained, wide, strict=False))]
    for actual, exact in pairs:
        assert actual is not None and exact is not None
        assert (actual.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


def test_packed_segments_turn_from_their_own_beginnings() -> None:
    x, angles = torch.randn(7, HEADS, WIDTH), angles_of(WIDTH, length=5)
    turned = packed_rotary(x, torch.tensor([0, 2, 7]), angles, cp_size=1, cp_rank=0)
    for start, end in ((0, 2), (2, 7)):
        alone = turn_in_float64(x[start:end, None].double(), angles[: end - start].double())
        torch.testing.assert_close(turned[start:end, None].double(), alone, rtol=0, atol=1e-6)


def test_a_frozen_input_gets_no_gradient() -> None:
    x, weight = torch.randn(2, 8), torch.ones(8, requires_grad=True)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is None and weight.grad is not None


def test_only_inputs_are_kept() -> None:
    kept: list[torch.Tensor] = []
    x, weight, both = torch.randn(4, 8, requires_grad=True), torch.ones(8), torch.randn(4, 8, requires_grad=True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rms_norm(x, weight, 1e-5)
        swiglu(both)
        rotary(torch.randn(4, 1, 2, 8, requires_grad=True), angles_of(8, length=4))
    assert [tuple(tensor.shape) for tensor in kept] == [(4, 8), (8,), (4, 1), (4, 8), (4, 1, 1, 8), (4, 1, 1, 8)]
