"""The dynamic weight of the hidden-state losses where states hardly differ, and where nothing was counted.

A student cut in depth alone starts with the teacher's own embedding: the loss between the two is exactly 0, and 1e-10
to 1e-7 in the steps after. The weight that such a loss gets must leave the gradient a distillation's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from minitron_mcore.distillation.states.loss import ALPHA, DIFFERENCE
from minitron_mcore.distillation.states.token_loss import LEAST_DIFFERENCE
from minitron_mcore.model.microbatch import uncounted
from tests.distributed.dense_reference import DenseModel, draw_weights, fill
from tests.distributed.models import LAYOUTS, global_batch, my_batch, start_layout, steady, tiny
from tests.distributed.ranks import run_on_ranks
from tests.distributed.state_loss_problem import NAMES, dense_states

TEACHER = tiny("llama", num_layers=8)
STUDENT = TEACHER.replace(num_layers=4)
LOGITS = "logits distillation loss"
# (site, loss); the relations of the first layer's queries, keys and values follow from the embedding alone.
SAME_STATES = [("embedding", "mse"), ("embedding", "cosine"), ("attention_relation", "mse")]


def start_cut(site: str, loss: str, noise: float, layout: Any, precision: str) -> tuple[Any, ...]:
    """(chunks, optimizer, scheduler, objective, timetable) of the teacher's first layers under the teacher.

    `site` "": with no loss between states. `noise`: what is added to the student's embedding, relative to it.
    """
    from minitron_mcore.distillation.config import HiddenStatesConfig
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.states.loss import StateLosses
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import build_optimizer, build_scheduler, wrap_model

    weights = draw_weights(TEACHER, seed=5)
    teacher_chunks = build_model(TEACHER, layout, precision, trainable=False)
    fill(teacher_chunks, TEACHER, weights)
    embedding = weights["embedding.word_embeddings.weight", None]
    change = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2)) * embedding.square().mean().sqrt()
    models = build_model(STUDENT, layout, precision)
    fill(models, STUDENT, weights | {("embedding.word_embeddings.weight", None): embedding + noise * change})
    teacher, states = Teacher(teacher_chunks, TEACHER), None
    if site:
        config = HiddenStatesConfig(sites=[site], loss=loss, layers=None if site == "embedding" else [[0, 0]])
        states = StateLosses(models, config, STUDENT, TEACHER, layout, seed=1)
        teacher.want_states(states.pairs, STUDENT.num_layers)
    objective = Objective(
        LossSettings(STUDENT.vocab_size, lm_weight=0.0, kd_weight=1.0), teacher=teacher, states=states
    )
    chunks = wrap_model(models)
    train = TrainConfig(lr=1e-4, lr_warmup_iters=40)
    optimizer, timetable = build_optimizer(chunks, train, precision), steady(train, 1000)
    return chunks, optimizer, build_scheduler(optimizer, train, timetable), objective, timetable


def train_on_rank(
    cases: list[tuple[str, str, float]], parallel: dict[str, Any], world_size: int, steps: int, precision: str = "fp32"
) -> list[list[dict[str, float]]]:
    """What the first steps of each case (site, loss, noise) report; the last of them counts no token."""
    from minitron_mcore.training.step import Trained, train_step

    layout = start_layout(parallel, world_size)
    found = []
    for case in cases:
        chunks, optimizer, scheduler, objective, timetable = start_cut(*case, layout, precision)
        rows = []
        for step in range(steps):
            batch = my_batch(global_batch(STUDENT.vocab_size, step))
            if step == steps - 1:
                batch = [uncounted(microbatch) for microbatch in batch]
            row = train_step(Trained(chunks, optimizer, scheduler), objective, timetable.at(step).shape, batch)
            rows.append({**row, "next": objective.states.alpha if objective.states is not None else 0.0})
        found.append(rows)
    return found


def train(layout: str, cases: list[tuple[str, str, float]], **settings: Any) -> list[list[dict[str, float]]]:
    world_size, parallel = LAYOUTS[layout]
    ranks = run_on_ranks(train_on_rank, world_size, cases, parallel, world_size, **settings)
    assert all(rank == ranks[0] for rank in ranks), "every rank must report the same"
    return ranks[0]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_student_cut_in_depth_starts_in_bounds(precision: str) -> None:
    """Ten steps of a warm-up, in which the losses leave 0. Without a ceiling the gradient's norm goes up 300-fold and
    more; at the loss's size here the states' share in it must not be seen (5%: bf16 rounds the two runs apart)."""
    same = SAME_STATES if precision == "fp32" else SAME_STATES[:1]
    cases = [("", "mse", 0.0), *((*case, 0.0) for case in same)]
    plain, *with_states = train("1", cases, steps=11, precision=precision)
    for (site, _), rows in zip(same, with_states, strict=True):
        assert rows[0][NAMES[site]] == 0.0, "the states are equal to the last bit"
        assert 0.0 < abs(rows[-2][NAMES[site]]) < 1e-6
        for row, expected in zip(rows[:-1], plain, strict=False):
            assert row["grad-norm"] == pytest.approx(expected["grad-norm"], rel=0.05)
            assert 0.0 < row[ALPHA] <= 2 * expected[LOGITS] / LEAST_DIFFERENCE


NOISES = [0.01, 0.03, 0.1, 1.0]


@cache
def noisy(layout: str) -> list[list[dict[str, float]]]:
    return train(layout, [("embedding", "mse", noise) for noise in NOISES], steps=3)


def test_on_the_way_to_states_that_differ_the_gradient_stays_in_bounds() -> None:
    """The states' share is largest where the ceiling ends, at a noise of 0.1: there it is 10 times that of a noise of
    1, and here half the logits' own. (Were LEAST_DIFFERENCE 1e-4, it would be 5 times the logits' at 0.01.)"""
    plain = train("1", [("", "mse", noise) for noise in NOISES], steps=3)
    for rows, expected in zip(noisy("1"), plain, strict=True):
        for row, bare in zip(rows[:2], expected, strict=False):
            assert row["grad-norm"] <= 1.5 * bare["grad-norm"]


def test_where_states_differ_the_weight_is_the_papers() -> None:
    """To the last bit; below, the losses get less than the logits' weight, and the reported difference says so."""
    for noise, rows in zip(NOISES, noisy("1"), strict=True):
        for row in rows[:2]:
            papers = row[LOGITS] / row["embedding loss"]
            assert row[DIFFERENCE] == pytest.approx(noise**2, rel=0.5)  # the norm takes part of a large noise away
            if row[DIFFERENCE] >= LEAST_DIFFERENCE:
                assert row["next"] == papers
            else:
                assert row["next"] == pytest.approx(papers * row[DIFFERENCE] / LEAST_DIFFERENCE, rel=1e-9)


def test_a_batch_without_counted_tokens_leaves_the_weight() -> None:
    for rows in noisy("1"):
        assert rows[-1]["embedding loss"] == 0.0
        assert rows[-1][ALPHA] == rows[-1]["next"] == rows[-2]["next"] > 0.0


# At TP2-SP test_state_losses.py has the weights of the next step.
@pytest.mark.parametrize("layout", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("TP2", "TP2-SP")), "PP2"])
def test_weight_and_difference_do_not_hang_on_the_layout(layout: str) -> None:
    """1e-5, as all losses: fp32 sums in another order. The size against which the loss is judged: in float64."""
    teacher, size, count = DenseModel(TEACHER, draw_weights(TEACHER, seed=5)), 0.0, 0.0
    for part in global_batch(STUDENT.vocab_size, 0):
        target = dense_states(teacher, teacher.forward(part["tokens"]), "embedding", 0)
        size += float((target.square().mean(-1) * part["loss_mask"]).sum())
        count += float(part["loss_mask"].sum())
    for rows, single in zip(noisy(layout), noisy("1"), strict=True):
        assert rows[0][DIFFERENCE] == pytest.approx(rows[0]["embedding loss"] / (size / count), rel=1e-5)
        for row, expected in zip(rows, single, strict=True):
            for name in (ALPHA, DIFFERENCE, "next"):
                assert row[name] == pytest.approx(expected[name], rel=1e-5), name
