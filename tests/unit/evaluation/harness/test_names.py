"""Names of tasks: found in YAML of every form without reading it as such; presets, shots, misspellings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from minitron_mcore.evaluation.harness.names import PRESETS, Asked, asked_tasks, names_in
from tests.refusals import refuses

FORMS = {
    "a/plain.yaml": "task: plain\ndataset_path: json\n",
    "a/quoted.yml.yaml": 'task: "quoted"  # a comment\ntag:\n  - first_tag\n\n  # - left_out\n  - second_tag\n',
    "b/group.yaml": "group: whole\ntask:\n- plain\n- task: inner\n  num_fewshot: 2\n",
    "b/_template": "tag: of_template\n",
    "b/flow.yaml": "task: flow\ntag: [one_tag, 'other_tag']\n",
    "b/code.py": "task: no_task\n",
}


def test_names_of_every_form(tmp_path: Path) -> None:
    for name, text in FORMS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = names_in(str(tmp_path))
    tasks = {"plain", "quoted", "flow", "whole", "inner"}
    assert {*found} >= tasks | {"first_tag", "second_tag", "of_template", "one_tag", "other_tag"}
    assert "no_task" not in found and "left_out" not in found
    assert found["plain"] == {str(tmp_path / "a"), str(tmp_path / "b")}
    asked = asked_tasks(["plain", "flow:3", "minitron_perplexity"], 2, str(tmp_path))
    assert asked == (Asked("plain", 2), Asked("flow", 3), Asked("minitron_perplexity", 2))


def test_the_preset_is_tasks_of_the_installed_harness() -> None:
    found = asked_tasks(["minitron", "arc_easy"], None, None)
    assert [f"{each.name}:{each.shots}" for each in found[:-1]] == [*PRESETS["minitron"]]
    assert found[-1].shots is None and all(each.folders for each in found)
    root = importlib.util.find_spec("lm_eval")
    assert root is not None and root.origin is not None
    assert all(Path(folder).is_relative_to(Path(root.origin).parent) for each in found for folder in each.folders)


CODE = {
    "runs.yaml": "task: runs\ntag: [programs]\nunsafe_code: true\n",
    "like_it.yaml": "include: runs.yaml\ntask: like_it\n",
    "_common": "task: null\nunsafe_code: True\n",
    "by_template.yaml": "include: _common\ntask: by_template\n",
    "reads.yaml": "include: _common\ntask: reads\nunsafe_code: false\n",
    "some.yaml": "group: some\ntask: [reads, inner]\n",
    "inner.yaml": "group: inner\ntask:\n- task: like_it\n- reads\n",
    "round.yaml": "include: round.yaml\ntask: round\n",
}


def test_what_runs_a_models_programs_is_refused_by_its_yaml(tmp_path: Path) -> None:
    """Of the user's folder, and of the harness's: whatever way the mark is inherited, and within groups and tags."""
    for name, text in CODE.items():
        (tmp_path / name).write_text(text)
    where = str(tmp_path)
    assert len(asked_tasks(["reads:2", "round"], None, where)) == 2
    for word, named in {
        **{name: "" for name in ("runs", "runs:3", "programs", "like_it", "by_template")},
        **{name: " (in like_it)" for name in ("some", "inner")},
        **{name: "" for name in ("humaneval", "humaneval_64_instruct", "mbpp_plus:3", "cruxeval_input")},
    }.items():
        with refuses("evaluate.tasks", word, f"runs the programs that a model writes{named}, which is not done here"):
            asked_tasks([word], None, where)


@pytest.mark.parametrize(
    ("words", "value", "remedy"),
    [
        (["gsm8"], "gsm8", "did you mean gsm8k?"),
        (["minitron_perplexty"], "minitron_perplexty", "did you mean minitron_perplexity?"),
        (["qqqqzzzz"], "qqqqzzzz", "see `lm-eval ls tasks`"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(words: list[str], value: str, remedy: str) -> None:
    with refuses("evaluate.tasks", value, "is no task", remedy):
        asked_tasks(words, None, None)
