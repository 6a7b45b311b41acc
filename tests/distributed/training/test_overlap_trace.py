"""What torch's profiler sees of a step: gradients that are reduced before the last backward pass has ended."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.distributed.models import global_batch, my_batch, start_layout, steady, tiny
from tests.distributed.ranks import run_on_ranks

REDUCTION = "c10d::reduce_scatter_tensor_coalesced_"
NODE = "autograd::engine::evaluate_function"


def trace_on_rank(overlapped: bool) -> tuple[list[float], float]:
    """Of a third step: when reductions start, and when the last node of a backward pass has ended, in microseconds."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.overlap import finish_gathering
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, train_step

    layout, architecture = start_layout({}, 2), tiny("llama", num_layers=2)
    models = build_model(architecture, layout, "fp32")
    initialize(models, architecture, seed=1)
    keys: dict[str, Any] = {"overlap_grad_reduce": overlapped, "overlap_param_gather": overlapped}
    train = TrainConfig(global_batch_size=8, micro_batch_size=2, ddp_bucket_size=5000 if overlapped else None, **keys)
    timetable = steady(train, 3)
    trained = Trained.of(models, train, timetable)
    objective = Objective(LossSettings(architecture.vocab_size))

    def step(number: int) -> None:
        train_step(trained, objective, timetable.at(number).shape, my_batch(global_batch(1003, seed=number)))

    step(0)
    step(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        step(2)
        # gloo's threads must be done: the profiler may crash where one still records as it ends.
        finish_gathering(trained.chunks)
        torch.distributed.barrier()
        time.sleep(0.2)
    events = trace.events()
    assert events is not None
    starts = [event.time_range.start for event in events if event.name == REDUCTION]
    return starts, max(event.time_range.end for event in events if event.name.startswith(NODE))


@pytest.mark.slow  # since the profiler, at worst, takes the worker with it
def test_a_trace_shows_reductions_under_backward() -> None:
    for overlapped in (False, True):
        for starts, end in run_on_ranks(trace_on_rank, 2, overlapped):
            early = sum(start < end for start in starts)
            assert early > len(starts) // 2 > 1 if overlapped else not early and len(starts) == 1
