"""The papers' claims in configs/reproduce: what each would do, and that the papers' own values are what they claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_mcore.architecture import Architecture
from minitron_mcore.jobs.job import Model
from minitron_mcore.jobs.reproduce import ReproduceJob, changed, resolve
from minitron_mcore.jobs.train import TrainingJob
from minitron_mcore.recipe import Recipe, load_recipe
from minitron_mcore.reproduction.config import parse_orders
from minitron_mcore.runtime.world import World
from tests.refusals import refuses

FOLDER = Path(__file__).parents[3] / "configs" / "reproduce"
CLAIMS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "cpu")
SCALES = ["", "gpu/"]
DISTILLED = ["score", "prune-student", "distill-student"]
# Of arms that do more, or less, than to score, prune and distil: the steps.
STEPS = {
    ("chain", "chain"): ["score", "prune-middle", "distill-middle", "score-last", "prune-last", "distill-last"],
    ("compute", "next-token"): ["score", "prune-student", "baseline-next_token"],
    ("compute", "from-scratch"): ["baseline-random"],
    ("correction", "corrected"): ["correct-teacher", *DISTILLED],
    ("iterative", "two-steps"): [
        *("score", "prune-student-step-1", "score-student-step-2", "prune-student", "distill-student"),
    ],
    ("targets", "sampled"): ["cache", *DISTILLED],
    ("targets", "likeliest"): ["cache", *DISTILLED],
    ("shapes", "before-depth"): ["score", "prune-student"],
    ("shapes", "after-random"): DISTILLED,
}


def recipe_of(name: str, folder: Path, *more: str) -> Recipe:
    return load_recipe(str(FOLDER / f"{name}.yaml"), [f"output={folder}/new", *more])


def test_all_are_there() -> None:
    """The papers' eight, and a newer one, at either scale."""
    assert sorted(path.stem for path in (FOLDER / "gpu").glob("*.yaml") if path.stem != "scale") == CLAIMS
    assert len(CLAIMS) == 9 and sorted(recipe_of(name, Path()).name for name in CLAIMS) == CLAIMS


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CLAIMS)
def test_the_papers_values_are_what_it_claims(name: str, scale: str, tmp_path: Path) -> None:
    config = recipe_of(scale + name, tmp_path).reproduce
    values = {arm: each.paper for arm, each in config.arms.items()}
    assert config.claim and "arXiv" in str(config.source)
    for order in parse_orders(config.orders, [*config.arms]):
        left, right = values[order.left], values[order.right]
        if left is not None and right is not None:
            assert left < right if order.relation == "<" else abs(left - right) < config.margin, order


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CLAIMS)
def test_each_arm_does_what_its_model_needs(name: str, scale: str, tmp_path: Path) -> None:
    seeds = [1, 7] if name == "correction" else [7]
    job = resolve(recipe_of(scale + name, tmp_path, f"reproduce.seeds={seeds}"), World())
    shared = [[step.word for step, _ in run.steps] for run in job.shared]
    teacher = "deep-teacher" if name == "half-depth" and not scale else "teacher"
    assert shared[0] == ["tokenizer", "preprocess", *(f"train-{teacher}-seed-{seed}" for seed in seeds)]
    assert shared[1:] == ([["preprocess"]] if name == "correction" else [])
    assert [*dict.fromkeys(arm.seed for arm in job.arms)] == seeds
    for arm in job.arms:
        steps = [step.word for step, _ in arm.run.steps]
        usual = DISTILLED[:-1] if name == "aggregations" else DISTILLED
        if (name, arm.name) in STEPS or name not in ("iterative", "shapes"):
            assert steps == STEPS.get((name, arm.name), usual), arm.name
        assert all(step.recipe.seed == arm.seed for step, _ in arm.run.steps)
        teachers = {step.recipe.teacher.checkpoint for step, _ in arm.run.steps if step.verb == "score"}
        of_seed = f"{tmp_path}/new/teachers/{teacher}-seed-{arm.seed}"
        assert arm.name in ("corrected", "chain", "two-steps", "four-steps", "progressive") or teachers <= {of_seed}
    assert not (tmp_path / "new").exists()


def test_targets_that_would_not_serve(tmp_path: Path) -> None:
    """Before anything is made: what is drawn serves one divergence."""
    rule = f"needs more of the teacher than distill.teacher=cache:{tmp_path}/new/targets/sampled/seed-1/targets holds"
    with refuses("distill.logit_loss", "reverse_kl", rule, "choose of these, or leave distill.teacher out"):
        resolve(recipe_of("targets", tmp_path, "reproduce.seeds=[1]", "distill.logit_loss=reverse_kl"), World())


def architectures(job: ReproduceJob, verbs: tuple[str, ...]) -> dict[str, Architecture]:
    """Of what each arm's last step of `verbs` makes."""
    return {
        arm.name: made.architecture
        for arm in job.arms
        for step, each in arm.run.steps
        if each and step.verb in verbs
        for made in each.makes
        if isinstance(made, Model)
    }


@pytest.mark.parametrize(("scale", "size"), [("", 1.573e6), ("gpu/", 50.34e6)])
def test_five_students_of_one_size(scale: str, size: float, tmp_path: Path) -> None:
    """The shapes of table 1 are comparable as they have as many parameters, within one percent of each other."""
    job = resolve(recipe_of(f"{scale}shapes", tmp_path, "reproduce.seeds=[1]"), World())
    counts = {name: each.num_parameters for name, each in architectures(job, ("prune", "train")).items()}
    assert len(counts) == 9 and all(abs(count / size - 1) < 0.01 for count in counts.values()), counts


@pytest.mark.parametrize("scale", SCALES)
def test_half_the_depth_is_all_that_is_cut(scale: str, tmp_path: Path) -> None:
    job = resolve(recipe_of(f"{scale}half-depth", tmp_path, "reproduce.seeds=[1]"), World())
    (teacher,) = (each.architecture for step, each in job.shared[0].steps if isinstance(each, TrainingJob))
    for name, student in architectures(job, ("prune",)).items():
        width = (student.hidden_size, student.ffn_hidden_size) == (teacher.hidden_size, teacher.ffn_hidden_size)
        assert (width, student.num_layers) == ((False, 12) if name.startswith("width") else (True, 6)), name


def test_a_change_is_read_as_on_the_command_line(tmp_path: Path) -> None:
    recipe = recipe_of("losses", tmp_path)
    found = changed(recipe, {"distill.tokens": "2M", "student": {}, "distill": {"lr": "2e-4"}}, "here")
    assert (found.distill.tokens, found.distill.lr, found.student.hidden_size) == (2_000_000, 2e-4, None)
    assert found.distill.lr_warmup_iters == recipe.distill.lr_warmup_iters
    with refuses("here.distill.tokens", -1, "must be at least"):
        changed(recipe, {"distill.tokens": -1}, "here")
