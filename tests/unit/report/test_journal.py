"""What `run` notes while it walks; a page that cannot be written fails nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minitron_mcore.jobs.iterate import Step
from minitron_mcore.jobs.run import RunJob
from minitron_mcore.recipe import load_recipe, to_yaml
from minitron_mcore.report import journal
from minitron_mcore.report.gather.place import find_place
from minitron_mcore.report.gather.road import find_road
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.world import World
from minitron_mcore.stages.run import run, tell
from tests.unit.report.run_folder import recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run" / "done").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(to_yaml(recipe(tmp_path / "run")))
    return tmp_path / "run"


def test_what_is_noted_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/minitron", "run", "--config", "a recipe.yaml"])
    journal.note_start(folder, 2, "cpu")
    journal.note(folder, "step", name="score", title="score the teacher", seconds=1.5)
    forecast = {"weights": 3, "gradients": 4}
    journal.note(folder, "step", name="train-teacher", title="train the teacher", seconds=9, forecast=forecast)
    (folder / "done" / "score.json").write_text("1")
    road = find_road(find_place(folder), ())
    assert road is not None and not road.is_whole and road.forecasts == {"train the teacher": 7.0}
    (start,) = road.starts
    assert start.command == "minitron run --config 'a recipe.yaml'" and (start.ranks, start.device) == (2, "cpu")
    assert {"minitron_mcore", "Python", "torch", "megatron-core"} <= start.versions.keys()
    assert [(step.title, step.is_done, step.seconds) for step in road.steps] == [("score the teacher", True, 1.5)]


def test_a_step_that_is_done_is_looked_for_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks agree on it."""
    looked: list[Path] = []
    is_file = Path.is_file

    def look(path: Path) -> bool:
        looked.append(path)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", look)
    told = load_recipe(None, [f"output={folder}"])
    row = {"lm loss": 2.5, "ppl": 12.2, "parameters": 10, "tokens": 0, "samples": 4, "sequence_length": 8}
    steps = [Step(f"evaluate {name}", name, "evaluate", told) for name in ("teacher", "student")]
    for step in steps:
        step.mark(folder).write_text(json.dumps(row))
    job = RunJob(told, folder=folder, world=World(), steps=tuple((step, None) for step in steps))
    monkeypatch.setattr("minitron_mcore.stages.run.tell", lambda job: None)
    assert run(job, Runtime(0, 1, 0, torch.device("cpu"))) == {"teacher": row, "student": row}
    assert [path for path in looked if path.parent.name == "done"] == [step.mark(folder) for step in steps]


def test_a_run_is_done_without_its_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = load_recipe(None, [f"output={folder}", f"report.output={folder}"])
    tell(RunJob(told, folder=folder, world=World(), steps=()))
    said = capsys.readouterr().out
    assert said == f"WARNING: no report was written: report.output={folder} is a folder: name a file\n"
    tell(RunJob(load_recipe(None, [f"output={folder}"]), folder=folder, world=World(), steps=()))
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    assert "<h1>run</h1>" in (folder / "report.html").read_text()
