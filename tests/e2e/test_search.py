"""`minitron search`: a list from a shape alone, without torch or a process group; a ranking from trials, as files,
table and plots; `run` with a grid in place of a student."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.search.searching import BATCH, COMMON, rows_of
from tests.e2e.verbs import minitron, run_well

ROOT = Path(__file__).parents[2]
TEACHER = ["model.num_layers=4", "model.hidden_size=48", "model.ffn_hidden_size=96", "model.num_attention_heads=6"]
TEACHER += ["model.vocab_size=100"]
GRID = ["search.train=false", "search.num_layers=[2-4]", "search.ffn_ratio=[1,2]"]


def test_the_table_and_both_files_agree(tmp_path: Path) -> None:
    """Counts from 2 x 100 x 48 embeddings, 4 x 48 x 48 attention, 3 x 48 x ffn MLP, norms."""
    shown = run_well("search", *TEACHER, *GRID, f"output={tmp_path}/new", "search.budget.memory=[null,800000]")
    counts = {(L, r): 9600 + 48 + L * (4 * 48 * 48 + 3 * 48 * 48 * r + 96) for L in (2, 3, 4) for r in (1, 2)}
    # In bf16, with the keys and values of 1,152 tokens.
    memory = {(L, r): 2 * count + 1152 * L * 2 * 48 * 2 for (L, r), count in counts.items()}
    within = [sizes for sizes, size in memory.items() if size <= 800000]
    assert 0 < len(within) < 5 and f"5 shapes that can be pruned and laid out, {len(within)} within" in shown
    assert "search: 1 left out: it is the teacher\n" in shown
    expected = [[L, 48, 48 * r, 6, 6, counts[L, r], counts[L, r] - 9600, memory[L, r]] for L, r in within]
    lines = shown.split("\n\n")[1].splitlines()[1:]
    assert [[int(cell.replace(",", "")) for cell in line.split()] for line in lines] == expected
    described = json.loads((tmp_path / "new" / "candidates.json").read_text())
    with (tmp_path / "new" / "candidates.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [{key: str(value) for key, value in each.items()} for each in described["candidates"]] == rows
    assert [int(row["total_parameters"]) for row in rows] == [row[5] for row in expected]
    assert described["budgets"] == {"tolerance": 0.05, "memory": [None, 800000]}
    assert (described["combinations"], described["shapes"]) == (6, 5)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["candidates.csv", "candidates.json"]


def test_no_torch_is_needed_and_any_device_says_its_latency(tmp_path: Path) -> None:
    words = ["search", *TEACHER, *GRID, f"output={tmp_path}/new", "search.budget.latency=[1e-9,null]"]
    program = (
        f"import sys; from minitron_mcore.cli import main; code = main({[*words, 'cluster.device=H100']})\n"
        "print(code, [name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done
    rows = json.loads((tmp_path / "new" / "candidates.json").read_text())["candidates"]
    assert len(rows) == 5 and all(0 < row["prefill_latency"] < row["latency"] for row in rows)
    assert rows[0]["latency"] < rows[-1]["latency"], "two layers are quicker than four"


# Of the tiny teacher: 4 layers, hidden 48, ffn 96, 6 heads in 2 groups; three of the four shapes are within the budget.
SHORT = ["search.num_layers=[3,4]", "search.ffn_hidden_size=[64,96]", "search.halving.keep=0.6"]
RUNGS = [f"search.halving.rungs=[{2 * BATCH}]"]


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    return corpus_with_teacher("search")


@pytest.fixture(scope="module")
def shown(root: Path) -> str:
    return run_well(*commanded(root, *SHORT, *RUNGS))


def commanded(root: Path, *overrides: str) -> list[str]:
    words = ["search", *COMMON, "output=@/new", "search.budget.total_parameters=[150k,null]", *overrides]
    return [text.replace("@", str(root)) for text in words]


def test_a_search_ends_with_its_ranking(root: Path, shown: str) -> None:
    """The table, the files and the results of the candidates say the same."""
    from matplotlib.image import imread

    folder = root / "new"
    results = [json.loads(file.read_text()) for file in folder.glob("candidates/*/result.json")]
    full = sorted((each for each in results if each["rung"] == 2), key=lambda each: each["loss"])
    (stopped,) = (each for each in results if each["rung"] == 1)
    order = [*full, stopped]
    assert len(full) == 2
    body = shown[shown.index("rank  before") :].splitlines()[1:4]
    assert [line.split()[2] for line in body] == [each["name"] for each in order]
    assert [line.split()[5] for line in body] == [f"{each['loss']:.4f}" for each in order]
    described = json.loads((folder / "candidates.json").read_text())
    rows = described["candidates"]
    assert [row["name"] for row in rows] == [each["name"] for each in order] and [row["rank"] for row in rows] == [
        1,
        2,
        3,
    ]
    for row, each in zip(rows, order, strict=True):
        assert {name: row[name] for name in ("loss", "zero_shot", "tokens", "curve", "validation")} == {
            name: each[name] for name in ("loss", "zero_shot", "tokens", "curve", "validation")
        }
    before = sorted(each["zero_shot"] for each in order)
    squares = sum((before.index(each["zero_shot"]) - place) ** 2 for place, each in enumerate(order))
    assert described["correlation"] == pytest.approx(1 - 6 * squares / (3 * 8))
    assert f"after training: {described['correlation']:.2f}, over 3 candidates" in shown
    for name in ("search.png", "curves.png"):
        assert imread(folder / name)[..., :3].std() > 0.01
    assert f"{full[0]['name']} -> {folder}/winner/distilled" in shown
    # What `inspect` says of the folder.
    found = json.loads(run_well("inspect", str(folder), "--json"))
    assert (found["kind"], found["winner"], found["trained"]) == ("search", full[0]["name"], 3)
    assert [(name, row["rank"], row["loss"]) for name, row in found["candidates"].items()] == [
        (each["name"], place, each["loss"]) for place, each in enumerate(order, start=1)
    ]
    assert found["correlation"] == described["correlation"]
    assert {Path(path).relative_to(folder).as_posix() for path in found["checkpoints"]} >= {"winner/distilled"}


def test_a_list_does_not_lose_what_is_known(root: Path, shown: str) -> None:
    before = (root / "new" / "candidates.json").read_text()
    listed = run_well(*commanded(root, *SHORT, "search.train=false"))
    assert "3 within the budgets" in listed and "rank" not in listed
    assert (root / "new" / "candidates.json").read_text() == before


def test_another_teachers_list_is_not_written_over_it(root: Path, shown: str) -> None:
    before = (root / "new" / "candidates.json").read_text()
    code, said = minitron("search", *TEACHER, *GRID, f"output={root}/new")
    assert code == 2 and "holds a search below another teacher: name another folder" in said
    assert (root / "new" / "candidates.json").read_text() == before


def test_a_list_that_is_cut_off_is_refused(root: Path, shown: str) -> None:
    file = root / "new" / "candidates.json"
    before = file.read_text()
    file.write_text(before[:40])
    try:
        code, said = minitron(*commanded(root, *SHORT, "search.train=false"))
        assert code == 2 and f"output={file} is not the list that a search writes (" in said, said
        assert "Traceback" not in said and file.read_text() == before[:40]
    finally:
        file.write_text(before)


def test_candidates_that_could_not_be_exported_are_told_beforehand(root: Path) -> None:
    """Six heads do not divide 40 channels; transformers refuses that of Llama, whatever the head dimension."""
    odd = ["search.hidden_size=[40]", "search.num_layers=[3]", "search.ffn_hidden_size=[64]"]
    planned = run_well(*commanded(root, *odd, "output=@/told", "search.budget.total_parameters=null", "--dry-run"))
    assert "WARNING: l3-h40-f64-q6-g2: hidden_size=40 of student is not a multiple" in planned
    words = [*run_words(root, *odd, "output=@/odd", "search.budget.total_parameters=null"), "search.most=null"]
    code, said = minitron(*[word.replace("@", str(root)) for word in words])
    assert code == 2 and "search has candidates that could not be exported in the end, as l3-h40" in said


def test_the_same_command_trains_none_again(root: Path, shown: str) -> None:
    again = run_well(*commanded(root, *SHORT, *RUNGS))
    assert "lm loss" not in again and again[again.index("rank  ") :] == shown[shown.index("rank  ") :]


# `run` with a grid in place of a student: the winner's distillation goes on where its trial ended.
RUN_GRID = ["search.num_layers=[3,4]", "search.hidden_size=[36]", "search.ffn_hidden_size=[64,96]", "search.most=3"]
RUN_GRID += ["search.budget.total_parameters=[100k,null]", "run.baselines=[random]"]


def run_words(root: Path, *overrides: str) -> list[str]:
    return [text.replace("@", str(root)) for text in ["run", *COMMON, *RUN_GRID, "output=@/run", *overrides]]


@pytest.fixture(scope="module")
def planned(root: Path) -> tuple[int, str]:
    return minitron(*run_words(root, "--dry-run"))


@pytest.fixture(scope="module")
def walked(root: Path, planned: tuple[int, str]) -> str:
    return run_well(*run_words(root))


def rows(root: Path) -> list[dict[str, Any]]:
    found = json.loads((root / "run" / "search" / "candidates.json").read_text())["candidates"]
    return [row for row in found if "rank" in row]


def test_the_plan_stands_for_the_largest_candidate(root: Path, planned: tuple[int, str]) -> None:
    code, said = planned
    assert code == 0 and "dry run: nothing was written" in said
    titles = ["evaluate teacher", "score the teacher", "search for the best student", "evaluate winner pruned"]
    titles += ["distil winner", "evaluate winner distilled", "export winner", "winner random weights"]
    titles.append("evaluate winner random weights")
    assert [line.partition("] ")[2] for line in said.splitlines() if line.startswith("[")] == titles
    note = "WARNING: which candidate is the best is known after the search: what follows is planned for the largest, "
    assert f"{note}l4-h36-f64-q6-g2\n" in said
    assert said.count("137,052 parameters") == 7, "made, read, read, made, read, read, made"


def test_the_winner_goes_on_from_its_trial(root: Path, walked: str) -> None:
    """It need not be the largest: the steps after the search have its own shape."""
    winner, largest = rows(root)[0], max(rows(root), key=lambda row: row["total_parameters"])
    assert winner["rank"] == 1 and len(rows(root)) == 3
    assert winner["name"] != largest["name"], "choose others, or the shapes below show nothing"
    results = json.loads((root / "run" / "results.json").read_text())
    assert [*results] == ["teacher", "winner pruned", "winner distilled", "winner random weights"]
    for name in ("winner pruned", "winner distilled", "winner random weights"):
        assert results[name]["parameters"] == winner["total_parameters"], name
    assert results["winner pruned"]["lm loss"] == winner["zero_shot"]
    assert results["winner distilled"]["tokens"] == 8 * BATCH
    folder = root / "run" / "search"
    assert f"resumed {folder}/winner/distilled at iteration 4 of 8" in walked
    trained = rows_of(folder / "winner" / "distilled")
    assert trained[: len(trained) // 2] == rows_of(folder / "candidates" / winner["name"] / "distilled")
    config = json.loads((root / "run" / "hf" / "winner" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (
        winner["num_layers"],
        winner["ffn_hidden_size"],
    )


def test_a_second_run_finds_all_done(root: Path, walked: str) -> None:
    again = run_well(*run_words(root))
    steps = [line for line in again.splitlines() if line.startswith("[")]
    assert len(steps) == 9 and all(line.endswith("done before") for line in steps)


def test_a_named_student_is_taken_and_the_grid_left(root: Path, planned: tuple[int, str]) -> None:
    code, said = minitron(*run_words(root, "--dry-run", "output=@/other", "student.num_layers=2"))
    assert code == 0 and "search for" not in said and "] prune student\n" in said
    assert "WARNING: search.* has no effect, because the recipe names its students" in said


def test_a_winner_with_a_schedule_of_its_own_is_distilled_anew(root: Path, planned: tuple[int, str]) -> None:
    code, said = minitron(*run_words(root, "--dry-run", "output=@/other", "search.schedule=search"))
    assert code == 0
    assert f"makes  distill.checkpoint={root}/other/students/winner/distilled: checkpoint" in said
    assert f"reads  student.checkpoint={root}/other/search/winner/pruned: checkpoint" in said
