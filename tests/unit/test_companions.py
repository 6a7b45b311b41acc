"""What travels beside weights and tokenizer, and a model card that says what is known and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.checkpoint.companions import (
    carry_companions,
    keep_companions,
    source_card,
    token_ids,
    write_companions,
)
from minitron_mcore.checkpoint.model_card import model_card
from minitron_mcore.importance.scores import Scores
from minitron_mcore.plan import PruningPlan, make_plan, save_plan
from tests.distributed.hf_cases import SHAPE


def written(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def imported(tmp_path: Path, lineage: dict[str, Any] | None = None, **files: str) -> Path:
    checkpoint = written(tmp_path / "checkpoint", lineage__yaml=yaml.safe_dump(lineage or {"stage": "import"}))
    keep_companions(written(tmp_path / "hf", **files), checkpoint)
    return checkpoint


def test_ids_are_the_sources_where_it_names_them(tmp_path: Path) -> None:
    config = {"bos_token_id": 1, "eos_token_id": [7, 8, 9], "pad_token_id": None, "hidden_size": 8}
    checkpoint = imported(tmp_path, config__json=json.dumps(config))
    ids = {"bos_token_id": 3, "eos_token_id": 4}
    assert token_ids(checkpoint, ids) == {"bos_token_id": 1, "eos_token_id": [7, 8, 9], "pad_token_id": None}
    assert token_ids(tmp_path / "trained", ids) == ids


def test_generation_config_is_the_sources_or_made(tmp_path: Path) -> None:
    text = '{"eos_token_id":   [7, 8]}'
    checkpoint = imported(tmp_path, generation_config__json=text, LICENSE="terms", README__md="words", other="x")
    carry_companions(checkpoint, written(tmp_path / "student"))
    carry_companions(checkpoint, checkpoint)
    write_companions(tmp_path / "student", written(tmp_path / "out"), {"eos_token_id": 2})
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        "generation_config.json": text,
        "LICENSE": "terms",
    }
    write_companions(tmp_path / "trained", written(tmp_path / "made"), {"eos_token_id": 2})
    made = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    assert made == {"_from_model_config": True, "eos_token_id": 2}


CACHE = "/x/hub/models--nvidia--Minitron-4B-Base/snapshots/0a1b"
TERMS = "license: other\nlicense_name: somebodys\nlicense_link: LICENSE\n"
CARD = f"---\n{TERMS}base_model: a/root\nmetrics: [x]\n---\nwords\n"


@pytest.mark.parametrize(
    ("lineage", "files", "expected"),
    [
        ({"stage": "import", "hf": CACHE}, {}, {"base_model": "nvidia/Minitron-4B-Base"}),
        (
            {"stage": "distill", "student": {"stage": "prune", "teacher": {"lineage": {"hf": CACHE}}}},
            {"config__json": '{"_name_or_path": "x/y"}'},
            {"base_model": "nvidia/Minitron-4B-Base"},
        ),
        (
            None,
            {"config__json": '{"_name_or_path": "mistralai/Mistral-7B-v0.1"}'},
            {"base_model": "mistralai/Mistral-7B-v0.1"},
        ),
        ({"hf": "/data/llama"}, {"config__json": '{"_name_or_path": "/data/llama"}'}, {}),
        ({"hf": "llama"}, {"config__json": '{"_name_or_path": "./models/llama"}'}, {}),
        ({"hf": "llama"}, {"config__json": '{"_name_or_path": "llama"}'}, {}),
        (
            None,
            {"README__md": CARD},
            {"base_model": "a/root", "license": "other", "license_name": "somebodys", "license_link": "LICENSE"},
        ),
        (None, {"README__md": "# no front matter\n---\nlicense: mit\n---\n"}, {}),
        (None, {"README__md": "---\n: [\n---\n", "config__json": "[]"}, {}),
        (None, {}, {}),
    ],
)
def test_what_the_source_says_of_itself(
    tmp_path: Path, lineage: dict[str, Any] | None, files: dict[str, str], expected: dict[str, Any]
) -> None:
    assert source_card(imported(tmp_path, lineage, **files)) == expected


def planned() -> tuple[Architecture, PruningPlan]:
    teacher = build_architecture({**SHAPE, "family": "llama"})
    random = numpy.random.default_rng(0)
    layers, heads = teacher.num_layers, teacher.num_attention_heads
    scores = Scores(
        architecture=teacher,
        settings={},
        hidden=random.random(teacher.hidden_size),
        ffn=random.random((layers, teacher.ffn_hidden_size)),
        heads=random.random((layers, heads)),
        layers=numpy.array([3.0, 1.0, 2.0]),
    )
    return teacher, make_plan(scores, {"num_layers": 2, "hidden_size": 48})


def card_of(folder: Path, model: Architecture, iteration: int = 7) -> tuple[dict[str, Any], str]:
    card = model_card("a-model", model, folder, iteration)
    return yaml.safe_load(card.split("---\n")[1]), card


def test_the_plan_is_shown_where_it_is_this_models(tmp_path: Path) -> None:
    teacher, plan = planned()
    pruned: dict[str, Any] = {
        "stage": "prune",
        "plan": {"fingerprint": plan.fingerprint},
        "teacher": {"lineage": {"stage": "distill"}},
    }
    distilled: dict[str, Any] = {"stage": "distill", "student": pruned, "teacher": {"checkpoint": "x"}}
    trained: dict[str, Any] = {"stage": "train", "load": "x", "lineage": distilled}
    both = ["pruned", "knowledge-distillation"]
    for lineage, tags in ((pruned, ["pruned"]), (distilled, both), (trained, both)):
        folder = written(tmp_path / lineage["stage"], lineage__yaml=yaml.safe_dump(lineage))
        save_plan(plan, folder / "plan.json")
        matter, card = card_of(folder, plan.student)
        assert matter["tags"] == ["llama", "minitron_mcore", *tags]
        assert "| hidden_size | 48 | 96 |" in card and "Layers kept, of the teacher's 3: 0, 2." in card
        assert f"| parameters | {plan.student.num_parameters:,} | {teacher.num_parameters:,} |" in card
    # Another plan, another shape, a damaged file: nothing is said of a teacher.
    (folder / "lineage.yaml").write_text(yaml.safe_dump({**pruned, "plan": {"fingerprint": "other"}}))
    assert "its teacher" not in card_of(folder, plan.student)[1]
    (folder / "lineage.yaml").write_text(yaml.safe_dump(pruned))
    assert "its teacher" not in card_of(folder, teacher)[1]
    (folder / "plan.json").write_text("{")
    assert "its teacher" not in card_of(folder, plan.student)[1]


def test_results_are_shown_where_they_are_of_this_iteration(tmp_path: Path) -> None:
    teacher, _ = planned()
    results = {"lm loss": 2.5, "ppl": 12.18, "iteration": 7, "checkpoint": "/somewhere", "samples": 9}
    folder = written(tmp_path / "x", results__json=json.dumps(results))
    matter, card = card_of(folder, teacher)
    assert "| lm loss | 2.5 |" in card and "| samples | 9 |" in card and "/somewhere" not in card
    assert matter == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "minitron_mcore"],
    }
    assert "## Lineage" not in card
    assert "## Evaluation" not in card_of(folder, teacher, iteration=8)[1]
    (folder / "results.json").write_text("{")
    assert "## Evaluation" not in card_of(folder, teacher)[1]
