"""What `search` refuses of the training of candidates, before anything is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.world import World
from tests.distributed.models import tiny
from tests.distributed.search.searching import BATCH, NAMES, SHAPES, recipe_of, trials_of

PHASES = f"distill.phases=[{{tokens: {4 * BATCH}}}, {{sequence_length: 16}}]"
REFUSED: list[tuple[list[str], str]] = [
    (["search.tokens=0"], "search.tokens is not given: name the tokens of each candidate, as 100M"),
    (["distill.tokens=0"], "search.tokens=512 is more than distill.tokens=0, of which search.schedule=distill"),
    (["search.tokens=2000"], "search.tokens=2000 is more than distill.tokens=1,024, of which search.schedule=distill"),
    (["search.schedule=search", PHASES], "search.schedule=search has a budget of its own, which distill.phases"),
    (["search.halving.rungs=[256,128]"], "search.halving.rungs=[256, 128] must rise, in whole global batches"),
    (["search.halving.rungs=[129,130]"], "at iteration 4: the rungs are at 2, 2: name others"),
    (["search.halving.rungs=[512]"], "below search.tokens=512, which ends at iteration 4: the rungs are at 4"),
    (["search.side_by_side=3"], "search.side_by_side=3 does not divide the 4 ranks"),
    (
        ["search.side_by_side=4", "parallel.tensor=2"],
        "search.side_by_side=4 leaves each candidate 1 of the 4 ranks, and one copy takes parallel.tensor=2 x "
        "parallel.pipeline=1 = 2: set search.side_by_side=2, start a multiple of 8 ranks, or change parallel.*",
    ),
    (["search.side_by_side=4", "parallel.tensor=8"], "parallel.tensor=8 x parallel.pipeline=1 = 8 ranks for one copy"),
    (["distill.correct_teacher=true"], "distill.correct_teacher=true would give every candidate another teacher"),
    (["prune.steps=2"], "prune.steps=2 scores between its steps, which only `run` does: leave prune.steps out here"),
    (["prune.depth_metric=lm_loss"], "prune.depth_metric=lm_loss is not measured for blocks of 1 layer"),
    (["parallel.tensor=4"], "parallel.tensor=4"),
    (["teacher.checkpoint=@/none"], "teacher.checkpoint=@/none is not there"),
    (["scores=@/tokenizer.model"], "scores=@/tokenizer.model exists and is not a scores file"),
    (["distill.top_k=2000"], "distill.top_k=2000 is more than the student's vocab_size=1003"),
    (["distill.global_batch_size=6"], "distill.global_batch_size=6 is not a multiple of"),
    (["data.valid=@/none"], "data.valid=@/none"),
    (["distill.teacher=cache:@/none"], "distill.teacher=cache:@/none"),
]


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    return corpus_with_teacher("refused")


def resolve(root: Path, overrides: list[str], size: int = 4) -> Any:
    return trials_of(root, root / "search", overrides, World(size=size, local_size=size), SHAPES)


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[words[0][:40] for words, _ in REFUSED])
def test_refused(overrides: list[str], words: str, root: Path) -> None:
    with pytest.raises(InputError) as refused:
        resolve(root, overrides)
    assert words.replace("@", str(root)) in str(refused.value)
    assert not (root / "search").exists()


def test_what_is_resolved(root: Path) -> None:
    trials = resolve(root, ["search.side_by_side=2", f"search.halving.rungs=[{BATCH + 1}]", "distill.exit_interval=3"])
    assert [trial.name for trial in trials.trials] == NAMES
    assert trials.stops == ((2, 2 * BATCH), (4, 4 * BATCH)) and trials.world.size == 2
    assert sorted(item.key for item in trials.reads) == ["data.train", "data.valid", "teacher.checkpoint"]
    assert trials.largest.architecture == max((trial.architecture for trial in trials.trials), key=memory_of)
    assert [item.path for item in trials.makes] == [
        str(root / "search" / name) for name in ("scores.safetensors", "winner")
    ]
    job = trials.training(trials.trials[1])
    assert job.architecture == tiny("llama", **SHAPES[1]) and job.timetable.iterations == 8 and not job.resumes
    assert job.folder == root / "search" / "candidates" / NAMES[1] / "distilled"
    assert job.config.exit_interval is None, "a candidate that stops would leave the one beside it waiting"
    assert resolve(root, ["search.train=false", "search.tokens=0"]) is None


def test_a_schedule_of_its_own(root: Path) -> None:
    """It is that of a distillation for search.tokens, whatever distill.tokens is."""
    own = resolve(root, ["search.schedule=search"])
    assert own.largest.timetable.tokens == own.largest.config.tokens == 4 * BATCH == own.stops[-1][1]
    assert own.made_with == resolve(root, [f"distill.tokens={4 * BATCH}"]).made_with != resolve(root, []).made_with


def memory_of(architecture: Any) -> int:
    """Of three candidates that are trained alike; what a layer needs is little beside that."""
    return architecture.num_parameters


def test_dry_run(root: Path) -> None:
    from minitron_mcore.jobs.dry_run import dry_run
    from minitron_mcore.jobs.job import resolve as resolve_job

    grid = ["search.num_layers=[3,4]", "search.ffn_hidden_size=[64,96]", "output=@/search", "search.side_by_side=2"]
    world = World(size=4, local_size=4)
    shown = dry_run("search", resolve_job("search", recipe_of(root, grid), world), world)
    assert f"tries 3 candidates for {4 * BATCH} tokens, 2 at a time on 2 ranks each; the one that needs most" in shown
    pair = World(size=2, local_size=2)
    assert ", 2 at a time on 1 rank each; " in dry_run(
        "search", resolve_job("search", recipe_of(root, grid), pair), pair
    )
    assert (
        f"trains the first {4 * BATCH} tokens of 8 iterations of 4 x 32 tokens" in shown
        and "memory of a rank: forecast" in shown
    )
    assert shown.count("teacher.checkpoint=") == 1 and not (root / "search").exists()


@pytest.mark.parametrize("name", [NAMES[0], "l1-h48-f96-q6-g2"], ids=["of the same shape", "of another grid"])
def test_a_folder_of_another_search_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    """Unless only the grid, the layout or the number of tokens differs."""
    made_with = resolve(root, []).made_with
    result = {"name": name, "zero_shot": 7.0, "loss": 7.0, "curve": [[0, 7.0]], "tokens": 2 * BATCH, "rung": 1}
    folder = tmp_path / "candidates" / name
    folder.mkdir(parents=True)

    def resolve_here(overrides: list[str]) -> Any:
        return trials_of(root, tmp_path, overrides, World(size=2, local_size=2), SHAPES)

    (folder / "result.json").write_text(json.dumps({**result, "made_with": made_with}))
    for overrides in ([], ["parallel.tensor=2"], [f"search.tokens={6 * BATCH}"], ["search.side_by_side=2"]):
        assert resolve_here(overrides).made_with == made_with
    others = ["data.eod_mask_loss=true", "teacher.precision=bf16", "distill.hidden_states.sites=[embedding]"]
    others += ["seed=5", "distill.lr=2e-2", "prune.layers=contiguous", "evaluate.samples=9", "importance.num_samples=7"]
    for other in [*others, f"search.halving.rungs=[{BATCH}]", "data.valid=@/email_text_document"]:
        with pytest.raises(InputError, match="was ranked by another search") as refused:
            resolve_here([other])
        assert refused.value.key == "output" and refused.value.value == folder
    with pytest.raises(InputError, match=f"search.tokens={BATCH} is less than the {2 * BATCH}"):
        resolve_here([f"search.tokens={BATCH}"])
    (folder / "result.json").write_text("{}")
    with pytest.raises(InputError, match="not the result of a candidate"):
        resolve_here([])
