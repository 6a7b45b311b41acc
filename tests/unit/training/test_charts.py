"""The charts of dashboards. That trainings log their names: tests/e2e/test_run.py, of a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_mcore.alignment.losses import METRICS
from minitron_mcore.training.charts import CHARTS, VALID, charted

ROOT = Path(__file__).parents[3]


def test_those_of_an_alignment_are_of_what_its_losses_give() -> None:
    assert {name.removesuffix(VALID) for name in charted("Alignment")} <= {*METRICS}


def test_no_title_comes_twice() -> None:
    titles = [chart.title for charts in CHARTS.values() for chart in charts]
    assert len({*titles}) == len(titles)


def test_the_workspace_has_every_chart() -> None:
    pytest.importorskip("wandb_workspaces", reason="pip install wandb-workspaces")
    words = [sys.executable, str(ROOT / "launch" / "wandb_workspace.py"), "team", "--print"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    sections = json.loads(done.stdout)["section"]["panelBankConfig"]["sections"]
    found = {
        section["name"]: {panel["config"]["chartTitle"]: panel["config"]["metrics"] for panel in section["panels"]}
        for section in sections
        if section["panels"]
    }
    assert found == {name: {chart.title: [*chart.names] for chart in charts} for name, charts in CHARTS.items()}
