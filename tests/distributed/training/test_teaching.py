"""A teacher corrected while it teaches: it learns what it would learn alone, and teaches what it knows at each step.

Tolerances as in test_engine.py: 1e-5 on losses at other layouts, where sums run in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from tests.distributed.models import LAYOUTS, global_batch, my_batch, start_layout, steady, tiny
from tests.distributed.ranks import run_on_ranks

STEPS = 4
BATCH = 8


def architectures() -> tuple[Any, Any]:
    student = tiny("llama")
    return student, student.replace(hidden_size=64, ffn_hidden_size=128)


def weights_of(chunks: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]


def teach_on_rank(
    parallel: dict[str, Any], world_size: int, folder: str, resume_at: int | None, recompute: Recompute = KEEP_ALL
) -> dict[str, Any]:
    """`STEPS` steps of both models, or from `resume_at` on; and, at one rank, what independent runs give."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.start import start
    from minitron_mcore.training.config import CorrectConfig, TrainConfig
    from minitron_mcore.training.step import Trained, build_optimizer, build_scheduler, train_step, wrap_model
    from minitron_mcore.training.teaching import TrainedTeacher

    layout = start_layout(parallel, world_size)
    student, wide = architectures()
    correct = CorrectConfig(lr=1e-2, min_lr=1e-3, global_batch_size=BATCH, loss_chunk_tokens=24)
    train = TrainConfig(lr=1e-2, min_lr=1e-3, global_batch_size=BATCH, micro_batch_size=2)
    timetable = steady(train, STEPS)

    def batch(step: int) -> Any:
        return my_batch(global_batch(student.vocab_size, step))

    def build(architecture: Any, seed: int, config: Any) -> Any:
        models = build_model(architecture, layout, "fp32")
        initialize(models, architecture, seed)
        chunks = wrap_model(models)
        optimizer = build_optimizer(chunks, config, "fp32")
        return chunks, optimizer, build_scheduler(optimizer, config, timetable)

    frozen = build_model(wide, layout, "fp32", trainable=False, recompute=recompute)
    initialize(frozen, wide, seed=5)

    def describe(tokens: int) -> None:
        write_description(Path(folder), wide, lineage={"tokens": tokens}, recipe="", save_tokenizer=None)

    teacher = TrainedTeacher(Teacher(frozen, wide), correct, timetable, Path(folder), describe)
    settings = LossSettings(student.vocab_size, lm_weight=0.0, kd_weight=1.0, chunk_tokens=24)
    objective = Objective(settings, teacher)
    first = resume_at or 0
    if first:
        teacher.resume(first, timetable.at(first).tokens_before)
    chunks, optimizer, scheduler = build(student, 11, train)
    history, students, teachers = [], [], [weights_of(teacher.chunks)]
    for step in range(first, STEPS):
        students.append(weights_of(chunks))
        row = train_step(Trained(chunks, optimizer, scheduler), objective, timetable.at(step).shape, batch(step))
        history.append({**row, **teacher.step(timetable.at(step).shape.tokens)})
        teachers.append(weights_of(teacher.chunks))
        if step == 1:
            teacher.save(step + 1, timetable.at(step + 1).tokens_before, start())

    # The same teacher trained alone.
    alone, alone_optimizer, alone_scheduler = build(wide, 5, correct)
    plain = Objective(LossSettings(wide.vocab_size, chunk_tokens=24))
    alone_history = [
        train_step(Trained(alone, alone_optimizer, alone_scheduler), plain, timetable.at(step).shape, batch(step))
        for step in range(STEPS)
    ]
    # What the student's loss is under the teacher frozen as it was before each step.
    frozen_losses = []
    if not first:
        still = build_model(wide, layout, "fp32", trainable=False)
        pupil, _, _ = build(student, 11, train)
        for step in range(STEPS):
            for chunks_, values in ((still, teachers[step]), (pupil, students[step])):
                parameters = [parameter for chunk in chunks_ for parameter in chunk.parameters()]
                with torch.no_grad():
                    for parameter, value in zip(parameters, values, strict=True):
                        parameter.copy_(value)
            judge = Objective(settings, Teacher(still, wide))
            with torch.no_grad():
                frozen_losses.append(judge.run(pupil, batch(step), forward_only=True)["logits distillation loss"])
    same = all(torch.equal(a, b) for a, b in zip(weights_of(teacher.chunks), weights_of(alone), strict=True))
    moved = max(float((a - b).abs().max()) for a, b in zip(teachers[0], teachers[-1], strict=True))
    return {"history": history, "alone": alone_history, "frozen": frozen_losses, "same_weights": same, "moved": moved}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[Any, Any] = {}

    def of(layout: str, recompute: Recompute = KEEP_ALL) -> Any:
        key = (layout, recompute)
        if key not in made:
            folder = tmp_path_factory.mktemp(layout)
            world_size, parallel = LAYOUTS[layout]
            ranks = run_on_ranks(teach_on_rank, world_size, parallel, world_size, str(folder), None, recompute)
            made[key] = (folder, ranks)
        return made[key]

    return of


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        ("1", KEEP_ALL),
        ("TP2", KEEP_ALL),
        ("PP2-VPP2", KEEP_ALL),
        ("DP2", KEEP_ALL),
        ("PP2-VPP2", Recompute("full")),
        ("1", Recompute("selective")),
    ],
)
def test_the_teacher_learns_as_alone_and_teaches_what_it_knows(layout: str, recompute: Recompute, runs: Any) -> None:
    for rank in runs(layout, recompute)[1]:
        for row, alone, frozen in zip(rank["history"], rank["alone"], rank["frozen"], strict=True):
            assert row["teacher lm loss"] == alone["lm loss"]
            assert row["teacher grad-norm"] == alone["grad-norm"]
            assert row["teacher learning-rate"] == alone["learning-rate"]
            # Another sum order alone: whole chunks are the same.
            assert row["logits distillation loss"] == pytest.approx(frozen, rel=1e-6)
        assert rank["same_weights"]
        assert rank["moved"] > 0.01, "a teacher that stands still would be equal too"


@pytest.mark.parametrize("layout", ["TP2", "PP2-VPP2", "DP2"])
def test_the_layout_does_not_matter(layout: str, runs: Any) -> None:
    single, other = runs("1")[1][0]["history"], runs(layout)[1][0]["history"]
    for ours, theirs in zip(other, single, strict=True):
        for name in ("lm loss", "logits distillation loss", "teacher lm loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        for name in ("grad-norm", "teacher grad-norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_the_teacher_goes_on_bit_for_bit(runs: Any) -> None:
    folder, whole = runs("1")
    resumed = run_on_ranks(teach_on_rank, 1, {}, 1, str(folder), 2)[0]
    for ours, theirs in zip(resumed["history"], whole[0]["history"][2:], strict=True):
        for name in ("teacher lm loss", "teacher grad-norm", "teacher learning-rate"):
            assert ours[name] == theirs[name], name
    assert resumed["same_weights"]
