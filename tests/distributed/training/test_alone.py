"""The only data-parallel rank sends nothing to itself, and trains as when it did."""

from __future__ import annotations

import torch

from tests.distributed.models import global_batch, my_batch, start_layout, tiny
from tests.distributed.ranks import run_on_ranks


def train_on_rank(sends: bool) -> tuple[list[torch.Tensor], set[str]]:
    """(the weights after three steps, the names of what ran in the last)."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.training.budget import plan_timetable
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, train_step

    layout, architecture = start_layout({}, 1), tiny("llama")
    models = build_model(architecture, layout, "fp32")
    initialize(models, architecture, seed=1)
    batch = my_batch(global_batch(architecture.vocab_size))
    size, sequence = batch[0].tokens.shape
    train = TrainConfig(tokens=10**6, global_batch_size=size * len(batch), micro_batch_size=size)
    timetable = plan_timetable(train, sequence, "train")
    trained = Trained.of(models, train, timetable)
    for chunk in trained.chunks if sends else ():
        for group in chunk.bucket_groups:  # type: ignore[union-attr]
            del group.start_grad_sync, group.start_param_sync
    objective = Objective(LossSettings(architecture.vocab_size))
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train_step(trained, objective, timetable.at(0).shape, batch)
    names = {event.name for event in profile.events()}
    return [parameter.detach().clone() for parameter in models[0].parameters()], names


def test_nothing_is_copied_for_a_rank_alone() -> None:
    (weights, ran), (expected, would) = (run_on_ranks(train_on_rank, 1, sends)[0] for sends in (False, True))
    assert all(torch.equal(own, other) for own, other in zip(weights, expected, strict=True))
    collectives = [
        {name for name in names if "reduce_scatter" in name or "allgather" in name} for names in (ran, would)
    ]
    assert not collectives[0] and collectives[1]
