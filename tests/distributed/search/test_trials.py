"""The ranking half of `search`: a candidate is the student that `prune` and `distill` make by way of files, and the
winner the beginning of its distillation, bit for bit: nothing is computed in another order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minitron_mcore.checkpoint.folder import latest_iteration
from tests.distributed.ranks import run_on_ranks
from tests.distributed.search.searching import BATCH, COMMON, NAMES, SHAPES, rows_of, search_on_rank, weights_of
from tests.e2e.verbs import all_run_well, minitron


def commanded(root: Path, verb: str, *overrides: str) -> list[str]:
    kept = [text for text in COMMON if not text.startswith("search.")]
    return [verb, *(text.replace("@", str(root)) for text in [*kept, *overrides])]


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    return corpus_with_teacher("trials")


@pytest.fixture(scope="module")
def searched(root: Path) -> tuple[list[dict[str, Any]], str]:
    return run_on_ranks(search_on_rank, 1, root, root / "search")[0]


@pytest.fixture(scope="module")
def by_files(root: Path, searched: tuple[list[dict[str, Any]], str]) -> dict[str, Any]:
    """The best candidate's plan carried out by `prune`, `evaluate` and a `distill` that does not stop."""
    plan = f"plan=@/search/candidates/{searched[0][0]['name']}/plan.json"
    student = "student.checkpoint=@/files/pruned"
    commands = [
        commanded(root, "prune", plan, student),
        commanded(root, "evaluate", "checkpoint=@/files/pruned", "results=@/files/results.json"),
        commanded(root, "distill", student, "distill.checkpoint=@/files/distilled", "distill.save_interval=4"),
    ]
    all_run_well(commands)
    return json.loads((root / "files" / "results.json").read_text())


def assert_same_weights(folder: Path, other: Path, iteration: int) -> None:
    ours, theirs = (run_on_ranks(weights_of, 1, each, iteration)[0] for each in (folder, other))
    assert ours.keys() == theirs.keys() and len(ours) > 8
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0, msg=key)


def test_results_are_ranked(root: Path, searched: tuple[list[dict[str, Any]], str]) -> None:
    results, shown = searched
    assert {result["name"] for result in results} == {*NAMES}
    losses = [result["loss"] for result in results]
    assert losses == sorted(losses) and len({*losses}) == 3
    for result in results:
        assert result["tokens"] == 4 * BATCH and result["rung"] == 1 and result["diverged"] is None
        assert result["curve"] == [[0, result["zero_shot"]], [4 * BATCH, result["loss"]]]
        assert [tokens for tokens, _ in result["validation"]] == [4 * BATCH]
        folder = root / "search" / "candidates" / result["name"]
        assert json.loads((folder / "result.json").read_text()) == result
    assert "[3/3]" in shown and shown.count("teacher: weights finite") == 3


def test_a_candidate_is_what_prune_and_distill_give(
    root: Path, searched: tuple[list[dict[str, Any]], str], by_files: dict[str, Any]
) -> None:
    best = searched[0][0]
    assert best["zero_shot"] == by_files["lm loss"]
    candidate = root / "search" / "candidates" / best["name"] / "distilled"
    assert_same_weights(candidate, root / "files" / "distilled", 4)
    assert rows_of(candidate) == rows_of(root / "files" / "distilled")[:4]


def test_distill_goes_on_from_the_winner(
    root: Path, searched: tuple[list[dict[str, Any]], str], by_files: dict[str, Any]
) -> None:
    winner = root / "search" / "winner"
    student = ["student.checkpoint=@/search/winner/pruned", "distill.checkpoint=@/search/winner/distilled"]
    all_run_well(
        [
            commanded(root, "distill", *student),
            commanded(root, "export", "checkpoint=@/search/winner/distilled", "hf=@/search/hf"),
        ]
    )
    assert_same_weights(winner / "distilled", root / "files" / "distilled", 8)
    assert_same_weights(winner / "pruned", root / "files" / "pruned", 0)
    assert rows_of(winner / "distilled") == rows_of(root / "files" / "distilled")
    # The candidate's own files are as they were.
    candidate = root / "search" / "candidates" / searched[0][0]["name"]
    assert len(rows_of(candidate / "distilled")) == 4
    ours, theirs = (
        yaml.safe_load((each / "distilled" / "lineage.yaml").read_text()) for each in (candidate, root / "files")
    )
    assert ours["student"]["plan"]["fingerprint"] == theirs["student"]["plan"]["fingerprint"]
    assert ours["teacher"] == theirs["teacher"] and ours["tokenizer"] == theirs["tokenizer"]
    assert (winner / "plan.json").read_bytes() == (candidate / "distilled" / "plan.json").read_bytes()
    assert json.loads((root / "search" / "hf" / "config.json").read_text())["head_dim"] == 16


def test_the_same_command_does_nothing_again(root: Path, searched: tuple[list[dict[str, Any]], str]) -> None:
    ((results, shown),) = run_on_ranks(search_on_rank, 1, root, root / "search")
    assert results == searched[0] and "distill:" not in shown and "iteration" not in shown
    assert latest_iteration(root / "search" / "winner" / "distilled") == 8, "it has been trained further since"


# That a candidate behind another is what it is alone is shown above, and a teacher in a layout of its own in
# tests/distributed/distillation/test_teacher_layout.py.
@pytest.mark.slow
def test_one_teacher_serves_every_candidate(root: Path) -> None:
    """In a layout of its own, giving the states that each needs: a candidate is the same behind another as alone."""
    sites = ["distill.hidden_states.sites=[block_output]", "teacher.parallel.tensor=2"]
    both = run_on_ranks(search_on_rank, 2, root, root / "both", sites, SHAPES[:2])[0][0]
    (alone,) = run_on_ranks(search_on_rank, 2, root, root / "alone", sites, SHAPES[1:2])[0][0]
    assert alone in both and len(both) == 2


@pytest.mark.slow  # `distill` finds its teacher by the same function
def test_from_a_cache(root: Path, searched: tuple[list[dict[str, Any]], str]) -> None:
    """Of the teacher's whole distribution in fp32, whose rounding 4 steps of Adam carry into the loss."""
    cache = ["cache.folder=@/targets", "cache.method=top_k", "cache.top_k=0", "cache.dtype=fp32"]
    all_run_well([commanded(root, "cache", *cache)])
    overrides = ["distill.teacher=cache:@/targets"]
    (result,) = run_on_ranks(search_on_rank, 1, root, root / "cached", overrides, SHAPES[:1])[0][0]
    (running,) = [each for each in searched[0] if each["name"] == result["name"]]
    assert result["zero_shot"] == running["zero_shot"]
    assert result["loss"] == pytest.approx(running["loss"], abs=1e-4)


def test_candidates_that_diverge_are_given_up(root: Path) -> None:
    """Where none is left, the search says so when all is written, and a second one says it again."""
    folder = root / "diverged"
    grid = ["search.ffn_hidden_size=[64]", f"search.tokens={4 * BATCH}", f"output={folder}"]
    command = commanded(root, "search", "distill.lr=1e30", "distill.max_skipped_iterations=1", *grid)
    (code, shown), (code_again, shown_again) = minitron(*command), minitron(*command)
    assert code == code_again == 1
    assert f"{NAMES[0]}: diverged before {4 * BATCH} tokens" in shown and not (folder / "winner").exists()
    told = f"every candidate diverged, as {NAMES[0]}: "
    assert told in shown.splitlines()[-1] and told in shown_again and "distill:" not in shown_again
    result = json.loads((folder / "candidates" / NAMES[0] / "result.json").read_text())
    assert result["loss"] is None and "ends the run" in result["diverged"]
    assert result["curve"] == [[0, result["zero_shot"]], [4 * BATCH, None]]


@pytest.mark.slow  # what a first winner needs is shown above
def test_another_winner_makes_room(root: Path, searched: tuple[list[dict[str, Any]], str]) -> None:
    """Unless it has been trained further."""
    folder, names = root / "grown", [result["name"] for result in searched[0]]
    plan = folder / "winner" / "plan.json"
    shapes = {name: shape for name, shape in zip(NAMES, SHAPES, strict=True)}

    def search(count: int) -> str:
        """With the worst `count` candidates."""
        return run_on_ranks(search_on_rank, 1, root, folder, [], [shapes[name] for name in names[-count:]])[0][1]

    search(1)
    first = plan.read_bytes()
    assert f"the best candidate, {names[1]} -> " in search(2)
    second = plan.read_bytes()
    assert second != first and len(rows_of(folder / "winner" / "distilled")) == 4
    (folder / "winner" / "distilled" / "latest_checkpointed_iteration.txt").write_text("5")
    (folder / "winner" / "distilled" / "iter_0000004").rename(folder / "winner" / "distilled" / "iter_0000005")
    assert (
        f"{folder / 'winner'} holds another candidate, trained further since: {folder}/candidates/{names[0]}"
        in search(3)
    )
    assert plan.read_bytes() == second
