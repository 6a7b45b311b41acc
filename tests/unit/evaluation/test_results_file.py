"""Which results stay in a file that is written once more, and which go into another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.evaluation.results_file import write_results

OF = {"checkpoint": "/c", "iteration": 3, "precision": "fp32", "weights": "f00d"}
LOSS = {"lm loss": 2.0, "ppl": 7.4, "samples": 4, "sequence_length": 8}
MMLU: dict[str, Any] = {"shots": 5, "documents": 9, "metrics": {}}
ARC = {**MMLU, "shots": 25}


def written(folder: Path, earlier: Any, results: dict[str, Any]) -> tuple[Any, str, list[str]]:
    """What is in the file afterwards, what is said, and the names of other files."""
    target = folder / "new" / "results.json"
    target.parent.mkdir()
    if earlier is not None:
        target.write_text(earlier if isinstance(earlier, str) else json.dumps(earlier))
    told = write_results(target, results)
    others = sorted(path.name for path in target.parent.iterdir() if path != target)
    return json.loads(target.read_text()), told, others


@pytest.mark.parametrize(
    ("earlier", "results", "expected"),
    [
        (None, {**OF, **LOSS}, {**OF, **LOSS}),
        ({**OF, **LOSS}, {**OF, "tasks": {"mmlu": MMLU}}, {**OF, **LOSS, "tasks": {"mmlu": MMLU}}),
        ({**OF, "tasks": {"mmlu": MMLU}}, {**OF, **LOSS}, {**OF, **LOSS, "tasks": {"mmlu": MMLU}}),
        (
            {**OF, "tasks": {"mmlu": MMLU, "arc": MMLU}},
            {**OF, "tasks": {"arc": ARC}},
            {**OF, "tasks": {"mmlu": MMLU, "arc": ARC}},
        ),
        # Measured anew, of whatever weights: the older loss is gone, as the command says.
        ({**OF, **LOSS}, {**OF, **LOSS, "lm loss": 1.0, "samples": 9}, {**OF, **LOSS, "lm loss": 1.0, "samples": 9}),
        ({**OF, **LOSS}, {**OF, **LOSS, "weights": "cafe"}, {**OF, **LOSS, "weights": "cafe"}),
        (
            {"models": {"a": {**OF, **LOSS}}, "differences": {}},
            {"models": {"a": {**OF, **LOSS}, "b": {**OF, **LOSS}}, "differences": {"b": {}}},
            {"models": {"a": {**OF, **LOSS}, "b": {**OF, **LOSS}}, "differences": {"b": {}}},
        ),
    ],
)
def test_what_is_of_the_same_weights_stays(tmp_path: Path, earlier: Any, results: Any, expected: Any) -> None:
    assert written(tmp_path, earlier, results) == (expected, "", [])


@pytest.mark.parametrize(
    ("earlier", "results"),
    [
        *(({**OF, **LOSS, **other}, {**OF, "tasks": {"mmlu": MMLU}}) for other in (
            {"weights": "cafe"},
            {"weights": None},
            {"iteration": 2},
            {"precision": "bf16"},
        )),
        ({**OF, **LOSS, "weights": None}, {**OF, "weights": None, "tasks": {"mmlu": MMLU}}),
        ({**OF, **LOSS}, {"models": {"a": {**OF, **LOSS}}, "differences": {}}),
        ({"models": {"a": {**OF, **LOSS}, "b": {**OF, **LOSS}}}, {"models": {"a": {**OF, **LOSS}}}),
        ({"models": {"a": {**OF, **LOSS}}}, {**OF, **LOSS}),
        ({"teacher": {**OF, **LOSS}}, {**OF, **LOSS}),  # the table of a run
        ("no JSON", {**OF, **LOSS}),
    ],
)  # fmt: skip
def test_what_is_of_others_is_set_aside(tmp_path: Path, earlier: Any, results: Any) -> None:
    told = "what results.json said of other weights or models is in results.before-1.json"
    assert written(tmp_path, earlier, results) == (results, told, ["results.before-1.json"])
    aside = (tmp_path / "new" / "results.before-1.json").read_text()
    assert aside == earlier if isinstance(earlier, str) else json.loads(aside) == earlier
    (tmp_path / "new" / "results.json").write_text("no JSON")
    assert write_results(tmp_path / "new" / "results.json", results).endswith("results.before-2.json")
