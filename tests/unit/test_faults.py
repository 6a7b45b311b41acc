"""The pure parts of the campaign of faults: its plan, its table, and what two runs must have in common."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.damage import choose, damage
from tests.faults.outcome import differences, finished, left_over, lost, outcome
from tests.faults.plan import ALL, KINDS, WHOLE, Fault, Result, plan, row, shares, summary
from tests.faults.stages import STAGES, write_inputs


def test_a_plan_has_every_kind_in_every_stage_that_it_fits() -> None:
    faults, left_out = plan(1, WHOLE)
    assert len(faults) == WHOLE >= 200 and left_out == []
    assert Counter(fault.kind for fault in faults) == {name: kind.share for name, kind in KINDS.items()}
    assert [fault.number for fault in faults] == list(range(1, WHOLE + 1))
    for name in ("kill", "term", "stop"):
        assert {fault.stage for fault in faults if fault.kind == name} == set(STAGES)
    for fault in faults:
        stage = STAGES[fault.stage]
        assert KINDS[fault.kind].fits(stage) and fault.victim in range(ALL, stage.ranks)
        assert fault.kind not in ("stop", "hang") or fault.victim != ALL
        assert fault.way != "input" or stage.reads
    assert len({fault.moment for fault in faults}) == WHOLE
    assert plan(1, WHOLE)[0] == faults != plan(2, WHOLE)[0]


def test_a_part_of_a_plan() -> None:
    faults, left_out = plan(3, 7, kinds=["hang", "kill", "full"], stages=["distill", "export"], but=["full", "lost"])
    assert left_out == ["full"] and len(faults) == 7
    assert {(fault.kind, fault.stage) for fault in faults} == {
        *(("hang", "distill"), ("kill", "distill"), ("kill", "export"))
    }
    assert plan(3, 5, kinds=["wandb"], stages=["prune"])[0] == []
    assert shares({"a": 3, "b": 1}, 7) == {"a": 5, "b": 2}


def test_the_table() -> None:
    whole = [Fault(1, "kill", "train", "", 1, 0.5, 0), Fault(2, "cut", "export", "input", 0, 0.5, 0)]
    results = [
        Result(whole[0], "1, -9", 0.4, steps=3, again=1, equal=True),
        Result(whole[1], "2", 0.2, again=1, problems=["ends otherwise: hf/config.json"]),
        Result(whole[0], is_missed=True),
    ]
    assert row(results[0]) == ["1", "train", "kill of 1 at 0.50", "1, -9", "0.4", "3", "equal"]
    assert row(results[1])[2:] == ["cut (input)", "2", "0.2", "-", "ends otherwise: hf/config.json"]
    assert row(results[2])[-1] == "missed"
    lines = [line.split() for line in summary(results).splitlines()]
    assert lines[1] == ["kill", "-9", "1", "1", "1", "3", "3", "0.4", "1", "0", "0"]
    assert lines[3] == ["all", "2", "1", "2", "3", "3", "0.4", "1", "0", "1"]


def _write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_what_two_runs_must_have_in_common(tmp_path: Path) -> None:
    def run(name: str, loss: str, seconds: int) -> Path:
        row = f'{{"iteration": 1, "lm loss": {loss}, "elapsed time per iteration (ms)": {seconds}}}\n'
        folder = _write(tmp_path / name, model__metrics_DOT_jsonl=row, model__iter_0000001__manifest_DOT_json="{")
        manifest = f'{{"tensors": {{"w": [{seconds % 2}]}}}}'
        _write(folder, model__iter_0000002__manifest_DOT_json=manifest, model__iter_0000002__x_DOT_distcp=name)
        return _write(
            folder,
            model__latest_checkpointed_iteration_DOT_txt="2",
            a_DOT_yaml=f"out: {folder}/model",
            page_DOT_png=name,
        )

    one, same, weights, loss = (
        outcome(run(*each), tmp_path / "in")
        for each in (("a", "1.5", 1), ("b", "1.5", 3), ("c", "1.5", 2), ("d", "1.25", 1))
    )
    assert differences(one, same) == []
    assert differences(one, weights) == ["model/iter_0000002/manifest.json"]
    assert differences(one, loss) == ["model/metrics.jsonl"]
    (tmp_path / "b" / "a.yaml").unlink()
    assert differences(one, outcome(tmp_path / "b", tmp_path / "in")) == ["a.yaml"]


def test_what_was_finished_stays(tmp_path: Path) -> None:
    folder = _write(tmp_path, m__latest_checkpointed_iteration_DOT_txt="4", done__score_DOT_json="{}", x_DOT_tmp="")
    before = finished(folder)
    assert left_over(folder) == ["x.tmp"] and "x.tmp" not in before
    _write(folder, m__latest_checkpointed_iteration_DOT_txt="6")
    assert list(lost(before, finished(folder))) == []
    _write(folder, m__latest_checkpointed_iteration_DOT_txt="2")
    (folder / "done" / "score.json").unlink()
    assert sorted(lost(before, finished(folder))) == ["done/score.json", "m/latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize("kind", ["cut", "flip", "remove"])
def test_a_file_is_damaged(kind: str, tmp_path: Path) -> None:
    _write(tmp_path, a__one_DOT_bin="x" * 100, a__page_DOT_png="", b__two_DOT_bin="")
    path = choose(tmp_path, ["a"], random.Random(1))
    assert path is not None and path.name == "one.bin"
    assert damage(path, kind, random.Random(1)) == b"x" * 100
    left = path.read_bytes() if path.exists() else None
    assert left != b"x" * 100 and (left is None) == (kind == "remove")
    assert left is None or len(left) == 100 or kind == "cut"
    assert choose(tmp_path, ["c"], random.Random(1)) is None


def test_the_stages_read_what_is_made_before_them(tmp_path: Path) -> None:
    write_inputs(tmp_path / "inputs")
    made = {path.name for path in (tmp_path / "inputs").iterdir()}
    for name, stage in STAGES.items():
        words = stage.command(tmp_path / "inputs", tmp_path / "out", "more=1")
        assert words[-1] == "more=1" and not [word for word in words if "@" in word or "%" in word]
        read = [word.rpartition("inputs/")[2].partition("/")[0].strip("]") for word in words if "inputs/" in word]
        assert {*read, *(place.partition("/")[0] for place in stage.reads)} <= made, name
        made.add(name)
