"""The table behind test_convert_refusals.py: Hugging Face folders with one thing wrong, and what must be said of each.

A damage changes a copy of a folder that is right; `@` in the words stands for that copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Damage(NamedTuple):
    """`source`: the folder that is copied, `single` (one file), `sharded`, or that of another family."""

    name: str
    source: str
    change: Callable[[Path], None]
    words: str


def rewrite(path: Path, content: bytes) -> None:
    """In a new file: the copy's is a hard link to that of the folder that is right."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def cut_to(name: str, size: Callable[[int], int]) -> Callable[[Path], None]:
    """`size`: new size from old."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        rewrite(folder / name, content[: size(len(content))])

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / name, content if isinstance(content, bytes) else content.encode())


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    """None takes a key away."""

    def change(folder: Path) -> None:
        fields = {**json.loads((folder / "config.json").read_text()), **changes}
        fields = {key: value for key, value in fields.items() if value is not None}
        rewrite(folder / "config.json", json.dumps(fields).encode())

    return change


def tensors(change_them: Callable[[dict[str, torch.Tensor]], Any], file: str = SINGLE) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        change_them(found)
        (folder / file).unlink()
        save_file(found, folder / file, metadata={"format": "pt"})

    return change


def index(change_it: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change_it(content["weight_map"])
        rewrite(folder / INDEX, json.dumps(content).encode())

    return change


def shard(folder: Path, number: int) -> str:
    """The name of a weight file; the last one is -1."""
    return sorted(path.name for path in folder.glob("model-*.safetensors"))[number]


def in_shard(number: int, change: Callable[[str], Callable[[Path], None]]) -> Callable[[Path], None]:
    return lambda folder: change(shard(folder, number))(folder)


def whole_file_beside(folder: Path) -> None:
    """Beside the shards, one file with other weights: what an unfinished upload may leave."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("model-*.safetensors"):
        found |= {name: tensor * 1.5 for name, tensor in load_file(path).items()}
    save_file(found, folder / SINGLE, metadata={"format": "pt"})


UP, NORM, BIAS = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.bias"
HEADER = 8  # bytes of the header's length, then the header
ROPE = {"rope_theta": 10000.0, "factor": 2.0}
CUT, NO_INDEX = f"@/{SINGLE} is not a whole safetensors file", f"@/{INDEX} is not a safetensors index"

FILES = [
    Damage("cut in its data", "single", cut_to(SINGLE, lambda size: size - 100), CUT),
    Damage("cut in its header", "single", cut_to(SINGLE, lambda size: 200), CUT),
    Damage("cut in its length", "single", cut_to(SINGLE, lambda size: 5), CUT),
    Damage("empty", "single", written(SINGLE, ""), CUT),
    Damage("a page", "single", written(SINGLE, "<html>not found</html>" * 9), CUT),
    Damage("a boundless header", "single", written(SINGLE, b"\xff" * 64), CUT),
    Damage("no weights", "single", gone(SINGLE), f"hf=@ holds neither {SINGLE} nor {INDEX}"),
    Damage(
        "a shard cut off",
        "sharded",
        in_shard(-1, lambda name: cut_to(name, lambda size: size // 2)),
        "-of-00005.safetensors is not a whole safetensors",
    ),
    Damage(
        "a shard empty",
        "sharded",
        in_shard(2, lambda name: written(name, "")),
        "@/model-00003-of-00005.safetensors is not a whole safetensors",
    ),
    Damage(
        "a shard gone",
        "sharded",
        in_shard(1, gone),
        f"@/model-00002-of-00005.safetensors is missing, though {INDEX} names it",
    ),
    Damage("an index that is none", "sharded", written(INDEX, "<html>"), NO_INDEX),
    Damage("an index of bytes", "sharded", written(INDEX, b"\xff\xfe\x00"), NO_INDEX),
    Damage("an index of nothing", "sharded", written(INDEX, "{}"), NO_INDEX),
    Damage(
        "an index without a map",
        "sharded",
        written(INDEX, '{"weight_map": 3}'),
        NO_INDEX,
    ),
    Damage(
        "an index with a list",
        "sharded",
        written(INDEX, '{"weight_map": ["a"]}'),
        NO_INDEX,
    ),
    Damage(
        "an index of numbers",
        "sharded",
        index(lambda places: places.update({NORM: 3})),
        NO_INDEX,
    ),
    Damage("an index without one", "sharded", index(lambda places: places.pop(UP)), f"holds no tensor {UP}"),
    Damage(
        "an index that errs",
        "sharded",
        index(lambda places: places.update({NORM: places["model.embed_tokens.weight"]})),
        f"-of-00005.safetensors holds no {NORM}, though {INDEX} says so",
    ),
    Damage(
        "an index of too much",
        "sharded",
        index(lambda places: places.update({BIAS: places[NORM]})),
        f"holds a tensor {BIAS}",
    ),
    Damage("two sets of weights", "sharded", whole_file_beside, f"holds both {SINGLE} and {INDEX}"),
    Damage(
        "a tensor that the index leaves out",
        "sharded",
        in_shard(-1, lambda name: tensors(lambda found: found.update({BIAS: torch.ones(120)}), name)),
        f"holds a tensor {BIAS}",
    ),
]
TENSORS = [
    Damage("one missing", "single", tensors(lambda found: found.pop(UP)), f"hf=@ holds no tensor {UP}"),
    Damage(
        "one left over",
        "single",
        tensors(lambda found: found.update({BIAS: torch.ones(120)})),
        f"@/{SINGLE} holds a tensor {BIAS}, which a llama model does not have",
    ),
    Damage(
        "another shape",
        "single",
        tensors(lambda found: found.update({UP: torch.ones(134, 96)})),
        f"@/{SINGLE} holds {UP} of shape (134, 96), but config.json means (136, 96)",
    ),
    Damage(
        "transposed",
        "single",
        tensors(lambda found: found.update({UP: found[UP].T.contiguous()})),
        f"@/{SINGLE} holds {UP} of shape (96, 136), but",
    ),
    Damage(
        "whole numbers",
        "single",
        tensors(lambda found: found.update({UP: torch.ones(136, 96, dtype=torch.int64)})),
        f"@/{SINGLE} holds {UP} of type I64",
    ),
    Damage(
        "a tied head of its own",
        "llama-tied",
        tensors(lambda found: found.update({"lm_head.weight": torch.ones(1003, 96)})),
        f"@/{SINGLE} holds a lm_head.weight",
    ),
    Damage("untied without a head", "llama-tied", config(tie_word_embeddings=False), "holds no tensor lm_head.weight"),
    Damage("fewer layers", "single", config(num_hidden_layers=2), "holds a tensor model.layers.2."),
    Damage("more layers", "single", config(num_hidden_layers=4), "holds no tensor model.layers.3."),
    Damage("another hidden size", "single", config(hidden_size=48), "but config.json means (1003, 48)"),
    Damage("another head", "single", config(head_dim=16), "self_attn.q_proj.weight of shape (120, 96), but"),
    Damage("more groups", "single", config(num_key_value_heads=6), "k_proj.weight of shape (40, 96), but"),
    Damage("too small a vocabulary", "small", lambda folder: None, "has 600 ids and the model vocab_size=100"),
]
CONFIGS = [
    Damage("none", "single", gone("config.json"), "hf=@ holds no config.json"),
    Damage("garbage", "single", written("config.json", "{model_type: llama"), "@/config.json is not JSON"),
    Damage("bytes", "single", written("config.json", b"\xff\xfe{}"), "@/config.json is not JSON"),
    Damage("blank", "single", written("config.json", ""), "@/config.json is not JSON"),
    Damage("a list", "single", written("config.json", "[1]"), "@/config.json is not a config"),
    Damage("without fields", "single", written("config.json", "{}"), "model_type in @/config.json is not known"),
    Damage("of gpt2", "single", config(model_type="gpt2"), "model_type=gpt2 in @/config.json is not known: choose one"),
    Damage("of two types", "single", config(model_type=["llama"]), "model_type=[llama] in @/config.json is not known"),
    Damage("of a type alone", "single", written("config.json", '{"model_type": "llama"}'), "config.json means"),
    Damage("without a hidden size", "single", config(hidden_size=None), "@/config.json is refused by transformers"),
    Damage("no width", "single", config(hidden_size=0), "@/config.json"),
    Damage("words", "single", config(num_hidden_layers="three"), "@/config.json is refused by transformers"),
    Damage("groups that do not fit", "single", config(num_key_value_heads=4), "must be a multiple of num_query_groups"),
    Damage("biases", "single", config(attention_bias=True), "attention_bias=true in @/config.json is not supported"),
    Damage("more biases", "single", config(mlp_bias=True), "mlp_bias=true in @/config.json is not supported"),
    Damage("gelu", "single", config(hidden_act="gelu"), "hidden_act=gelu in @/config.json is not supported"),
    Damage("gelu in nemotron", "nemotron", config(hidden_act="gelu"), "hidden_act=gelu in @/config.json is not"),
    Damage(
        "yarn",
        "single",
        config(rope_parameters={"rope_type": "yarn", **ROPE}, rope_scaling=None),
        "rope_type=yarn in @/config.json is not supported",
    ),
    Damage(
        "linear",
        "single",
        config(rope_parameters={"rope_type": "linear", **ROPE}, rope_scaling=None),
        "rope_type=linear in @/config.json is not supported",
    ),
    Damage(
        "the older way to say linear",
        "single",
        config(rope_parameters=None, rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_type=linear in @/config.json is not supported",
    ),
    Damage(
        "llama3 in qwen2",
        "qwen2",
        config(
            rope_parameters={
                "rope_type": "llama3",
                **ROPE,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        ),
        "rope_type=llama3 in @/config.json is not supported for model_type=qwen2",
    ),
    Damage(
        "a window",
        "mistral",
        config(sliding_window=32),
        "sliding_window=32 in @/config.json is shorter than max_position_embeddings=64",
    ),
    Damage(
        "a window in use",
        "qwen2",
        config(use_sliding_window=True, sliding_window=32, max_window_layers=1, layer_types=None),
        "use_sliding_window=true in @/config.json is not supported",
    ),
]
DAMAGES = [*FILES, *TENSORS, *CONFIGS]


def copy_linked(source: Path, target: Path) -> Path:
    """A copy that costs no room; changes go through `rewrite`."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        os.link(path, target / path.name)
    return target
