"""`minitron run --dry-run` of the recipes in configs/: in seconds, without megatron or a process group."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_align_recipes import RECIPES as ALIGNMENTS
from tests.e2e.test_paper_recipes import RECIPES as COMPRESSIONS

ROOT = Path(__file__).parents[2]
RANKS = {"quickstart": 2, "ablate-quickstart": 2}
# What is said of each; None: nothing is refused.
CONFIGS = {
    "quickstart": None,
    "ablate-quickstart": "teacher.checkpoint=@/runs/quickstart/teacher is not there: name the folder of a checkpoint",
}
# How many candidates each lists, by what besides.
SEARCHES: dict[str, tuple[int, list[str]]] = {
    "search-nemotron-8b": (18, []),
    "search-nemotron-4b": (18, []),
    "search-quickstart": (14, ["search.train=false", "teacher.checkpoint=configs/models/quickstart"]),
}
SECONDS = 5.0  # of a processor, however busy the machine is


def overrides(name: str, folder: Path) -> list[str]:
    """So that nothing of this machine counts: outputs and the teacher lie in a new folder."""
    given = [f"output={folder}/new", "parallel.tensor=1", "parallel.sequence=false"]
    if refusal := CONFIGS[name]:
        given.append(refusal.partition(" ")[0].replace("@", str(folder)))
    return given


def test_every_recipe_is_tried() -> None:
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert recipes == CONFIGS.keys() | SEARCHES.keys() | ALIGNMENTS.keys() | COMPRESSIONS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dry_run_of_a_recipe(name: str, tmp_path: Path) -> None:
    command = ["run", "--config", f"configs/{name}.yaml", *overrides(name, tmp_path)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    words = [sys.executable, "-m", "tests.e2e.dry_runs", str(tmp_path)]
    done = subprocess.run(words, input=json.dumps([command]), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < SECONDS
    found = json.loads(done.stdout.splitlines()[-1])
    ((code, shown, untouched),) = found["results"]
    assert untouched and found["heavy"] == []
    if CONFIGS[name] is None:
        assert code == 0 and shown.startswith("minitron run on 1 rank\n[1/20] train the tokenizer\n"), shown
        assert shown.endswith("dry run: nothing was written\n")
        return
    assert (code, shown) == (2, f"minitron run: {CONFIGS[name]}\n".replace("@", str(tmp_path)))
    words = [sys.executable, "-m", "minitron_mcore", *command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, shown) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_is_planned_for_the_ranks_that_it_is_written_for(name: str, tmp_path: Path) -> None:
    """With its own layout; without cluster.gpus the one rank that is there cannot hold it."""
    given = [word for word in overrides(name, tmp_path) if not word.startswith("parallel.")]
    words = [sys.executable, "-m", "minitron_mcore", "run", "--config", f"configs/{name}.yaml", *given, "--dry-run"]
    alone, planned = (
        subprocess.run([*words, *more], cwd=ROOT, capture_output=True, text=True)
        for more in ([], [f"cluster.gpus={RANKS[name]}"])
    )
    assert alone.returncode == 2 and alone.stderr.startswith("minitron run: parallel.tensor="), alone.stderr
    assert "parallel.tensor" not in planned.stderr
    refusal = CONFIGS[name]
    if refusal is None:
        assert "\n  memory of a rank: forecast " in planned.stdout
    else:
        assert planned.stderr == f"minitron run: {refusal}\n".replace("@", str(tmp_path))


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_listed_without_weights_or_ranks(name: str, tmp_path: Path) -> None:
    """Its layout is the candidates'; no rank is asked for."""
    count, besides = SEARCHES[name]
    command = ["search", "--config", f"configs/{name}.yaml", f"output={tmp_path}/new", *besides]
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.dry_runs", str(tmp_path)],
        input=json.dumps([command]),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    ((code, shown, untouched),) = found["results"]
    assert code == 0 and untouched and found["heavy"] == [], shown
    made = [f"makes  output={tmp_path}/new/candidates.{kind}: {count} candidates" for kind in ("json", "csv")]
    assert shown.splitlines()[1:] == [*made, "dry run: nothing was written"]
