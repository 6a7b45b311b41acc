"""What a rank makes of the pairs and answers of problems.py: reported means, and every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.architecture import Architecture
from tests.distributed.alignment.problems import (
    LENGTH,
    PAIRS,
    draw_answers,
    draw_models,
    in_microbatches,
    packed_rows_of,
    rewards_of,
    rows_of,
)
from tests.distributed.models import LAYOUTS as WITHOUT_CONTEXT
from tests.distributed.models import gather_named, my_batch, start_layout, steady

MIXED = "TP2-SP-PP2"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **WITHOUT_CONTEXT,
    "CP2": (2, {"context": 2}),
    MIXED: (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
}
NOT_THE_LOSS = ("micro_batch", "resident", "mean")


class Segments:
    """Segments of problems.draw_answers, as `Prepared` has them."""

    def __init__(self, answers: list[tuple[list[int], list[bool]]]) -> None:
        self.tokens = numpy.array([token for ids, _ in answers for token in ids], dtype=numpy.int32)
        self.counted = numpy.array([each for _, counted in answers for each in counted])
        self.starts = numpy.cumsum([0, *(len(ids) for ids, _ in answers)])


def quick(*layouts: str) -> list[Any]:
    """All layouts but one rank, as parameters of a test: these in every run, the rest in the slow one."""
    return [
        layout if layout in layouts else pytest.param(layout, marks=pytest.mark.slow)
        for layout in LAYOUTS
        if layout != "1"
    ]


def build(architecture: Architecture, layout: Any, weights: Any, precision: str = "fp32") -> Any:
    """This rank's chunks with global weights."""
    from minitron_mcore.model.gpt import build_model
    from tests.distributed.dense_reference import fill

    models = build_model(architecture, layout, precision)
    fill(models, architecture, weights)
    return models


def preference(architecture: Architecture, layout: Any, both: tuple[Any, Any], how: dict[str, Any]) -> Any:
    """how: `method` and its numbers; `sft` and `mean` for answers. `resident`: the reference stays beside."""
    from minitron_mcore.alignment.losses import PreferenceSettings
    from minitron_mcore.alignment.objective import AnswerObjective, Pairs, PreferenceObjective
    from minitron_mcore.alignment.reference import segment_log_probs
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.teacher.ahead import Teacher

    settings = LossSettings(architecture.vocab_size, chunk_tokens=64)
    numbers = {name: value for name, value in how.items() if name not in NOT_THE_LOSS}
    if how["method"] == "sft":
        return AnswerObjective(settings)
    preference = PreferenceSettings(**numbers)
    teacher = known = None
    if how.get("resident"):
        teacher = Teacher(both[1], architecture)
    elif preference.has_reference:
        prepared = Segments(draw_answers(architecture.vocab_size))
        values = segment_log_probs(both[1], prepared, range(len(prepared.starts) - 1), settings, micro_batch_size=3)
        known = torch.from_numpy(values).to(torch.cuda.current_device())
    pairs = Pairs(known, rewards_of().to(torch.cuda.current_device()))
    return PreferenceObjective(settings, teacher, preference=preference, pairs=pairs)


def batch_of(architecture: Architecture, how: dict[str, Any], seed: int = 0) -> Any:
    """This rank's microbatches of the global batch."""
    from minitron_mcore.model.microbatch import on_this_context_rank

    rows, size = rows_of(draw_answers(architecture.vocab_size, seed)), how.get("micro_batch", 2)
    if how.get("mean") == "samples":
        rows["loss_mask"] = rows["loss_mask"] / rows["loss_mask"].sum(1, keepdim=True)
    cut = in_microbatches(rows, size if how["method"] == "sft" else 2 * size)
    return [on_this_context_rank(microbatch) for microbatch in my_batch(cut)]


def first_steps(
    architecture: Architecture, parallel: dict[str, Any], world_size: int, runs: list[dict[str, Any]], precision: str
) -> list[dict[str, Any]]:
    """Of each run the means and gradients of one global batch."""
    from minitron_mcore.distillation.states.projection import finalize_gradients
    from minitron_mcore.evaluation.held_out import mean_loss
    from minitron_mcore.model.initialize import named_parameters
    from minitron_mcore.training.step import wrap_model

    layout = start_layout(parallel, world_size)
    models = tuple(build(architecture, layout, weights, precision) for weights in draw_models(architecture))
    for chunk in models[1]:
        chunk.requires_grad_(False)
    chunks = wrap_model(models[0])

    # All-reduced, not reduce-scattered, so that every rank holds whole gradients to compare.
    def finalize(*args: Any, force_all_reduce: bool = False, **kwargs: Any) -> None:
        finalize_gradients(*args, force_all_reduce=True, **kwargs)

    for model in models[0]:
        model.config.finalize_model_grads_func = finalize
    named: Any = [row for model in models[0] for row in named_parameters(model)]
    found = []
    for how in runs:
        for chunk in chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        objective = preference(architecture, layout, models, how)
        means = objective.run(chunks, batch_of(architecture, how))
        means = {"num_tokens": means["num_tokens"], **objective.reported(means)}
        held_out = mean_loss(chunks, [batch_of(architecture, how)], objective)
        gradients = gather_named([(key, layer, tensor.main_grad) for key, layer, tensor in named])
        found.append({"means": means, "held_out": held_out, "gradients": gradients})
    return found


def several_steps(
    architecture: Architecture, parallel: dict[str, Any], world_size: int, how: dict[str, Any], steps: int
) -> list[dict[str, float]]:
    """What each training step reports, from the reference on."""
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, train_step

    layout, weights = start_layout(parallel, world_size), draw_models(architecture)[1]
    models = tuple(build(architecture, layout, weights) for _ in range(2))
    for chunk in models[1]:
        chunk.requires_grad_(False)
    train = TrainConfig(lr=1e-3, min_lr=1e-3, global_batch_size=8, micro_batch_size=how.get("micro_batch", 2))
    timetable = steady(train, iterations=steps)
    trained, objective = Trained.of(models[0], train, timetable), preference(architecture, layout, models, how)
    shape = timetable.at(0).shape
    return [train_step(trained, objective, shape, batch_of(architecture, how)) for _ in range(steps)]


STEP = 2 * PAIRS  # segments of a global batch


def batch_of_step(answers: list[Any], step: int, how: dict[str, Any]) -> Any:
    """This rank's microbatches of the pairs, or chats, that a step has to itself; packed in rows of which one is filled
    to its last position, and some are padding alone."""
    from minitron_mcore.model.microbatch import on_this_context_rank

    mine = answers[STEP * step : STEP * (step + 1)]
    if how["packed"]:
        fills = sum(len(ids) - 1 for ids, _ in mine[:4])  # two pairs, which no third one follows in their row
        rows = packed_rows_of(mine, max(fills, 2 * LENGTH), multiple=8)
        rows["packed"] = torch.ones(len(rows["tokens"]), dtype=torch.bool)
    else:
        rows = rows_of(mine)
    rows["segments"][rows["segments"] >= 0] += STEP * step
    sides = 1 if how["packed"] or how["method"] == "sft" else 2
    cut = my_batch(in_microbatches(rows, sides * how["micro_batch"]))
    return [on_this_context_rank(microbatch) for microbatch in cut]


def trained_on_rank(
    architecture: Architecture, parallel: dict[str, Any], world_size: int, runs: list[dict[str, Any]], steps: int
) -> list[list[dict[str, Any]]]:
    """Of each run what each of its training steps reports, and the gradients that it takes.

    Adam with a large epsilon, so that it is nearly linear: with a small one a gradient of rounding alone would move a
    weight as far as any other. At thirty times the learning rate rounding grows tenfold with every step."""
    from minitron_mcore.alignment import objective as objectives
    from minitron_mcore.alignment.losses import PreferenceSettings
    from minitron_mcore.alignment.reference import segment_log_probs
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.states.projection import finalize_gradients
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.initialize import named_parameters
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, train_step

    layout, vocab_size = start_layout(parallel, world_size), architecture.vocab_size
    answers, settings = draw_answers(vocab_size, pairs=PAIRS * steps), LossSettings(vocab_size, chunk_tokens=64)
    found = []
    for how in runs:
        models: Any = tuple(build(architecture, layout, weights) for weights in draw_models(architecture))
        objective: Any = objectives.AnswerObjective(settings)
        if how["method"] != "sft":
            preference = PreferenceSettings(how["method"], beta=0.3)
            if how.get("resident"):
                teacher, pairs = Teacher(models[1], architecture), objectives.Pairs()
            else:
                numbers, sizes = range(len(answers)), {"micro_batch_size": 8}
                values = segment_log_probs(models[1], Segments(answers), numbers, settings, **sizes)
                teacher, pairs = None, objectives.Pairs(torch.from_numpy(values).to(torch.cuda.current_device()))
            objective = objectives.PreferenceObjective(settings, teacher, preference=preference, pairs=pairs)
        train = TrainConfig(lr=0.01, min_lr=0.003, adam_eps=0.1, clip_grad=0.0, global_batch_size=PAIRS)
        timetable = steady(train, iterations=20)
        trained = Trained.of(models[0], train, timetable)
        named: Any = [row for model in models[0] for row in named_parameters(model)]
        taken: list[Any] = []

        # All-reduced, not reduce-scattered, so that every rank holds whole gradients to compare.
        def finalize(
            *args: Any, named: Any = named, taken: Any = taken, force_all_reduce: bool = False, **kw: Any
        ) -> None:
            finalize_gradients(*args, force_all_reduce=True, **kw)
            taken.append(gather_named([(key, layer, tensor.main_grad) for key, layer, tensor in named]))

        for model in models[0]:
            model.config.finalize_model_grads_func = finalize
        history = []
        for step in range(steps):
            batch = batch_of_step(answers, step, how)
            means = train_step(trained, objective, timetable.at(step).shape, batch)
            history.append({"means": means, "gradients": taken[step]})
        found.append(history)
    return found


def worked_out(
    architecture: Architecture, parallel: dict[str, Any], world_size: int, folder: Path, dies_after: int | None
) -> list[float] | None:
    """The reference's log-probabilities, in blocks of three segments; None from a pass that dies after some blocks."""
    from unittest import mock

    from minitron_mcore.alignment import reference
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.runtime.start import start

    layout = start_layout(parallel, world_size)
    models = build(architecture, layout, draw_models(architecture)[1])
    prepared, settings = Segments(draw_answers(architecture.vocab_size)), LossSettings(architecture.vocab_size)
    original, blocks = reference.segment_log_probs, list[Any]()

    def counting(*args: Any, **how: Any) -> Any:
        if len(blocks) == dies_after:
            raise KeyboardInterrupt
        blocks.append(args[2])
        return original(*args, **how)

    given = models, prepared, folder, {"weights": "abc", "data": 1}, start(), settings
    with mock.patch.object(reference, "segment_log_probs", counting):
        try:
            values = reference.work_out_reference(*given, micro_batch_size=2, block=3)
        except KeyboardInterrupt:
            return None
    return [float(len(blocks)), *values.tolist()]


def segments_found(context: int) -> list[dict[str, Any]]:
    """Of rows that bring pair 3 twice, and of padding: the segments' numbers, and the sums of what a token holds."""
    from minitron_mcore.alignment.segments import Segments as Found
    from minitron_mcore.model.microbatch import Microbatch, on_this_context_rank

    start_layout({"context": context}, context)
    segments, values = torch.full((4, 8), -1), torch.zeros(4, 8)
    for row, (number, length) in enumerate(((6, 5), (7, 2), (6, 1), (7, 3))):
        segments[row, :length] = number
        values[row, :length] = 10 * row + torch.arange(1.0, length + 1)
    found = []
    for numbers in (segments, torch.full_like(segments, -1)):
        whole = Microbatch(numbers, numbers, values, numbers, segments=numbers)
        microbatch = on_this_context_rank(whole).to(torch.cuda.current_device())
        here = Found.of(microbatch)
        sums = here.sums(microbatch.loss_mask.transpose(0, 1))
        found.append({"numbers": here.pairs.flatten().tolist(), "sums": sums.tolist()})
    return found


def packed_segments_found() -> tuple[list[int], list[float]]:
    """Of two rows that one and the same chat fills to the end, as of two passes: its numbers, and sums of ones."""
    from minitron_mcore.alignment.segments import Segments as Found
    from minitron_mcore.model.microbatch import Microbatch

    start_layout({}, 1)
    numbers, ones = torch.full((2, 4), 6), torch.ones(2, 4)
    rows = {"tokens": numbers, "labels": numbers, "loss_mask": ones, "position_ids": numbers, "segments": numbers}
    microbatch = Microbatch.of({**rows, "packed": torch.tensor([True, True])}).to(torch.cuda.current_device())
    found = Found.of(microbatch)
    return found.numbers.tolist(), found.sums(microbatch.loss_mask.transpose(0, 1)).tolist()
