"""A sample of benchmarks/faults.py: other faults than those of its own seed, one or two of each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.launchers import ROOT, environment

FAULTS = 26


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_nothing_finished_is_lost_and_nothing_hangs(tmp_path: Path) -> None:
    words = ["benchmarks/faults.py", "--faults", str(FAULTS), "--seed", "2", "--folder", str(tmp_path / "faults")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["faults"] + facts["missed"] == FAULTS and facts["faults"] > FAULTS // 2, facts
