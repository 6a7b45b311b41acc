"""How often a training step makes the host wait for the device: once, for the losses, besides Megatron's own wait for
the gradient norm, under which the ranks tell each other of signals and saves."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch

from tests.distributed.models import LAYOUTS, global_batch, my_batch, start_layout, steady
from tests.distributed.ranks import run_on_ranks
from tests.distributed.state_loss_problem import CASES, build


def waits_on_rank(parallel: dict[str, Any], world_size: int) -> list[str]:
    """Where a second step of a distillation with losses between inner states reads a number of the device, or sends
    objects."""
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.signals import StopRequest
    from minitron_mcore.training.step import Trained, train_step

    layout = start_layout(parallel, world_size)
    train = TrainConfig(lr=1e-3, min_lr=1e-4, global_batch_size=8, micro_batch_size=2)
    timetable = steady(train, 2)
    models, objective = build(CASES["all-dynamic"], layout)
    trained = Trained.of(models, train, timetable)
    found: list[str] = []
    stop = StopRequest()

    def noted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def read(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            if "minitron_mcore" in caller.f_code.co_filename and "cpu_adapter" not in caller.f_code.co_filename:
                found.append(f"{name} in {caller.f_code.co_name}")
            return original(*args, **kwargs)

        patch.setattr(owner, name, read)

    with pytest.MonkeyPatch.context() as patch:
        for step in range(2):
            batch = my_batch(global_batch(1003, seed=step))
            if step == 1:
                for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy"):
                    noted(torch.Tensor, name)
                for name in ("broadcast_object_list", "all_gather_object"):
                    noted(torch.distributed, name)
            train_step(trained, objective, timetable.at(step).shape, batch, None, partial(stop.ask, step))
    assert stop.answer() == [0, 1]
    stop.restore()
    return found


@pytest.mark.parametrize("layout", ["DP2", "PP2"])
def test_a_step_waits_for_its_losses_alone(layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    for found in run_on_ranks(waits_on_rank, world_size, parallel, world_size):
        assert found == ["tolist in _mean_over_tokens"]
