"""`train`, `evaluate`, `export` and `import` as typed: a tiny model on real text, against transformers.

Losses: 1e-5 relative, since fp32 sums in another order leave about 1e-7 and a wrong sample or a counted padding row
1e-3. Token ids: equal.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.dataset import build_datasets
from minitron_mcore.data.described import split_part
from minitron_mcore.data.tokenizer import load_tokenizer
from tests.distributed.models import LAYOUTS
from tests.e2e.verbs import minitron, run_well
from tests.unit.text_data import EMAIL_PACKAGE, JSON_PACKAGE, python_files, small_data, small_tokenizer

SAMPLES, MICRO_BATCH, LENGTH = 9, 2, 32  # five microbatches, the last one half filler; no multiple of two stages


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained checkpoint `teacher`, its recipe, its export `hf`, and that one in bf16, `hf-bf16`."""
    root = tmp_path_factory.mktemp("export")
    tokenizer = small_tokenizer(root / "tokenizer.model")
    train, valid = small_data(root / "train", tokenizer), small_data(root / "valid", tokenizer, package=JSON_PACKAGE)
    recipe = {
        "data": {
            "train": train,
            "valid": valid,
            "sequence_length": LENGTH,
            "num_workers": 0,
            "cache_path": str(root / "cache"),
        },
        "tokenizer": {"model": str(root / "tokenizer.model")},
        "model": {
            "num_layers": 4,
            "hidden_size": 48,
            "ffn_hidden_size": 72,
            "num_attention_heads": 6,
            "num_query_groups": 2,
            "kv_channels": 12,
            "max_position_embeddings": 64,
            "rotary_base": 10000.0,
        },
        "train": {"tokens": 4 * 8 * LENGTH, "lr": 1e-2, "micro_batch_size": 4, "eval_iters": 1},
        "evaluate": {"samples": SAMPLES, "micro_batch_size": MICRO_BATCH},
        "log": {"wandb": "disabled", "tensorboard": False},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_well("train", "--config", str(root / "recipe.yaml"), f"train.checkpoint={root / 'teacher'}")
    run_well("export", f"checkpoint={root / 'teacher'}", f"hf={root / 'hf'}", world_size=2)

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.bfloat16).save_pretrained(root / "hf-bf16")
    return root


def transformers_loss(root: Path, folder: str, count: int) -> float:
    """Mean next-token loss of the exported model over the first `count` held-out samples."""
    from transformers import AutoModelForCausalLM

    config = yaml.safe_load((root / "recipe.yaml").read_text())
    data = DataConfig(**config["data"])
    tokenizer = load_tokenizer(str(root / "tokenizer.model"))
    (valid,) = build_datasets(data, tokenizer, [split_part(data, "valid", None)], seed=1234)
    assert valid is not None and len(valid) > count
    samples = [valid[index] for index in range(count)]
    tokens, labels, mask = (
        torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels", "loss_mask")
    )
    model = AutoModelForCausalLM.from_pretrained(root / folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="none")
    return float((losses * mask.flatten()).sum() / mask.sum())


def test_evaluate_is_the_same_at_every_layout(root: Path, tmp_path: Path) -> None:
    expected = transformers_loss(root, "hf", SAMPLES)
    assert 2.0 < expected < math.log(600), "trained a little"
    for name in ("1", "TP2", "PP2", "PP2-VPP2", "DP2"):
        world_size, parallel = LAYOUTS[name]
        output = tmp_path / name
        keys = [f"parallel.{key}={value}" for key, value in parallel.items()]
        config = [
            "--config",
            str(root / "recipe.yaml"),
            f"checkpoint={root / 'teacher'}",
            f"results={output / 'results.json'}",
        ]
        run_well("evaluate", *config, *keys, world_size=world_size)
        results = json.loads((output / "results.json").read_text())
        assert results["lm loss"] == pytest.approx(expected, rel=1e-5), name
        assert results["ppl"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert (results["iteration"], results["samples"]) == (4, SAMPLES)
        assert os.listdir(output) == ["results.json"]


def test_the_exported_folder(root: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    names = {path.name for path in (root / "hf").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
    }
    config = AutoConfig.from_pretrained(root / "hf")
    assert (config.vocab_size, config.head_dim, config.bos_token_id, config.eos_token_id) == (600, 12, 1, 2)
    assert config.dtype == torch.float32
    assert GenerationConfig.from_pretrained(root / "hf").eos_token_id == 2
    card = (root / "hf" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    lineage = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert (lineage["stage"], lineage["tokens"]) == ("train", 4 * 8 * LENGTH)


STRANGE = ["", " ", "  x ", "\t\r\n\n x", "a</s> <s><unk>b", "<0x0A>", "\0", "é漢🙂\u2581", "🙂" * 9, "    " * 9]


def test_the_exported_tokenizer_gives_the_same_ids(root: Path) -> None:
    """On Python source it has and has not seen, and on what a tokenizer could trip over."""
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(str(root / "tokenizer.model")), AutoTokenizer.from_pretrained(root / "hf")
    texts = [path.read_text(encoding="utf-8") for path in python_files(JSON_PACKAGE) + python_files(EMAIL_PACKAGE)]
    assert sum(map(len, texts)) > 300_000
    for text in texts + STRANGE:
        ids = ours.tokenize(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.detokenize(ids)
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eod)


def test_import_in_bf16_and_evaluate(root: Path, tmp_path: Path) -> None:
    """A bf16 folder of transformers': imported at PP2 it stays bf16, evaluated at TP2 in fp32 it has the same loss."""
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    shutil.copytree(root / "hf-bf16", source)
    for path in (root / "hf").glob("tokenizer*"):
        shutil.copy(path, source)
    run_well("import", f"hf={source}", f"checkpoint={checkpoint}", "parallel.pipeline=2", world_size=2)
    # The tokenizer is now of another kind than the SentencePiece model that the token files were made with.
    assert load_tokenizer(str(checkpoint / "tokenizer")).type == "HuggingFaceTokenizer"
    config = ["--config", str(root / "recipe.yaml"), f"checkpoint={checkpoint}"]
    run_well("evaluate", *config, "parallel.tensor=2", world_size=2)
    results = json.loads((checkpoint / "results.json").read_text())
    assert results["lm loss"] == pytest.approx(transformers_loss(root, "hf-bf16", SAMPLES), rel=1e-5)

    run_well("export", *config, f"hf={tmp_path / 'again'}")
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert f"| lm loss | {results['lm loss']} |" in (tmp_path / "again" / "README.md").read_text()


def test_weight_files_have_the_size_asked_for(root: Path, tmp_path: Path) -> None:
    """No file is larger, but for a tensor that is larger by itself; transformers reads them as one model."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    limit = 24_000
    run_well("export", f"checkpoint={root / 'teacher'}", f"hf={tmp_path / 'hf'}", "max_shard_size=24KB", world_size=2)
    files = {path.name: load_file(path) for path in (tmp_path / "hf").glob("*.safetensors")}
    sizes = {name: sum(tensor.nbytes for tensor in tensors.values()) for name, tensors in files.items()}
    assert len(files) > 4 and max(sizes.values()) > limit, "the embedding is larger"
    assert all(size <= limit or len(files[name]) == 1 for name, size in sizes.items())
    whole = load_file(root / "hf" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert loaded.keys() == whole.keys() and all(torch.equal(loaded[name], whole[name]) for name in whole)


def bad_commands(root: Path, folder: Path) -> dict[str, list[str]]:
    """What must be said -> the command."""
    shutil.copytree(root / "teacher", folder / "unfinished")
    (folder / "unfinished" / "latest_checkpointed_iteration.txt").unlink()
    shutil.copytree(root / "teacher", folder / "cut-off")
    (folder / "cut-off" / "iter_0000004" / "metadata.json").unlink()
    (folder / "there").mkdir()
    (folder / "empty").mkdir()
    other = small_tokenizer(folder / "other.model", vocab_size=500)
    recipe = ["--config", str(root / "recipe.yaml")]
    checkpoint, target = f"checkpoint={root / 'teacher'}", f"hf={folder / 'target'}"
    commands: dict[str, list[Any]] = {
        "checkpoint is not given": ["export", target],
        "hf is not given": ["export", checkpoint],
        "max_shard_size=5gb is not a size": ["export", checkpoint, target, "max_shard_size=5gb"],
        f"checkpoint={folder / 'nowhere'} is not there": ["export", f"checkpoint={folder / 'nowhere'}", target],
        "holds no finished checkpoint": ["export", f"checkpoint={folder / 'unfinished'}", target],
        "is not a finished checkpoint": ["evaluate", *recipe, f"checkpoint={folder / 'cut-off'}"],
        f"hf={folder / 'there'} exists": ["export", checkpoint, f"hf={folder / 'there'}"],
        "is not the tokenizer": ["export", checkpoint, target, f"tokenizer.model={other.path}"],
        "cannot be written": ["export", checkpoint, "hf=/proc/nowhere/hf"],
        "data.valid": ["evaluate", checkpoint, "data.sequence_length=32", f"data.valid={folder / 'nothing'}"],
        "data.valid is not given": ["evaluate", checkpoint],
        "evaluate.samples=0": ["evaluate", *recipe, checkpoint, "evaluate.samples=0"],
        "holds no config.json": ["import", f"hf={folder / 'empty'}", f"checkpoint={folder / 'new'}"],
        f"hf={folder / 'nowhere'} is not there": ["import", f"hf={folder / 'nowhere'}", f"checkpoint={folder / 'new'}"],
        f"checkpoint={root / 'teacher'} exists": ["import", f"hf={root / 'hf'}", checkpoint],
    }
    return commands


def listing(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_bad_input(root: Path, tmp_path: Path) -> None:
    """Exit code 2 and one sentence on one and on two ranks, and no file made or changed."""
    commands = bad_commands(root, tmp_path)
    before = listing(tmp_path) | listing(root)
    for words, arguments in commands.items():
        code, shown = minitron(*arguments)
        lines = [line for line in shown.splitlines() if line.startswith(f"minitron {arguments[0]}: ")]
        assert code == 2 and len(lines) == 1 and words in lines[0] and "Traceback" not in shown, (words, shown)
    code, shown = minitron(*commands[f"hf={tmp_path / 'there'} exists"], world_size=2)
    assert code == 2 and "exists" in shown
    assert listing(tmp_path) | listing(root) == before
    assert not (tmp_path / "target").exists() and not (tmp_path / "new").exists()
