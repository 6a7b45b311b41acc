"""What is overlapped: by default everything on CUDA and nothing on the CPU; a key that is given counts on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minitron_mcore.errors import InputError
from minitron_mcore.training.config import TrainConfig


@pytest.mark.parametrize(
    ("on_cuda", "keys", "expected"),
    [
        (True, {}, (True, True, None)),
        (False, {}, (False, False, None)),
        (True, {"overlap_param_gather": False, "ddp_bucket_size": 7}, (True, False, 7)),
        (True, {"overlap_grad_reduce": False}, (False, False, None)),
        (False, {"overlap_grad_reduce": True}, (True, False, None)),
        (False, {"overlap_param_gather": True}, (True, True, None)),
    ],
)
def test_default_is_by_device(
    on_cuda: bool, keys: dict[str, Any], expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minitron_mcore.training.step import overlap_of

    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    assert overlap_of(TrainConfig(**keys)) == expected


def test_a_bucket_size_without_buckets_is_refused() -> None:
    with pytest.raises(InputError, match="ddp_bucket_size=7 has no effect with overlap_grad_reduce=false"):
        TrainConfig(overlap_grad_reduce=False, ddp_bucket_size=7)
