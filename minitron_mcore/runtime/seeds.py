"""Every generator from one seed."""

from __future__ import annotations

import random

import numpy
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and Megatron's tensor-parallel generators (model-parallel groups must exist)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
