"""The lookup's gradient, where Megatron's DDP keeps one and where it does not, against sums over rows in float64."""

from __future__ import annotations

import pytest
import torch

from minitron_mcore.model.embedding import look_up

IDS = torch.tensor([[3, 0, 3], [7, 3, 0]])  # some several times, some never
ROWS, WIDTH = 9, 5


def sums_over_rows(gradients: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for gradient in gradients:
        for row, part in zip(IDS.flatten().tolist(), gradient.flatten(0, 1).double(), strict=True):
            total[row] += part
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffered", [True, False])
def test_gradients_of_microbatches_add_up(dtype: torch.dtype, buffered: bool) -> None:
    """In the buffer in fp32 whatever the weights' type; without one in the weights' type, as torch's own does."""
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    before = torch.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH)
    if buffered:
        weight.main_grad = before.clone()  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(2)
    # Sequence first, as the model has them when backward comes: its transpose is not contiguous.
    gradients = [torch.randn(3, 2, WIDTH, generator=generator).to(dtype) for _ in range(2)]
    for gradient in gradients:
        output = look_up(IDS, weight)
        assert torch.equal(output, weight[IDS])
        output.transpose(0, 1).backward(gradient)
    expected = sums_over_rows([gradient.transpose(0, 1) for gradient in gradients])
    if buffered:
        assert weight.grad is None
        torch.testing.assert_close(weight.main_grad.double(), expected + before, rtol=1e-6, atol=1e-6)  # type: ignore[attr-defined]
    else:
        assert weight.grad is not None and weight.grad.dtype == dtype
        rounding = 1e-6 if dtype == torch.float32 else 2e-2  # of a sum of six numbers, a few times over
        torch.testing.assert_close(weight.grad.double(), expected, rtol=rounding, atol=rounding)


def test_a_frozen_embedding_gets_no_gradient() -> None:
    weight = torch.randn(ROWS, WIDTH)
    weight.main_grad = torch.zeros(ROWS, WIDTH)  # type: ignore[attr-defined]
    scale = torch.ones(WIDTH, requires_grad=True)
    (look_up(IDS, weight) * scale).sum().backward()
    assert scale.grad is not None and not weight.main_grad.any()  # type: ignore[attr-defined]
