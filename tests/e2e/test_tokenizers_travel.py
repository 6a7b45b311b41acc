"""A tokenizer on its way through import, prune, distill and export; and what is refused when it is another one.

Everything as typed. The two folders are as people have them: byte-level BPE with a chat template and three ids that
end a text (Llama 3.1), and a bare SentencePiece model (Nemotron).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.importance.scores import Scores, save_scores
from minitron_mcore.pruning.plan_file import save_plan
from tests.distributed.hf_cases import architecture_of, save_with_transformers
from tests.e2e.verbs import minitron, run_well
from tests.plans import make_plan
from tests.unit.data.test_fingerprint import train_byte_level
from tests.unit.text_data import EMAIL_PACKAGE, small_data, small_tokenizer

CASE, LENGTH = "llama-scaled", 32
GENERATION = '{"do_sample": true, "eos_token_id": [501, 502,  500], "temperature": 0.6}\n'
CARD = "---\nlicense: llama3.1\nlanguage:\n- en\n---\n# Somebody's words\n"
IDS = {"bos_token_id": 500, "eos_token_id": [501, 502], "pad_token_id": 0}
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folders `bytes-hf` and `pieces-hf`, their checkpoints, data and pruned students; one plan."""
    root = tmp_path_factory.mktemp("travel")
    for kind in ("bytes", "pieces"):
        save_with_transformers(CASE, root / f"{kind}-hf")
    folder = root / "bytes-hf"
    train_byte_level(folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token":   "<|end_of_text|>"}')
    (folder / "added_tokens.json").write_text('{"<|eot_id|>": 502}\n\n')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "generation_config.json").write_text(GENERATION)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("terms\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **IDS, "_name_or_path": "someone/a-model"}))
    small_tokenizer(root / "pieces-hf" / "tokenizer.model")
    (root / "pieces-hf" / "special_tokens_map.json").write_text('{"eos_token":  "</s>"}')

    a = architecture_of(CASE)
    random = numpy.random.default_rng(3)
    shapes = {
        "hidden": (a.hidden_size,),
        "ffn": (a.num_layers, a.ffn_hidden_size),
        "heads": (a.num_layers, a.num_attention_heads),
        "layers": (a.num_layers,),
    }
    arrays: dict[str, Any] = {axis: random.random(shape) for axis, shape in shapes.items()}
    scores = Scores(architecture=a, settings={}, **arrays)
    save_scores(scores, root / "scores.safetensors")
    save_plan(make_plan(scores, {"ffn_hidden_size": 96, "num_layers": 2}), root / "plan.json")
    for kind in ("bytes", "pieces"):
        run_well("import", f"hf={root / f'{kind}-hf'}", f"checkpoint={root / kind}")
        pruned = f"student.checkpoint={root / f'{kind}-pruned'}"
        run_well("prune", f"teacher.checkpoint={root / kind}", f"plan={root / 'plan.json'}", pruned)
        small_data(root / f"{kind}-text", load_tokenizer(str(root / kind / "tokenizer")))
    return root


def data_of(root: Path, kind: str) -> list[str]:
    prefix = root / f"{kind}-text_text_document"
    return [f"data.train={prefix}", f"data.valid={prefix}", f"data.sequence_length={LENGTH}", "data.num_workers=0"]


def distill(teacher: Path, student: Path, target: Path, data: list[str]) -> list[str]:
    settings = [f"distill.tokens={2 * 2 * LENGTH}", "distill.global_batch_size=2", "distill.micro_batch_size=2"]
    log = ["distill.eval_iters=0", "log.wandb=disabled", "log.tensorboard=false"]
    return [
        "distill",
        f"teacher.checkpoint={teacher}",
        f"student.checkpoint={student}",
        f"distill.checkpoint={target}",
        *data,
        *settings,
        *log,
    ]


def test_every_file_travels_unchanged(root: Path, tmp_path: Path) -> None:
    """Import, prune, distill, export, and the same again: not a byte of what lies beside the weights is other."""
    run_well(*distill(root / "bytes", root / "bytes-pruned", tmp_path / "distilled", data_of(root, "bytes")))
    run_well("export", f"checkpoint={tmp_path / 'distilled'}", f"hf={tmp_path / 'hf'}")
    run_well("import", f"hf={tmp_path / 'hf'}", f"checkpoint={tmp_path / 'again'}")
    run_well("export", f"checkpoint={tmp_path / 'again'}", f"hf={tmp_path / 'hf-again'}")
    for hf in (tmp_path / "hf", tmp_path / "hf-again"):
        assert "base_model: someone/a-model" in (hf / "README.md").read_text()
        for name in CARRIED:
            assert (hf / name).read_bytes() == (root / "bytes-hf" / name).read_bytes(), name
        config = json.loads((hf / "config.json").read_text())
        assert {name: config[name] for name in IDS} == IDS
        assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 96), (
            "the pruned shape, not the source's"
        )

    from transformers import AutoTokenizer, GenerationConfig

    ours, theirs = load_tokenizer(str(root / "bytes-hf")), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("", "  def f():\n\treturn 'é漢🙂'\n\n", "<|eot_id|> x"):
        assert theirs.encode(text, add_special_tokens=False) == ours.tokenize(text)
    assert theirs.chat_template.startswith("{% for m")
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [501, 502, 500]


def test_the_card_says_what_is_known(root: Path, tmp_path: Path) -> None:
    run_well("export", f"checkpoint={root / 'bytes-pruned'}", f"hf={tmp_path / 'hf'}")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "someone/a-model",
        "license": "llama3.1",
        "language": ["en"],
        "tags": ["llama", "minitron_mcore", "pruned"],
    }
    assert "| num_layers | 2 | 3 |" in card and "| ffn_hidden_size | 96 | 136 |" in card
    assert "Layers kept, of the teacher's 3: " in card and "## Evaluation" not in card
    run_well("export", f"checkpoint={root / 'pieces'}", f"hf={tmp_path / 'hf-pieces'}")
    card = (tmp_path / "hf-pieces" / "README.md").read_text()
    assert not {"license", "base_model", "language"} & yaml.safe_load(card.split("---\n")[1]).keys()


def test_data_of_the_sentencepiece_model_serves_its_exported_form(root: Path, tmp_path: Path) -> None:
    """Exported as tokenizer.json and imported again, a model is evaluated on the original's data, and equally."""
    run_well("export", f"checkpoint={root / 'pieces'}", f"hf={tmp_path / 'hf'}")
    run_well("import", f"hf={tmp_path / 'hf'}", f"checkpoint={tmp_path / 'again'}")
    for name in ("tokenizer.model", "special_tokens_map.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (root / "pieces-hf" / name).read_bytes()
    losses = []
    for checkpoint in (root / "pieces", tmp_path / "again"):
        results = tmp_path / "results.json"
        run_well(
            "evaluate",
            f"checkpoint={checkpoint}",
            f"results={results}",
            "evaluate.samples=4",
            *data_of(root, "pieces"),
        )
        losses.append(json.loads(results.read_text())["lm loss"])
    assert losses[0] == losses[1]
    types = [load_tokenizer(str(folder / "tokenizer")).type for folder in (root / "pieces", tmp_path / "again")]
    assert types == ["SentencePieceTokenizer", "HuggingFaceTokenizer"]
    # A teacher with the one form, a student with the other.
    run_well(*distill(tmp_path / "again", root / "pieces-pruned", tmp_path / "distilled", data_of(root, "pieces")))


def listing(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_another_tokenizer_is_refused(root: Path, tmp_path: Path) -> None:
    """One sentence and exit code 2, and nothing is written."""
    target = tmp_path / "new"
    save_with_transformers(CASE, tmp_path / "hf")
    small_tokenizer(tmp_path / "hf" / "tokenizer.model", vocab_size=1010, package=EMAIL_PACKAGE)
    shutil.copytree(root / "bytes", tmp_path / "exchanged")
    shutil.rmtree(tmp_path / "exchanged" / "tokenizer")
    shutil.copytree(root / "pieces" / "tokenizer", tmp_path / "exchanged" / "tokenizer")
    other = data_of(root, "pieces")
    score = ["score", f"scores={target}", "importance.num_samples=2", "importance.micro_batch_size=1"]
    cases: list[tuple[str, list[Any]]] = [
        (
            "name a student or a teacher of the same tokenizer",
            distill(root / "bytes", root / "pieces-pruned", target, data_of(root, "bytes")),
        ),
        ("was made with another tokenizer", distill(root / "bytes", root / "bytes-pruned", target, other)),
        ("was made with another tokenizer", [*score, f"teacher.checkpoint={root / 'bytes'}", *other]),
        ("was made with another tokenizer", ["evaluate", f"checkpoint={root / 'bytes'}", f"results={target}", *other]),
        ("was made with, because its fingerprint is", ["evaluate", f"checkpoint={tmp_path / 'exchanged'}", *other]),
        ("has 1010 ids and the model vocab_size=1003", ["import", f"hf={tmp_path / 'hf'}", f"checkpoint={target}"]),
    ]
    before = listing(root) | listing(tmp_path)
    for words, command in cases:
        code, shown = minitron(*command)
        lines = [line for line in shown.splitlines() if line.startswith(f"minitron {command[0]}: ")]
        assert code == 2 and len(lines) == 1 and words in lines[0] and "Traceback" not in shown, (words, shown)
    caches = {path for path in listing(root) if "cache" in path.parts}
    assert {path: time for path, time in (listing(root) | listing(tmp_path)).items() if path not in caches} == {
        path: time for path, time in before.items() if path not in caches
    }
    assert not target.exists()
