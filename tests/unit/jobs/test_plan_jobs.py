"""Plans and prunings of what earlier jobs will make: the shape without the scores, and what is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.jobs.job import NOTHING, SCORES, Item, Model, Promises, absolute, resolve
from minitron_mcore.recipe import load_recipe
from minitron_mcore.runtime.world import World
from tests.distributed.models import tiny
from tests.refusals import refuses

TEACHER = tiny("llama")
ASKED = ["teacher.checkpoint=@/teacher", "scores=@/scores", "plan=@/plan.json", "student.checkpoint=@/student"]


def resolved(root: Path, verb: str, *overrides: str) -> Any:
    """The job of `verb` when earlier jobs will have made the teacher and its scores."""
    teacher = Model("train.checkpoint", root / "teacher", TEACHER)
    scores = Item("scores", str(root / "scores"), SCORES)
    promises = Promises({absolute(root / "teacher"): teacher}, {absolute(root / "scores"): scores})
    given = [text for text in ASKED if verb == "plan" or not text.startswith("plan=")]
    recipe = load_recipe(None, [text.replace("@", str(root)) for text in [*given, *overrides]])
    return resolve(verb, recipe, World(), promises)


def test_a_student_is_promised_before_its_scores_are_there(tmp_path: Path) -> None:
    for verb in ("plan", "prune"):
        job = resolved(tmp_path, verb, "student.ratios.ffn_hidden_size=0.5", "student.num_layers=3")
        assert job.plan is None and not list(tmp_path.iterdir())
    (made,) = job.makes
    assert made.architecture == TEACHER.replace(ffn_hidden_size=48, num_layers=3)
    promised = NOTHING.after(job).models[absolute(tmp_path / "student")]
    assert promised.iteration is None and promised.architecture == made.architecture


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        (["student.hidden_size=97"], ("student.hidden_size", 97, "is larger than the teacher's 48")),
        (
            ["student.num_attention_heads=2", "prune.head_residual=laco"],
            ("prune.head_residual", "laco", "1 of 3"),
        ),
        (
            ["student.num_layers=2", "prune.depth_metric=lm_loss", "prune.layers=contiguous"],
            (
                "prune.depth_metric",
                "lm_loss",
                "is not measured for blocks of 2 layers",
                "2 to importance.block_lengths",
            ),
        ),
        (["prune.variant=var/var/pre_activation"], ("prune.variant", "var/var/pre_activation", "is not among")),
        (["prune.steps=2", "student.num_layers=2"], ("prune.steps", 2, "scores between its steps")),
    ],
)
def test_what_no_scores_could_mend_is_refused_at_once(
    overrides: list[str], refusal: tuple[Any, ...], tmp_path: Path
) -> None:
    with refuses(*refusal):
        resolved(tmp_path, "prune", *overrides)


def test_a_plan_without_a_target_is_refused(tmp_path: Path) -> None:
    with refuses("student", None, "asks for nothing smaller", "student.num_layers, student.hidden_size"):
        resolved(tmp_path, "plan")


def test_missing_keys_come_all_at_once() -> None:
    with refuses("plan, scores", None, "are not given", "`minitron score`"):
        resolve("plan", load_recipe(None, []), World(), NOTHING)
    with refuses("teacher.checkpoint, student.checkpoint, scores", None, "are not given"):
        resolve("prune", load_recipe(None, []), World(), NOTHING)
    keys = "train.tokens, data.train, tokenizer.model, model.hidden_size, model.ffn_hidden_size"
    with refuses(keys, None, "are not given", "train.tokens is the budget in tokens"):
        given = ["train.checkpoint=x", "model.num_layers=2", "model.num_attention_heads=2"]
        resolve("train", load_recipe(None, given), World(), NOTHING)
