"""Two supported pairs of Python and megatron-core on one machine: what either writes, the other reads and goes on with.

Slow, and skipped where the other pair is not installed (`make test-matrix` makes it). A checkpoint of megatron-core
0.19.2 is read in tests/distributed/checkpoint/test_other_versions.py, wherever that runs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.checkpoint.folder import TRACKER, latest_iteration
from tests.distributed.checkpoint import test_other_versions
from tests.e2e.launchers import ROOT, environment
from tests.e2e.test_killed import STEPS, arguments, recipe  # noqa: F401  # a fixture

pytestmark = pytest.mark.slow
CUT = 4
DIRECTIONS = [("here", "there"), ("there", "here")]


@pytest.fixture(scope="module")
def pythons() -> dict[str, str]:
    """The interpreter that runs this, and the other pair's."""
    asked = subprocess.run([ROOT / ".ci" / "matrix.sh", "python"], capture_output=True, text=True, check=True)
    if asked.stdout.strip() in ("", sys.executable):
        pytest.skip("no other pair of Python and megatron-core is installed")
    return {"here": sys.executable, "there": asked.stdout.strip()}


def run(python: str, *command: str, **variables: str) -> str:
    """What the module printed, under an interpreter; it must end well."""
    given = {**environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([python, "-m", *command], cwd=ROOT, env=given, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
def test_megatrons_own_checkpoints(pythons: dict[str, str], tmp_path: Path, writer: str, reader: str) -> None:
    """Parameters bit for bit, pruned, exported, and the logits: all of test_other_versions.py on what was just made."""
    kinds = [kind for kind in test_other_versions.KINDS if kind != "hybrid"]  # from 0.19 on
    run(pythons[writer], "tests.distributed.megatron_writer", str(tmp_path / "written"), *kinds)
    variables = {test_other_versions.WRITTEN: str(tmp_path / "written")}
    shown = run(pythons[reader], "pytest", "-q", "tests/distributed/checkpoint/test_other_versions.py", **variables)
    assert "passed" in shown and "failed" not in shown


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row["lm loss"] for row in rows if "lm loss" in row}


@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
def test_a_run_goes_on_under_the_other_pair(
    pythons: dict[str, str],
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    writer: str,
    reader: str,
) -> None:
    """The losses of the rest are those of the run that went through, to 1e-5: the second part runs at TP2, on what one
    process wrote, and other builds of torch may sum in another order."""
    run(pythons[writer], "minitron_mcore", *arguments(recipe, tmp_path / "whole"))
    expected: dict[int, float] = losses(tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut, ignore=shutil.ignore_patterns("metrics.jsonl", "iter_*"))
    shutil.copytree(tmp_path / "whole" / f"iter_{CUT:07d}", cut / f"iter_{CUT:07d}")
    (cut / TRACKER).write_text(str(CUT))
    launched = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minitron_mcore"]
    run(pythons[reader], *launched, *arguments(recipe, cut), "parallel.tensor=2")
    found: dict[int, Any] = losses(cut)
    assert sorted(found) == list(range(CUT + 1, STEPS + 1)) and latest_iteration(cut) == STEPS
    assert found == {step: pytest.approx(expected[step], rel=1e-5) for step in found}


@pytest.mark.timeout(2400)
def test_what_touches_megatron_under_the_other_pair(pythons: dict[str, str]) -> None:
    done = subprocess.run([ROOT / ".ci" / "matrix.sh", "full"], capture_output=True, text=True, timeout=2300)
    assert done.returncode == 0, done.stdout[-10000:]
