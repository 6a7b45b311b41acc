"""`init`: which files go along with a recipe, what is refused, and the list of recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore import cli, commands
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.init import listed
from minitron_mcore.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[3]
RECIPES = [name for name, _ in listed(ROOT / "configs")]


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_names_goes_along(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the same recipe where it has been copied to, and what its head says to type is there."""
    files = commands.perform("init", path=name, output=tmp_path)
    assert {path.relative_to(tmp_path) for path in files} >= {Path(f"configs/{name}.yaml"), Path("launch/slurm.sbatch")}
    for path in files:
        original = ROOT / path.relative_to(tmp_path)
        assert path.read_bytes() == original.read_bytes() and path.stat().st_mode == original.stat().st_mode
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["minitron"])
    load_recipe(f"configs/{name}.yaml", [])
    text = (tmp_path / "configs" / f"{name}.yaml").read_text()
    for word in re.findall(r"\b(?:configs|launch)/[\w./-]*\w", text):
        assert (tmp_path / word).exists(), word


def test_a_second_time_nothing_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "quickstart"]) == 0 == cli.main(["init", "configs/quickstart.yaml"])
    recipe = tmp_path / "configs" / "quickstart.yaml"
    recipe.write_text("name: mine\n")
    assert cli.main(["init", "quickstart"]) == 2
    assert recipe.read_text() == "name: mine\n"
    assert cli.main(["init", "quickstart", "output=other"]) == 0
    assert (tmp_path / "other" / "configs" / "quickstart.yaml").is_file()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "slurm.sbatch").write_text("mine")
    tries: dict[str, dict[str, Any]] = {
        "path=quick is not a recipe of the project: choose one of ablate-quickstart, ": {"path": "quick"},
        "is a file: name a folder": {"path": "quickstart", "output": tmp_path / "file"},
        "is there and holds something else: move it away, or name another": {"path": "quickstart", "output": tmp_path},
    }
    for words, keys in tries.items():
        with pytest.raises(InputError) as found:
            commands.perform("init", **keys)
        assert words in str(found.value)
    assert not (tmp_path / "configs").exists()


def test_without_a_name_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name} " in said for name in RECIPES)
