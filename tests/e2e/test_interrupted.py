"""`run` on two ranks, interrupted in every one of its steps: the same command goes on, to the same end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.interrupted import compare
from tests.e2e.test_run import write_recipe

# Every kind of step once: one student, no baselines.
SHORT = ("run.students={width: {hidden_size: 36, ffn_hidden_size: 64}}", "run.baselines=[]")


@pytest.mark.slow  # test_killed.py interrupts a training, test_run.py a walk
@pytest.mark.timeout(900)  # a walk, and one more that is interrupted in each of its steps
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_every_step(name: str, tmp_path: Path) -> None:
    compare(write_recipe(tmp_path), tmp_path, 2, [name], SHORT)
