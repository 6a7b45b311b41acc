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
    end_tokens,
    keep_companions,
    paths_below,
    refuse_adapter,
    refuse_torn,
    source_card,
    stop_at,
    token_ids,
    write_companions,
)
from minitron_mcore.importance.scores import Scores
from minitron_mcore.pruning.plan_file import PruningPlan, save_plan
from minitron_mcore.report.model_card import model_card
from tests.distributed.hf_cases import SHAPE
from tests.plans import make_plan
from tests.refusals import refuses


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
        "other": "x",
    }
    write_companions(tmp_path / "trained", written(tmp_path / "made"), {"eos_token_id": 2})
    made = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    assert made == {"_from_model_config": True, "eos_token_id": 2}


CARRIED = (
    *("LICENSE", "NOTICE.md", ".gitattributes", "tool.py", "preprocessor_config.json", "params.json"),
    *("assets/figure.svg", "original/params.json", "tools/deep/er/search.yaml", "linked/inner.txt"),
)
LEFT = ("model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.PTH", "a.gguf")


def test_the_weights_that_an_index_names_are_those_that_were_imported(tmp_path: Path) -> None:
    """Whatever they are called; what bears a usual name without being one of them stays behind with a word."""
    index = {"weight_map": {"a": "consolidated-1.safetensors", "b": "consolidated-2.safetensors"}}
    source = written(tmp_path / "hf", model__safetensors__index__json=json.dumps(index))
    for name in (*index["weight_map"].values(), "model.fp16.safetensors", "model-00001-of-00002.safetensors"):
        (source / name).write_text("x")
    (source / "manifest.json").write_text(json.dumps({"format": 1, "checksum": "xxh3_128"}))  # an earlier export's
    assert keep_companions(source, tmp_path / "checkpoint") == [
        "not copied: other weight files: model-00001-of-00002.safetensors, model.fp16.safetensors"
    ]


def test_every_file_but_weights_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sub-folders too, linked ones once; not hidden folders, caches, another checkpoint, or what is very large."""
    source = tmp_path / "hf"
    passed_over: tuple[str, ...] = (
        ".git/config",
        ".cache/x.json",
        "__pycache__/tool.pyc",
        "ck/latest_checkpointed_iteration.txt",
    )
    passed_over += ("ck/lineage.yaml", "manifest.json", "onnx/model.onnx_data", "pytorch_model.bin.index.json")
    (tmp_path / "elsewhere").mkdir()
    for name in (*CARRIED[:-1], *LEFT, *passed_over, "huge.txt", "tokenizer.json", "config.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (tmp_path / "elsewhere" / "inner.txt").write_text("linked/inner.txt")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(source)
    (source / "gone").symlink_to(tmp_path / "nowhere")
    (source / "huge.txt").write_text("x" * 1001)
    monkeypatch.setattr("minitron_mcore.checkpoint.companions.LARGEST", 1000)
    written(tmp_path / "checkpoint" / "tokenizer", tokenizer__json="the same", config__json="the same")

    notes = keep_companions(source, tmp_path / "checkpoint")
    assert notes[0].startswith("not copied: other weight files: ") and "huge.txt" in notes[1]
    assert notes[2] == "not copied: broken links: gone"
    assert notes[3].endswith("under a name that an export uses: manifest.json") and notes[4:] == []
    assert all(name in notes[0] for name in LEFT[1:]) and " model.safetensors" not in notes[0]
    carry_companions(tmp_path / "checkpoint", tmp_path / "student")
    write_companions(tmp_path / "student", written(tmp_path / "out"), {})
    kept = {name: (tmp_path / "out" / name).read_text() for name in paths_below(tmp_path / "out")}
    assert kept == {name: name for name in CARRIED}
    assert (tmp_path / "checkpoint" / "hugging_face" / "config.json").read_text() == "config.json"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path, model__safetensors="x")
    refuse_adapter(tmp_path)
    (tmp_path / name).write_text("{}")
    with refuses("hf", tmp_path, f"holds {name}, an adapter", "merge it first"):
        refuse_adapter(tmp_path)


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
    results = {
        "lm loss": 2.5,
        "ppl": 12.18,
        "iteration": 7,
        "checkpoint": "/somewhere",
        "weights": "f00d",
        "samples": 9,
    }
    folder = written(tmp_path / "x", results__json=json.dumps(results))
    matter, card = card_of(folder, teacher)
    assert "| lm loss | 2.5 |" in card and "| samples | 9 |" in card and "/somewhere" not in card
    assert "f00d" not in card
    assert matter == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "minitron_mcore"],
    }
    assert "## Lineage" not in card
    assert "## Evaluation" not in card_of(folder, teacher, iteration=8)[1]
    metrics = {"acc,none": {"value": 0.4, "stderr": 0.1}, "acc_norm": {"value": 0.5, "stderr": None}}
    tasks = {"iteration": 7, "tasks": {"mmlu": {"shots": 5, "documents": 9, "metrics": metrics}}}
    (folder / "results.json").write_text(json.dumps(results | tasks))
    card = card_of(folder, teacher)[1]
    assert (
        "| mmlu | 5 | 9 | acc | 0.4000 ± 0.1000 |\n| mmlu | 5 | 9 | acc_norm | 0.5000 |\n" in card
        and "| lm loss | 2.5 |" in card
    )
    (folder / "results.json").write_text(json.dumps(tasks))
    card = card_of(folder, teacher)[1]
    assert "| mmlu | 5 | 9 | acc | 0.4000 ± 0.1000 |" in card and "held-out" not in card
    (folder / "results.json").write_text("{")
    assert "## Evaluation" not in card_of(folder, teacher)[1]


@pytest.mark.parametrize(
    ("files", "before"),
    [
        ({}, (2,)),
        ({"config__json": '{"eos_token_id": 5, "bos_token_id": 4}'}, (5,)),
        ({"generation_config__json": '{"eos_token_id": [7, 9], "temperature": 0.6}'}, (7, 9)),
    ],
    ids=["nothing", "config", "generation"],
)
def test_generation_ends_where_answers_do(tmp_path: Path, files: dict[str, str], before: tuple[int, ...]) -> None:
    checkpoint = imported(tmp_path, None, **files)
    stop_at(checkpoint, before[0], bos=1, eos=2)
    stop_at(checkpoint, None, bos=1, eos=2)
    assert end_tokens(checkpoint, 2) == before, "it ends there already"
    for _ in range(2):
        stop_at(checkpoint, 11, bos=1, eos=2)
    assert end_tokens(checkpoint, 2) == (*before, 11)
    write_companions(checkpoint, written(tmp_path / "exported"), {"eos_token_id": 2})
    exported = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert exported["eos_token_id"] == [*before, 11]
    if "generation_config__json" in files:
        assert exported["temperature"] == 0.6
    else:
        assert exported["bos_token_id"] == (4 if files else 1)


def test_a_torn_settings_file_is_refused(tmp_path: Path) -> None:
    """It would be in every export, where transformers could not read it."""
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": 2}')
    (tmp_path / "notes.txt").write_text("{")
    refuse_torn(tmp_path)
    file.write_text('{"eos_tok')
    with refuses("hf", file, "is not JSON (", "load that file again, or move it away"):
        refuse_torn(tmp_path)
