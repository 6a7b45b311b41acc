"""What is looked at before the first step of a distillation, by teachers that are damaged in a known way."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.models import LAYOUTS, global_batch, my_batch, start_layout, tiny
from tests.distributed.ranks import RankError, run_on_ranks


def check_on_rank(parallel: dict[str, Any], world_size: int, damage: str, precision: str = "fp32", **loss: Any) -> Any:
    """What `check_teacher` printed on this rank."""
    from minitron_mcore.distillation.config import DistillConfig
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize, named_parameters
    from minitron_mcore.runtime.start import start
    from minitron_mcore.training.start_check import check_teacher

    layout = start_layout(parallel, world_size)
    student = tiny("llama")
    architecture = student.replace(hidden_size=64, num_layers=6)
    chunks = build_model(architecture, layout, precision, trainable=False)
    initialize(chunks, architecture, seed=5)
    runtime = start()
    with torch.no_grad():
        for chunk in chunks:
            for key, layer, tensor in named_parameters(chunk):
                if damage == "zero" and layer == 4 and key.endswith("linear_proj.weight"):
                    tensor.zero_()
                if damage == "nan" and layer == 2 and key.endswith("linear_fc1.weight") and runtime.rank == 0:
                    tensor.view(-1)[5] = float("nan")
                if damage == "confident":  # every logit far too large: worse than a uniform guess
                    tensor.mul_(20.0 if key == "output_layer.weight" else 1.0)
    models = build_model(student, layout, precision)
    initialize(models, student, seed=6)
    teacher = Teacher(chunks, architecture)
    with_gradients: list[bool] = []
    watched = [*models, *chunks]
    for model in watched:
        model.register_forward_pre_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    printed: list[str] = []
    job: Any = SimpleNamespace(
        chunks=models,
        train=DistillConfig(check_teacher=damage != "unchecked"),
        objective=Objective(
            LossSettings(vocab_size=student.vocab_size, lm_weight=0.3, kd_weight=1.0, **loss), teacher=teacher
        ),
        runtime=SimpleNamespace(print=printed.append, world_size=world_size),
        precision=precision,
    )
    before = my_batch(global_batch(student.vocab_size))
    batch = [replace(part) for part in before]
    check_teacher(job, batch)
    assert [vars(part) for part in batch] == [vars(part) for part in before], "the batch is left as it was"
    assert not any(with_gradients), "one that is trained would be trained on the probe, and the student's graph kept"
    return printed


def run(layout: str, damage: str, *arguments: Any, **loss: Any) -> list[list[str]]:
    world_size, parallel = LAYOUTS[layout]
    return run_on_ranks(check_on_rank, world_size, parallel, world_size, damage, *arguments, **loss)


@pytest.mark.parametrize(
    ("layout", "precision", "loss"),
    [
        ("1", "bf16", {"temperature": 2.0}),
        ("TP2-SP", "fp32", {}),
        ("PP2-VPP2", "fp32", {}),
        ("DP2", "bf16", {}),
    ],
)
def test_a_sound_teacher(layout: str, precision: str, loss: dict[str, Any]) -> None:
    """Of random weights, its loss is about ln(1003) and a little above; said on every rank alike."""
    ranks = run(layout, "none", precision, **loss)
    assert all(rank == ranks[0] for rank in ranks)
    words = ranks[0][0].split()
    assert float(words[words.index("loss") + 1]) == pytest.approx(math.log(1003), rel=0.1)
    assert abs(float(words[-1])) <= 1e-6, "the teacher is no distance from itself"
    assert "a uniform guess: 6.9108" in ranks[0][0]


def test_a_teacher_that_knows_nothing_is_told_of() -> None:
    lines = run("1", "confident")[0]
    assert len(lines) == 2 and lines[1].startswith("WARNING: on the first microbatch the teacher's loss")


@pytest.mark.parametrize(
    ("layout", "damage", "words"),
    [
        ("TP2", "zero", "self_attention.linear_proj.weight of layer 4 is all zero;"),
        ("PP2", "nan", "mlp.linear_fc1.weight of layer 2 holds NaN or Inf"),
        ("DP2", "nan", "mlp.linear_fc1.weight of layer 2 holds NaN or Inf"),
    ],
)
def test_damaged_weights_are_refused(layout: str, damage: str, words: str) -> None:
    """On every rank, though one alone may hold the damage."""
    with pytest.raises(RankError) as caught:
        run(layout, damage)
    assert (
        f"InputError: teacher.checkpoint has weights that were lost or never filled in: decoder.layers.{words}"
        in str(caught.value)
    )
    assert "then rank 1: minitron_mcore.errors.InputError" in str(caught.value) or "then rank 0: minitron" in str(
        caught.value
    )


def test_it_can_be_switched_off() -> None:
    assert run("1", "unchecked") == [[]]
