"""Foreign checkpoints that contradict themselves, hold what cannot be read here, or are damaged: one sentence each."""

from __future__ import annotations

import argparse
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minitron_mcore.architecture import Architecture, RopeScaling
from minitron_mcore.checkpoint.folder import read_architecture
from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.errors import InputError
from tests.distributed.foreign_models import (
    ITERATION,
    LLAMA,
    SIZES,
    TIED,
    arguments,
    expected_architecture,
    run_config,
    whole_tensors,
    with_common_file,
    write_cases,
)
from tests.distributed.ranks import run_on_ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign")
    run_on_ranks(write_cases, 2, path, ["llama", "llama-bridge"])
    for name in ("llama", "llama-bridge"):
        with_common_file(path / name / f"iter_{ITERATION:07d}")
    return path


def changed(root: Path, target: Path, **changes: Any) -> Path:
    """A copy of the Llama of Megatron-LM whose arguments say something else; None: not at all."""
    shutil.copytree(root / "llama", target)
    path = target / f"iter_{ITERATION:07d}" / "common.pt"
    common = torch.load(path, weights_only=False)
    given = {**vars(common["args"]), **changes}
    args = argparse.Namespace(**{name: given[name] for name in given if name not in changes or given[name] is not None})
    torch.save({**common, "args": args}, path)
    return target


# Arguments -> what must be said.
CONTRADICTIONS: dict[str, dict[str, Any]] = {
    r"linear_qkv\.layer_norm_weight of shape \(4, 48\), but num_layers=5 in .*common\.pt means": {"num_layers": 5},
    r" of shape \(4, 48\), but num_layers=3 in .* means \(3, 48\)": {"num_layers": 3},
    r"linear_fc1\.weight of shape \(4, 192, 48\), but ffn_hidden_size=128 in": {"ffn_hidden_size": 128},
    r"word_embeddings\.weight of shape \(1024, 48\), but hidden_size=64 in": {"hidden_size": 64},
    r"linear_qkv\.weight of shape .* num_attention_heads=8, num_query_groups=2, kv_channels=16 in": {
        "num_attention_heads": 8
    },
    r"linear_qkv\.weight of shape .* num_query_groups=6": {"group_query_attention": False},
    r"kv_channels=8 in .* means": {"kv_channels": 8},
    r"padded_vocab_size=1024 in .* must be at least vocab_size=2000": {"vocab_size": 2000},
    r"holds output_layer\.weight, which the model in .*common\.pt does not have": TIED,
    r"holds no decoder\.layers\.self_attention\.linear_qkv\.bias: .*common\.pt describes another model": {
        "add_qkv_bias": True,
        "use_rope_scaling": False,
    },
    r"add_qkv_bias=true in .* fits none of the families .*: a llama model has false": {"add_qkv_bias": True},
    r"add_bias_linear=true in .* is not supported, only false is": {"add_bias_linear": True},
    r"num_moe_experts=8 in .* is not supported": {"num_experts": 8},
    r"position_embedding_type=learned_absolute in .* is not supported, only rope is": {
        "position_embedding_type": "learned_absolute",
        "use_rotary_position_embeddings": False,
    },
    r"seq_len_interpolation_factor=2.0 in .* is not supported": {"rotary_seq_len_interpolation_factor": 2.0},
    r"activation=gelu in .* fits none of the families .*: a nemotron model has squared_relu": {
        "swiglu": False,
        "normalization": "LayerNorm",
        "apply_layernorm_1p": True,
    },
    r"rotary_percent=0.5 in .* fits none of the families .*: a llama model has 1.0": {"rotary_percent": 0.5},
    r"normalization=BatchNorm in .* is not supported": {"normalization": "BatchNorm"},
    r"num_moe_experts=tensor\(\[1, 2\]\) in .* is not supported": {"num_experts": torch.tensor([1, 2])},
    r"num_attention_heads=tensor\(6\) in .* must be a whole number": {"num_attention_heads": torch.tensor(6)},
    r"rotary_base=\[1\] in .*common\.pt must be a number": {"rotary_base": [1]},
    r"layernorm_epsilon=small in .*common\.pt must be a number": {"norm_epsilon": "small"},
    r"vocab_size=1003 in .*common\.pt must be a whole number": {"vocab_size": "1003"},
    r"vocab_size=true in .*common\.pt must be a whole number": {"vocab_size": True},
    r"num_attention_heads=6 in .*common\.pt must be a multiple of num_query_groups=4": {"num_query_groups": 4},
}


def test_contradictions_are_named(root: Path, tmp_path: Path) -> None:
    for number, (words, changes) in enumerate(CONTRADICTIONS.items()):
        folder = changed(root, tmp_path / str(number), **changes)
        with pytest.raises(InputError, match=words) as said:
            read_architecture(folder)
        assert "\n" not in str(said.value) and str(folder) in str(said.value)


def test_run_configs_of_other_forms(root: Path, tmp_path: Path) -> None:
    """Sections of newer versions, Mistral by its provider, and what is refused."""
    args, expected = arguments(**LLAMA), expected_architecture("llama-bridge")
    shutil.copytree(root / "llama-bridge", tmp_path / "bridge")
    path = tmp_path / "bridge" / f"iter_{ITERATION:07d}" / "run_config.yaml"

    def inferred(**changes: Any) -> Architecture:
        path.write_text(run_config(args, **changes))
        return read_architecture(tmp_path / "bridge")

    config = yaml.safe_load(run_config(args))["model"]
    inner = {name: config.pop(name) for name in (*SIZES, "activation_func", "gated_linear_unit", "normalization")}
    path.write_text(yaml.safe_dump({"model": {**config, "transformer": inner}}))
    assert read_architecture(tmp_path / "bridge") == expected
    provider = "megatron.bridge.models.mistral.mistral_provider.MistralModelProvider"
    assert inferred(_target_=provider, scale_factor=None) == expected.replace(family="mistral", rope_scaling=None)
    flagged = inferred(scale_factor=None, rope_scaling=True, rope_scaling_factor=16.0)
    assert flagged.rope_scaling == RopeScaling(16.0, 1.0, 4.0, 8192)
    refused: dict[str, dict[str, Any]] = {
        r"activation=gelu in .*run_config\.yaml fits none": {
            "activation_func": {"_target_": "torch.nn.functional.gelu"}
        },
        r"window_size=\[128, 0\] in .* is not supported": {"window_size": [128, 0]},
        r"position_embedding_type=yarn in .* is not supported": {"position_embedding_type": "yarn"},
        r"num_layers=6 in .*run_config\.yaml means": {"num_layers": 6},
        r"num_layers=four in .* must be a whole number": {"num_layers": "four"},
    }
    for words, changes in refused.items():
        with pytest.raises(InputError, match=words):
            inferred(**changes)
    for content, words in {
        "- a": "holds no mapping",
        "a: [": "is not YAML",
        "train: {}": "holds no section `model`",
    }.items():
        path.write_text(content)
        with pytest.raises(InputError, match=words):
            read_architecture(tmp_path / "bridge")


def test_damage_is_said_in_one_sentence(root: Path, tmp_path: Path) -> None:
    place = shutil.copytree(root / "llama", tmp_path / "llama") / f"iter_{ITERATION:07d}"
    whole = {name: (place / name).read_bytes() for name in (".metadata", "common.pt", "__0_0.distcp")}

    def refused(words: str) -> None:
        with pytest.raises(InputError, match=words) as said:
            reader = TensorReader(tmp_path / "llama", ITERATION)
            for key, layer in whole_tensors(read_architecture(tmp_path / "llama")):
                reader.read(key, layer, tuple(value_shape(key, layer)))
        assert "\n" not in str(said.value)

    def value_shape(key: str, layer: int | None) -> tuple[int, ...]:
        return tuple(whole_tensors(expected_architecture("llama"))[key, layer].shape)

    (place / ".metadata").write_bytes(whole[".metadata"][:1000])
    refused("has no readable .metadata")
    metadata = pickle.loads(whole[".metadata"])
    metadata.state_dict_metadata["output_layer.weight"].chunks.pop()
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(r"the stored parts of output_layer\.weight do not add up to its shape \(1024, 48\)")
    (place / ".metadata").write_bytes(whole[".metadata"])
    (place / "__0_0.distcp").write_bytes(whole["__0_0.distcp"][:2000])
    refused("is damaged, .* cannot be read")
    (place / "__0_0.distcp").write_bytes(whole["__0_0.distcp"])
    (place / "common.pt").unlink()
    refused("common.pt is missing")
    with pytest.raises(InputError, match=r"holds neither run_config\.yaml \(Megatron-Bridge\) nor common\.pt"):
        read_architecture(tmp_path / "llama")
    torch.save({"iteration": 3}, place / "common.pt")
    with pytest.raises(InputError, match=r"common\.pt holds no args of Megatron-LM"):
        read_architecture(tmp_path / "llama")
