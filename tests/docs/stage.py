"""The folder that the documents' commands are run in: every name that they mention lies there, in two sizes.

For a dry run, shapes and token files of the sizes that the documents speak of, without weights; for a run in earnest,
the same names with a tiny model. A document that names another file or folder adds it to a table here.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import yaml
from pyarrow import parquet
from safetensors.numpy import save_file

from tests.e2e.test_align import chats, pairs
from tests.e2e.test_paper_recipes import much_text, stand_in

ROOT = Path(__file__).resolve().parents[2]
# Checkpoints, by the shape in configs/models that they have in a dry run.
LLAMA, STUDENT = "llama-3.1-8b", "llama-3.1-minitron-4b-width"
CHECKPOINTS = {
    **dict.fromkeys(("teacher", "aligned-teacher", "checkpoints/llama-3.1-8b"), LLAMA),
    **dict.fromkeys(("student", "pruned", "distilled", "tuned", "aligned", "checkpoints/pruned"), STUDENT),
    **dict.fromkeys(("OUT/winner/pruned", "distilled/best"), STUDENT),
    "checkpoints/llama-trial/students/student/distilled": STUDENT,
    **dict.fromkeys(("runs/quickstart/teacher", "work/teacher"), "quickstart"),
    **dict.fromkeys((f"runs/quickstart/students/{each}/distilled" for each in ("width", "depth")), "quickstart-width"),
    **dict.fromkeys(("work/pruned", "work/distilled"), "quickstart-width"),
}
TOKENS = (
    *("data/corpus", "data/corpus_valid", "data/tokens", "data/tokens_valid", "data/valid"),
    *("runs/quickstart/data/tokens", "runs/quickstart/data/tokens_valid", "work/tokens", "work/tokens_valid"),
    "data/megatron/my",
)
TEXTS = ("corpus", "text", "data/text")
# One file or folder of texts, by the key of a line that holds the text.
RECORDS = {"data/corpus.jsonl.gz": "body", "data/parquet/part.parquet": "content"}
CHATS = {"ultrachat": chats, "instructions": chats, "ultrafeedback": pairs, "preferences": pairs}
TOKENIZERS = ("t.model", "tokenizer.model", "work/tokenizer.model")
QUESTIONS = {"winogrande.jsonl": {"context": "prune1", "choices": [" distil1", " score1"], "answer": 0}}
PROMPTS = {"prompts.jsonl": {"prompt": "prune1 distil1"}}
HUGGING_FACE = ("Llama-3.1-8B", "hf/student", "models/Llama-3.1-8B", "models/my-llama")
# What `--config recipe.yaml` says, where a document's command says no more; and what it says for a verb besides.
RECIPE: dict[str, Any] = {
    "teacher": {"checkpoint": "teacher"},
    "data": {"train": "data/tokens_text_document", "valid": "data/tokens_valid_text_document", "sequence_length": 4096},
    "tokenizer": {"model": "tokenizer.model"},
    "precision": "bf16",
    "output": "out",
    "scores": "scores.safetensors",
    "parallel": {"tensor": 8, "sequence": True},
    "distill": {"tokens": "2B", "checkpoint": "out/distilled", "global_batch_size": 1024},
    "correct": {"tokens": "2B", "global_batch_size": 1024},
    "student": {"checkpoint": "student"},
}
SHAPED: dict[str, Any] = {"ffn_hidden_size": 9216}
SPECIAL: dict[str, dict[str, Any]] = {
    "train": {
        "model": {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32},
        "train": {"checkpoint": "out/teacher", "tokens": "2B", "global_batch_size": 1024},
    },
    "align": {
        "align": {"load": "student", "checkpoint": "out/aligned"},
        "chat": {"train": "ultrafeedback/", "template": "zephyr"},
    },
    **{verb: {"student": SHAPED} for verb in ("run", "submit", "estimate")},
}


def lay_out(folder: Path, words: Path) -> Path:
    """For dry runs. `words`: a tokenizer and lines of text, as tests/conftest.py makes them."""
    for name, shape in CHECKPOINTS.items():
        stand_in(shape, folder / name)
        (folder / name / "tokenizer").mkdir()
        shutil.copy(words / "tokenizer.model", folder / name / "tokenizer")
    for name in TOKENS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        much_text(folder / f"{name}_text_document")
    write_small(folder, words)
    write_scores_and_plan(folder, "teacher", SHAPED)
    write_scores_and_plan(folder / "work", "teacher", {"hidden_size": 120, "ffn_hidden_size": 320})
    for name in HUGGING_FACE:
        write_hugging_face(folder / name, words)
    for name in ("runs/quickstart", "runs/aligned"):
        (folder / name / "done").mkdir(parents=True)
        (folder / name / "recipe.yaml").write_text("{}")
    write_recipe(folder, "plan")
    return folder


def write_recipe(folder: Path, verb: str, name: str = "recipe.yaml", text: str = "") -> None:
    """`recipe.yaml` as one for that verb says it; of another name, with the text that a document gives it."""
    if name == "recipe.yaml":
        (folder / name).write_text(yaml.safe_dump(RECIPE | SPECIAL.get(verb, {})))
    elif not name.startswith("configs/"):
        (folder / name).write_text(text)


def write_small(folder: Path, words: Path) -> None:
    """What is the same in both sizes: text, chats, tokenizers, the repository's own folders."""
    for name in TEXTS:
        (folder / name).mkdir(parents=True)
        shutil.copy(words / "text.jsonl", folder / name)
    for name, key in RECORDS.items():
        write_records(folder / name, [{key: "prune1 distil1 score1 plan1 " * 20}] * 200)
    for name, records in CHATS.items():
        write_lines(folder / name / "part.jsonl", records() * 20)
    for name, record in (QUESTIONS | PROMPTS).items():
        write_lines(folder / name, [record])
    for name in TOKENIZERS:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(words / "tokenizer.model", folder / name)
    for name in ("configs", "launch", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)


def write_records(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_bytes(gzip.compress("".join(f"{json.dumps(each)}\n" for each in records).encode()))


def write_lines(path: Path, records: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(each)}\n" for each in records))


def write_scores_and_plan(folder: Path, teacher: str, student: dict[str, Any]) -> None:
    """Of that teacher's shape, for a student of those sizes."""
    from minitron_mcore.checkpoint.folder import read_architecture
    from minitron_mcore.importance.scores import random_scores, save_scores
    from minitron_mcore.pruning.config import PruneConfig, StudentConfig
    from minitron_mcore.pruning.plan import make_plan
    from minitron_mcore.pruning.plan_file import save_plan
    from minitron_mcore.runtime.config import ParallelConfig

    scores = random_scores(read_architecture(folder / teacher), 1)
    save_scores(scores, folder / "scores.safetensors")
    plan = make_plan(scores, StudentConfig(**student), PruneConfig(), ParallelConfig(), None)
    save_plan(plan, folder / "plan.json")


def write_hugging_face(folder: Path, words: Path) -> None:
    """A Llama of two layers, as transformers would save it."""
    h, f, heads, groups, d, v = 64, 128, 8, 4, 8, 512
    layer = {
        **{
            f"self_attn.{each}_proj.weight": (count * d, h)
            for each, count in zip("qkv", (heads, groups, groups), strict=True)
        },
        **{"self_attn.o_proj.weight": (h, heads * d), "mlp.gate_proj.weight": (f, h), "mlp.up_proj.weight": (f, h)},
        **{"mlp.down_proj.weight": (h, f), "input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)},
    }
    shapes = {f"model.layers.{number}.{name}": shape for number in range(2) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (v, h), "lm_head.weight": (v, h), "model.norm.weight": (h,)}
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"},
        **{"num_hidden_layers": 2, "hidden_size": h, "intermediate_size": f, "num_attention_heads": heads},
        **{"num_key_value_heads": groups, "head_dim": d, "vocab_size": v, "max_position_embeddings": 1024},
        **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False},
        **{"attention_bias": False, "mlp_bias": False},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    random = numpy.random.default_rng(1)
    tensors = {name: random.normal(0, 0.05, shape).astype(numpy.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(words / "tokenizer.model", folder)


# For runs in earnest: where each name's files are in a finished run of SMALL, the folder `runs/quickstart`.
SMALL_PARTS = {
    **dict.fromkeys(("teacher", "checkpoints/llama-3.1-8b"), "teacher"),
    **dict.fromkeys(("student", "pruned", "OUT/winner/pruned"), "students/width/pruned"),
    **dict.fromkeys(("distilled", "distilled/best"), "students/width/distilled"),
    **dict.fromkeys(HUGGING_FACE, "hf/width"),
    **dict.fromkeys(TOKENIZERS[:2], "tokenizer/tokenizer.model"),
    "scores.safetensors": "scores.safetensors",
    "plan.json": "students/width/pruned/plan.json",
}
STEPS = {"global_batch_size": 4, "micro_batch_size": 4, "save_interval": 0}
SMALL: dict[str, Any] = {
    "output": "runs/quickstart",
    "input": ["${python_stdlib:}/json"],
    "tokenizer": {"vocab_size": 400, "extensions": [".py"]},
    "preprocess": {"extensions": [".py"], "valid_fraction": 0.3, "workers": 1},
    "data": {"sequence_length": 32, "num_workers": 0},
    "model": {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6}
    | {"num_query_groups": 2, "kv_channels": 8, "max_position_embeddings": 256},
    "importance": {"num_samples": 4, "micro_batch_size": 4},
    "train": {"tokens": 1024, **STEPS},
    "distill": {"tokens": 512, **STEPS},
    "evaluate": {"samples": 4, "micro_batch_size": 4},
    "run": {"students": {name: {"hidden_size": 36, "ffn_hidden_size": 64} for name in ("width", "depth")}},
    "log": {"wandb": "disabled", "tensorboard": False},
}
SMALL_RECIPE = {
    **RECIPE,
    **{"precision": "fp32", "parallel": {}, "importance": SMALL["importance"], "evaluate": SMALL["evaluate"]},
    **{
        "model": SMALL["model"],
        "data": RECIPE["data"] | SMALL["data"],
        "log": SMALL["log"],
        "cache": {"num_samples": 128},
    },
    **{name: {"tokens": 512, "checkpoint": f"out/{name}", **STEPS} for name in ("train", "correct", "distill")},
}


def lay_out_small(folder: Path, words: Path) -> None:
    """For runs in earnest, in a folder where SMALL has been run."""
    run = folder / "runs" / "quickstart"
    write_small(folder, words)
    for name, part in SMALL_PARTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (run / part).is_dir():
            shutil.copytree(run / part, folder / name, dirs_exist_ok=True)
        else:
            shutil.copy(run / part, folder / name)
    for name in TOKENS:
        prefix = folder / f"{name}_text_document"
        prefix.parent.mkdir(parents=True, exist_ok=True)
        if "work/" not in name and not prefix.with_suffix(".bin").exists():
            for ending in (".bin", ".idx", ".json"):
                shutil.copy(run / "data" / f"tokens_text_document{ending}", prefix.with_suffix(ending))
