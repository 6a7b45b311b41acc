"""The steps of a recipe, from shapes alone, against what `run` resolves with everything there."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_mcore.architecture import build_architecture, save_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.job import resolve
from minitron_mcore.jobs.shape import find_shape
from minitron_mcore.jobs.sketch import sketch_road
from minitron_mcore.jobs.train import TrainingJob
from minitron_mcore.recipe import load_recipe
from minitron_mcore.runtime.world import World

QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
TEACHER = build_architecture(
    {
        "num_layers": 8,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
)


def works(folder: Path, *words: str) -> list[tuple[str, str]]:
    """(title, sizes of the model and of its teacher) of each step for a teacher whose shape alone is there."""
    save_architecture(TEACHER, folder / "architecture.yaml")
    recipe = load_recipe(None, [f"teacher.checkpoint={folder}", f"output={folder}/run", *words])
    found = sketch_road(recipe, find_shape(recipe)[0]).works
    return [
        (each.step.title, "".join(f"{a.num_layers}x{a.ffn_hidden_size} " for a in (each.model, each.teacher) if a))
        for each in found
    ]


def test_as_run_resolves_it(tmp_path: Path) -> None:
    """The same steps with the same shapes, and the same forecast of every training."""
    recipe = load_recipe(QUICKSTART, [f"output={tmp_path}/run"])
    world = World(size=2, local_size=2, device="cuda")
    jobs = {step.title: job for step, job in resolve("run", recipe, world).steps}  # type: ignore[attr-defined]
    found = sketch_road(recipe, find_shape(recipe)[0]).works
    assert [each.step.title for each in found] == [*jobs][2:], "all but the tokenizer and the tokens"
    trainings = 0
    for each in found:
        job = jobs[each.step.title]
        if isinstance(job, TrainingJob):
            trainings += 1
            assert each.model == job.architecture
            assert each.teacher == (job.teaching.model and job.teaching.model.architecture)
    assert trainings == 5
    named = {each.step.recipe.name: each.step.recipe.log.wandb_group for each in found}
    assert len(named) > 4 and {*named.values()} == {"quickstart"}, "each a run of its own, in one group"


def test_pruning_in_steps(tmp_path: Path) -> None:
    asked = ["student.num_layers=4", "student.ffn_hidden_size=64", "prune.steps=2", "prune.step_tokens=4096"]
    found = works(tmp_path, *asked, "distill.tokens=8192")
    assert found == [
        ("evaluate teacher", "8x128 "),
        ("score the teacher", "8x128 "),
        ("prune student, step 1 of 2", "6x96 8x128 "),
        ("train student, step 1 of 2", "6x96 8x128 "),
        ("score student, step 2 of 2", "6x96 "),
        ("prune student, step 2 of 2", "4x64 6x96 "),
        ("evaluate student pruned", "4x64 "),
        ("distil student", "4x64 8x128 "),
        ("evaluate student distilled", "4x64 "),
        ("export student", "4x64 "),
    ]


def test_a_chain(tmp_path: Path) -> None:
    """Each student is cut from the one before it, distilled, by scores of its own, and taught by it."""
    asked = ["run.students={a: {num_layers: 6}, b: {num_layers: 4}, c: {num_layers: 2}}", "distill.tokens=4096"]
    found = works(tmp_path, *asked, "run.chain=true")
    assert [each for each in found if each[0].startswith(("score", "prune", "distil"))] == [
        ("score the teacher", "8x128 "),
        ("prune a", "6x128 8x128 "),
        ("distil a", "6x128 8x128 "),
        ("score a", "6x128 "),
        ("prune b", "4x128 6x128 "),
        ("distil b", "4x128 6x128 "),
        ("score b", "4x128 "),
        ("prune c", "2x128 4x128 "),
        ("distil c", "2x128 4x128 "),
    ]
    apart = dict(works(tmp_path, *asked))
    assert apart["distil c"] == "2x128 8x128 " and "score b" not in apart


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["student.num_layers=4"], r"run\.chain=true cuts .* but the recipe has one student: name two or more"),
        (
            ["run.students={a: {num_layers: 6}, b: {num_layers: 4}}", "distill.teacher=cache:targets"],
            r"run\.chain=true lets .* but distill\.teacher=cache:targets teaches them all: leave one of the two out",
        ),
    ],
)
def test_a_chain_that_cannot_be(tmp_path: Path, words: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        works(tmp_path, *words, "distill.tokens=4096", "run.chain=true")


def test_a_run_that_makes_its_own_cache(tmp_path: Path) -> None:
    asked = ["student.num_layers=4", "distill.tokens=4096", "run.cache=true"]
    found = works(tmp_path, *asked)
    assert found[1:3] == [("cache the teacher's targets", "8x128 "), ("score the teacher", "8x128 ")]
    assert dict(found)["distil student"] == "4x128 "


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["run.chain=true"],
            r"run\.chain=true lets each student teach the next, and run\.cache=true makes its own: leave",
        ),
        (
            ["distill.teacher=cache:targets"],
            r"distill\.teacher=cache:targets names targets that are there, and run\.cache",
        ),
    ],
)
def test_a_cache_that_does_not_serve(tmp_path: Path, words: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        works(tmp_path, *words, "student.num_layers=4", "distill.tokens=4096", "run.cache=true")


def test_a_corrected_teacher_and_a_cache(tmp_path: Path) -> None:
    """A cache teaches in the teacher's place: no model runs beside the student."""
    asked = ["student.num_layers=4", "correct.tokens=4096", "distill.tokens=4096", "distill.teacher=cache:targets"]
    found = dict(works(tmp_path, *asked))
    assert found["correct the teacher"] == "8x128 " and found["distil student"] == "4x128 "


def test_without_a_budget_there_is_no_training(tmp_path: Path) -> None:
    assert [title for title, _ in works(tmp_path)] == ["evaluate teacher", "score the teacher"]


@pytest.mark.parametrize("key", ["student.checkpoint", "distill.load"])
def test_a_student_that_is_there(tmp_path: Path, key: str) -> None:
    """Pruned already: its shape is read, and need not be asked for."""
    (tmp_path / "student").mkdir()
    save_architecture(TEACHER.replace(num_layers=3), tmp_path / "student" / "architecture.yaml")
    found = dict(works(tmp_path, f"{key}={tmp_path}/student", "distill.tokens=4096"))
    assert found["distil student"] == "3x128 8x128 "
