"""What `inspect` answers for the folder of a run or a search. Weights are inspected in tests/e2e/test_inspect.py."""

from __future__ import annotations

import json
from pathlib import Path

from minitron_mcore.checkpoint.folder import TRACKER
from minitron_mcore.report.what_it_is import describe, table
from tests.distributed.models import tiny
from tests.refusals import refuses


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


def test_a_searchs_folder_tells_how_far_it_is(tmp_path: Path) -> None:
    """Of one that is under way: what `candidates/` holds is newer than the list; tests/e2e/test_search.py has one that
    has ended. The scores in it do not make it a Hugging Face folder."""
    teacher = tiny("llama")
    rows = [{"name": name, "total_parameters": 1000 * place} for place, name in enumerate("abc", start=1)]
    listed = {"teacher": teacher.to_dict(), "budgets": {"tolerance": 0.05}, "combinations": 9, "shapes": 8}
    listing = tmp_path / "candidates.json"
    listing.write_text(json.dumps({**listed, "correlation": None, "candidates": rows}))
    (tmp_path / "scores.safetensors").touch()
    assert describe(tmp_path)["evaluated"] == 0 and "2,000 parameters, not tried" in table(describe(tmp_path))
    for name, tokens, loss, diverged in (("b", 512, 6.5, None), ("c", 0, 7.0, None), ("z", 64, None, "NaN")):
        result = {"name": name, "zero_shot": 7.0, "loss": loss, "tokens": tokens, "diverged": diverged}
        (tmp_path / "candidates" / name).mkdir(parents=True)
        (tmp_path / "candidates" / name / "result.json").write_text(json.dumps(result))
        (tmp_path / "candidates" / name / "plan.json").write_text(name)
    found = describe(tmp_path)
    assert found["kind"] == "search" and found["teacher"]["parameters"] == teacher.num_parameters
    assert [found[name] for name in ("listed", "evaluated", "trained", "winner")] == [3, 3, 2, None]
    told = {"total_parameters": 2000, "zero_shot": 7.0, "loss": 6.5, "tokens": 512, "rank": None, "diverged": None}
    assert found["candidates"]["b"] == told
    shown = table(found)
    assert shown.startswith(f"{tmp_path}: folder of a search\n") and "  winner" not in shown
    assert "2,000 parameters, untrained loss 7.0000, loss 6.5000, after 512 tokens" in shown
    assert "3,000 parameters, untrained loss 7.0000, loss 7.0000, after 0 tokens" in shown
    assert "WARNING: z: tried before, and not in the grid that candidates.json lists" in shown
    (tmp_path / "winner").mkdir()
    (tmp_path / "winner" / "plan.json").write_text("b")
    assert describe(tmp_path)["winner"] == "b"
    for text, rule in (("{", "is not JSON"), ('{"candidates": []}', "is not the list of a search, or is damaged")):
        listing.write_text(text)
        with refuses("", listing, rule):
            describe(tmp_path)
