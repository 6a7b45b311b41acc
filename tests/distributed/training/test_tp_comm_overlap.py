"""States exchanged during products give the training that there is without: on two GPUs with Transformer Engine."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.models import global_batch, my_batch, start_layout, steady, tiny
from tests.distributed.ranks import run_on_ranks, test_device

PARALLEL = {"tensor": 2, "sequence": True}


def losses_on_rank(overlap: bool) -> list[float]:
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.user_buffers import Exchange, user_buffers
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, train_step

    layout, architecture = start_layout(PARALLEL, 2), tiny("llama", num_attention_heads=8, hidden_size=64)
    models = build_model(architecture, layout, "bf16", tp_comm_overlap=overlap)
    initialize(models, architecture, seed=1)
    train = TrainConfig(lr=1e-3, min_lr=1e-3, global_batch_size=8, micro_batch_size=2)
    timetable = steady(train, 5)
    trained, objective = Trained.of(models, train, timetable), Objective(LossSettings(architecture.vocab_size))
    exchange = Exchange("train.tp_comm_overlap", 32, architecture.hidden_size, 2) if overlap else None
    losses = []
    with user_buffers(exchange):
        for step in range(5):
            batch = my_batch(global_batch(1003, seed=step))
            losses.append(train_step(trained, objective, timetable.at(step).shape, batch)["lm loss"])
    return losses


@pytest.mark.gpu
def test_training_is_the_same() -> None:
    """To what bf16 sums in another order make of a loss of about 7: two units of its 8 bits, 0.06."""
    pytest.importorskip("transformer_engine")
    if test_device() != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("two GPUs and MINITRON_TEST_DEVICE=cuda are needed")
    plain, overlapped = (run_on_ranks(losses_on_rank, 2, overlap)[0] for overlap in (False, True))
    assert overlapped == pytest.approx(plain, abs=0.06)
