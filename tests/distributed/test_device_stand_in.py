"""The stand-in of a GPU: it refuses what CUDA and NCCL would, and the distillation engine passes under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.distillation.test_engine import LOSS, checkpoints, distil_on_rank
from tests.distributed.ranks import run_on_ranks

__all__ = ["checkpoints"]  # the fixture


def here(*size: int) -> torch.Tensor:
    return torch.ones(*size, device=torch.cuda.current_device())


MISTAKES: dict[str, Callable[[], Any]] = {
    "a mask made without a device": lambda: here(2, 2).masked_fill(torch.ones(2, 2, dtype=torch.bool), 0.0),
    "a product with a weight of the host": lambda: here(2, 2) @ torch.ones(2, 2),
    "a lookup of the host's ids": lambda: torch.nn.functional.embedding(torch.zeros(3, dtype=torch.int64), here(4, 2)),
    "positions of the host": lambda: here(4) + torch.arange(4),
    "a sum in the host's memory": lambda: torch.zeros(3).add_(here(3)),
    "a gather by the host's columns": lambda: here(2, 3).gather(1, torch.zeros(2, 1, dtype=torch.int64)),
    "numbers of the host in a list": lambda: torch.stack([here(()), torch.zeros(())]),  # type: ignore[arg-type]
    "numpy without a copy": lambda: here(2).exp().numpy(),
    "a generator of the CPU": lambda: here(2).normal_(generator=torch.Generator()),
    "a collective of the host's memory": lambda: torch.distributed.all_reduce(torch.ones(2)),
    "a backward pass into the host": lambda: ((here(2).requires_grad_() * here(2)).backward(torch.ones(2)),),
}
RIGHT: dict[str, Callable[[], Any]] = {
    "a single number of the host": lambda: here(2) * torch.tensor(2.0),
    "moved": lambda: here(2) + torch.arange(2).to(torch.cuda.current_device()),
    "copied into": lambda: here(2).copy_(torch.zeros(2)),
    "like another": lambda: here(2) + torch.zeros_like(here(2)) + here(3).new_ones(2),
    "the host's indices": lambda: here(3)[torch.tensor([0, 2])],
    "fetched": lambda: (here(2).cpu() + torch.ones(2)).numpy(),
    "a device of another tensor": lambda: here(2) + torch.arange(2, device=here(1).device),
    "reduced": lambda: torch.distributed.all_reduce(here(2)),
    "objects": lambda: torch.distributed.all_gather_object([None], "any"),
}


def refusals_on_rank(names: list[str], right: bool) -> dict[str, str]:
    """What each raised; of what went through nothing."""
    raised = {}
    for name in names:
        try:
            (RIGHT if right else MISTAKES)[name]()
        except Exception as error:
            raised[name] = type(error).__name__
    return raised


def test_mixed_devices_are_refused() -> None:
    (raised,) = run_on_ranks(refusals_on_rank, 1, list(MISTAKES), False, device="stand-in")
    assert {name: raised.get(name) for name in MISTAKES} == dict.fromkeys(MISTAKES, "MixedDevicesError")


def test_what_cuda_takes_is_not() -> None:
    (raised,) = run_on_ranks(refusals_on_rank, 1, list(RIGHT), True, device="stand-in")
    assert raised == {}


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"placement": "offloaded", "window": 1},
        {"cached": True, "recompute": True},
    ],
    ids=["bf16", "offloaded", "cached"],
)
def test_the_engine_keeps_to_the_device(options: dict[str, Any], checkpoints: str) -> None:
    """Two steps; the first one's losses are the CPU's (2e-3 in bf16, rounded otherwise)."""
    runs = [
        run_on_ranks(distil_on_rank, 1, {}, 1, checkpoints, options, LOSS, 2, device=device)[0]["history"]
        for device in ("stand-in", "cpu")
    ]
    for name in ("lm loss", "logits distillation loss"):
        assert runs[0][0][name] == pytest.approx(runs[1][0][name], rel=2e-3), name
