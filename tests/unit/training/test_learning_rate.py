"""Learning rates by tokens: against formulas, against the counting in samples, and what may change on the way."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_mcore.errors import InputError
from minitron_mcore.jobs.continuation import refuse_other_run
from minitron_mcore.recipe import load_recipe, to_yaml
from minitron_mcore.training.budget import plan_timetable
from minitron_mcore.training.config import PhaseConfig, TrainConfig
from minitron_mcore.training.learning_rate import check_continuation, check_learning_rate, warmup_tokens
from minitron_mcore.training.step import build_scheduler, set_schedule

LENGTH = 10
# 20 iterations of 4 x 10 tokens.
GOOD = TrainConfig(tokens=800, global_batch_size=4, lr=1e-2, min_lr=1e-3)


def rates(train: TrainConfig) -> list[tuple[int, float]]:
    """(tokens before, learning rate) of every iteration."""
    timetable = plan_timetable(train, LENGTH, "train")
    optimizer: Any = SimpleNamespace(param_groups=[{}])
    scheduler = build_scheduler(optimizer, train, timetable)
    found = []
    for step in timetable.steps():
        found.append((step.tokens_before, optimizer.param_groups[0]["lr"]))
        scheduler.step(increment=step.shape.tokens)
    set_schedule(scheduler, found[7][0])
    assert optimizer.param_groups[0]["lr"] == found[7][1], "the same after a resumption"
    return found


def share(style: str, done: float) -> float:
    """What is left of max - min when the part `done` of the decay is over."""
    return {
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "exponential": 2 * 0.5**done - 1,
        "minus_sqrt": 1 - math.sqrt(done),
        "constant": 1.0,
    }[style]


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [{"lr_warmup_iters": 3}, {"lr_warmup_tokens": 130}, {}])
def test_decay_over_the_budget(style: str, warmup: dict[str, Any]) -> None:
    """With a ramp-up and a phase of longer sequences, so that iterations are no measure of tokens."""
    train = replace(
        GOOD,
        lr_decay_style=style,
        rampup_batch_size=[2, 1, 10],
        phases=[PhaseConfig(400), PhaseConfig(sequence_length=25)],
        **warmup,
    )
    # The ramp: 2 + 2 + 2 samples, then 3.
    warm = {3: 60, 130: 130, 0: 0}[next(iter(warmup.values()), 0)]
    assert warmup_tokens(train, plan_timetable(train, LENGTH, "train")) == warm
    total = plan_timetable(train, LENGTH, "train").tokens
    for tokens, rate in rates(train):
        if tokens < warm:
            assert rate == pytest.approx(1e-2 * tokens / warm, rel=1e-12)
        else:
            assert rate == pytest.approx(1e-3 + 9e-3 * share(style, (tokens - warm) / (total - warm)), rel=1e-12)


@pytest.mark.parametrize("style", ["exponential", "linear", "cosine", "minus_sqrt"])
def test_wsd_is_stable_then_decays(style: str) -> None:
    train = replace(GOOD, lr_decay_style="WSD", lr_wsd_decay_style=style, lr_wsd_decay_tokens=250, lr_warmup_tokens=100)
    for tokens, rate in rates(train):
        if tokens < 100:
            assert rate == pytest.approx(1e-2 * tokens / 100, rel=1e-12)
        else:
            expected = 1e-3 + 9e-3 * share(style, (tokens - 550) / 250) if tokens > 550 else 1e-2
            assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_without_phases_as_counted_in_samples(style: str, warmup: int) -> None:
    """Megatron counts samples: the same to rounding where every iteration has the same number of tokens."""
    train = replace(GOOD, lr_decay_style=style, lr_warmup_iters=warmup)
    optimizer: Any = SimpleNamespace(param_groups=[{}])
    scheduler = OptimizerParamScheduler(optimizer, 0.0, 1e-2, 1e-3, warmup * 4, 80, style, 0.1, 0.1, 80, "constant")
    for _, rate in rates(train):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-14)
        scheduler.step(increment=4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"lr_warmup_iters": 2, "lr_warmup_tokens": 80},
            "lr_warmup_iters=2 and lr_warmup_tokens=80 both give the warm-up",
        ),
        ({"lr_warmup_iters": 20}, "train.lr_warmup_iters=20 must be less than the 20 iterations of train.tokens=800"),
        ({"lr_warmup_tokens": 800}, "train.lr_warmup_tokens=800 must be less than train.tokens=800"),
        ({"lr_wsd_decay_tokens": 5}, "lr_wsd_decay_tokens=5 has no effect with lr_decay_style=cosine"),
        ({"lr_decay_style": "WSD"}, "train.lr_wsd_decay_tokens=0 must lie between 1 and the 800 tokens after"),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_tokens": 780, "lr_warmup_iters": 1},
            "train.lr_wsd_decay_tokens=780 must lie between 1 and the 760 tokens after the warm-up",
        ),
    ],
)
def test_schedules_that_do_not_fit(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        train = replace(GOOD, **fields)
        check_learning_rate(train, plan_timetable(train, LENGTH, "train"), "train")
    assert str(caught.value).startswith(words)


CONSTANT = replace(GOOD, lr_decay_style="constant")
WSD = replace(GOOD, lr_decay_style="WSD", lr_wsd_decay_tokens=200)
PHASES = [PhaseConfig(400), PhaseConfig(sequence_length=20)]


@pytest.mark.parametrize(
    ("before", "changes", "iteration"),
    [
        (CONSTANT, {"tokens": 1600}, 20),
        (CONSTANT, {"tokens": 500}, 10),
        (CONSTANT, {"phases": PHASES}, 10),
        (CONSTANT, {"tokens": 1600, "phases": PHASES}, 5),
        (WSD, {"tokens": 1600}, 15),
        (WSD, {"lr_wsd_decay_tokens": 300}, 12),
        # The same budget in tokens: the learning rate is the same, whatever the shapes.
        (GOOD, {"phases": PHASES}, 10),
        (GOOD, {"phases": [PhaseConfig(micro_batch_size=2)]}, 18),
        (replace(GOOD, lr_warmup_iters=3), {"tokens": 1600}, 3),
    ],
)
def test_budgets_that_a_run_may_go_on_to(before: TrainConfig, changes: dict[str, Any], iteration: int) -> None:
    after = replace(before, **changes)
    check_continuation((before, LENGTH), (after, LENGTH), iteration, "train")
    rates_before = [rate for _, rate in rates(before)][:iteration]
    assert [rate for _, rate in rates(after)][:iteration] == rates_before, "what was trained had these rates"


@pytest.mark.parametrize(
    ("before", "changes", "iteration", "words"),
    [
        (
            GOOD,
            {"tokens": 1600},
            1,
            "train.tokens=1600 cannot replace train.tokens=800 after 40 tokens, because the",
        ),
        (WSD, {"tokens": 1600}, 16, "train.tokens=1600 cannot replace train.tokens=800 after 640 tokens"),
        (WSD, {"tokens": 700}, 15, "train.tokens=700 cannot replace train.tokens=800 after 600 tokens"),
        (CONSTANT, {"tokens": 400}, 15, "train.tokens=400 is less than the 600 that train.checkpoint=run has"),
        (CONSTANT, {"phases": PHASES}, 11, "train.checkpoint=run holds a run of 11 iterations with other batch sizes"),
        (
            replace(CONSTANT, lr_warmup_iters=12),
            {"phases": PHASES},
            5,
            "train.lr_warmup_iters=12 would end after 560 tokens with the new budget and phases, not after 480 as "
            "before",
        ),
    ],
)
def test_budgets_that_it_may_not(before: TrainConfig, changes: dict[str, Any], iteration: int, words: str) -> None:
    after = replace(before, checkpoint="run", **changes)
    with pytest.raises(InputError) as caught:
        check_continuation((before, LENGTH), (after, LENGTH), iteration, "train")
    assert str(caught.value).startswith(words)


def test_a_checkpoint_that_counted_samples() -> None:
    """The schedule's state of seven iterations in Megatron's unit; tokens and the recipe decide."""
    other: Any = SimpleNamespace(param_groups=[{}])
    stored = OptimizerParamScheduler(other, 0.0, 1e-2, 1e-3, 0, 80, "cosine", 0.1, 0.1, 80, "constant")
    stored.step(increment=7 * 4)
    optimizer: Any = SimpleNamespace(param_groups=[{}])
    scheduler = build_scheduler(optimizer, GOOD, plan_timetable(GOOD, LENGTH, "train"))
    scheduler.load_state_dict(stored.state_dict())
    set_schedule(scheduler, 7 * 40)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"], rel=1e-14)


def test_the_same_phases_are_the_same_run(tmp_path: Path) -> None:
    """What is stored as plain lists and what a recipe holds as sections compare equal, and others do not."""
    recipe = load_recipe(None, ["train.phases=[{tokens: 5}, {sequence_length: 8}]"])
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    refuse_other_run(tmp_path, recipe, ("train",), "output")
    other = load_recipe(None, ["train.phases=[{tokens: 6}, {sequence_length: 8}]"])
    with pytest.raises(InputError, match=r"holds another run: train\.phases is"):
        refuse_other_run(tmp_path, other, ("train",), "output")


def test_micro_batches_of_phases_may_change_where_the_budget_may_not(tmp_path: Path) -> None:
    """As those of the section: what an out-of-memory advises must be possible beside a corrected teacher too."""
    phases = "distill.phases=[{tokens: 64, micro_batch_size: 4}, {sequence_length: 8}]"
    (tmp_path / "recipe.yaml").write_text(to_yaml(load_recipe(None, [phases])))

    def go_on(*changes: str) -> None:
        recipe = load_recipe(None, [phases, *changes])
        refuse_other_run(tmp_path, recipe, ("distill",), "correct.checkpoint", "correct", keeps_budget=True)

    go_on("distill.phases[0].micro_batch_size=1", "distill.phases[1].micro_batch_size=2")
    with pytest.raises(InputError, match=r"holds another run: distill\.phases is"):
        go_on("distill.phases[0].tokens=128")


def test_keys_that_an_older_run_did_not_have(tmp_path: Path) -> None:
    """They were as they are by default: a run cannot go on with another loss, and may with what helps memory."""
    stored = yaml.safe_load(to_yaml(load_recipe(None, ["distill.lr=1e-3"])))
    for name in ("hidden_states", "logit_loss", "teacher_window", "recompute_loss"):
        del stored["distill"][name]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(stored))
    helps = ["distill.lr=1e-3", "distill.teacher_window=2", "distill.recompute_loss=true"]
    refuse_other_run(tmp_path, load_recipe(None, helps), ("distill",), "distill.checkpoint", "distill")
    for change in ("distill.logit_loss=reverse_kl", "distill.hidden_states.sites=[embedding]"):
        with pytest.raises(InputError, match=f"holds another run: {change.split('=')[0].removesuffix('.sites')} is"):
            refuse_other_run(tmp_path, load_recipe(None, [*helps, change]), ("distill",), "distill.checkpoint")
