"""What `inspect` answers for the folder of a run. Weights are inspected in tests/e2e/test_inspect.py."""

from __future__ import annotations

from pathlib import Path

from minitron_mcore.checkpoint.folder import TRACKER
from minitron_mcore.report.what_it_is import describe, table


def test_a_runs_folder_lists_its_parts(tmp_path: Path) -> None:
    for name in ("recipe.yaml", "scores.safetensors", "done/tokenizer.json", "done/train-teacher.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for place in ("teacher", "students/small/pruned"):
        (tmp_path / place / "iter_0000005").mkdir(parents=True)
        (tmp_path / place / TRACKER).write_text("5")
    found = describe(tmp_path)
    assert found["kind"] == "run" and set(found["steps_done"]) == {"tokenizer", "train-teacher"}
    assert found["checkpoints"] == [str(tmp_path / "students/small/pruned"), str(tmp_path / "teacher")]
    assert found["recipe"] == str(tmp_path / "recipe.yaml") and found["files"] == ["scores.safetensors"]
    shown = table(found)
    assert shown.startswith(f"{tmp_path}: folder of a run\n") and str(tmp_path / "teacher") in shown
