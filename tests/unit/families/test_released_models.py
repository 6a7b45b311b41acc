"""Released models' `config.json`, field by field: the Architecture they mean, their exact size, and back again.

The configs are written down from the released folders (Nemotron-4 15B, which has none, from arXiv 2402.16819 in the
form of the Minitron models), without what says nothing of the shape. Parameters: transformers' own model on the meta
device, and the totals that the released weights' indices state, where known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_mcore.architecture import RopeScaling
from minitron_mcore.checkpoint.folder import read_architecture
from minitron_mcore.checkpoint.hf_config import read_config
from minitron_mcore.families.find import find_family
from minitron_mcore.families.table import config_of

LLAMA_3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def shape(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, length: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    }


def llama(*sizes: int, **others: Any) -> dict[str, Any]:
    fields = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False}
    return {"model_type": "llama", **shape(*sizes), **fields, **others}


def mistral(*sizes: int, **others: Any) -> dict[str, Any]:
    fields = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None}
    return {"model_type": "mistral", **shape(*sizes), **fields, **others}


def nemotron(*sizes: int) -> dict[str, Any]:
    fields = {"hidden_act": "relu2", "norm_eps": 1e-5, "rope_theta": 10000.0, "head_dim": 128}
    biases = {"attention_bias": False, "mlp_bias": False}
    return {"model_type": "nemotron", **shape(*sizes), **fields, **biases, "partial_rotary_factor": 0.5}


def qwen(model_type: str, *sizes: int, **others: Any) -> dict[str, Any]:
    fields = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False}
    window = {"sliding_window": sizes[-1], "max_window_layers": sizes[0]}
    return {"model_type": model_type, **shape(*sizes), **fields, **window, **others}


SCALED = {"rope_theta": 500000.0, "rope_scaling": LLAMA_3_SCALING}
# name -> config.json, parameters where the release states them
RELEASED: dict[str, tuple[dict[str, Any], int | None]] = {
    "Llama-2-7B": (llama(32, 4096, 11008, 32, 32, 32000, 4096), 6738415616),
    "Meta-Llama-3-8B": (llama(32, 4096, 14336, 32, 8, 128256, 8192, rope_theta=500000.0), 8030261248),
    "Llama-3.1-8B": (llama(32, 4096, 14336, 32, 8, 128256, 131072, **SCALED), 8030261248),
    "Llama-3.2-1B": (
        llama(
            *(16, 2048, 8192, 32, 8, 128256, 131072),
            rope_theta=500000.0,
            rope_scaling={**LLAMA_3_SCALING, "factor": 32.0},
            head_dim=64,
            tie_word_embeddings=True,
        ),
        1235814400,
    ),
    "Llama-3.1-Minitron-4B-Width-Base": (
        llama(32, 3072, 9216, 32, 8, 128256, 131072, head_dim=128, **SCALED),
        None,
    ),
    "Llama-3.1-Minitron-4B-Depth-Base": (llama(16, 4096, 14336, 32, 8, 128256, 131072, **SCALED), None),
    "Mistral-7B-v0.3": (mistral(32, 4096, 14336, 32, 8, 32768, 32768), 7248023552),
    "Mistral-Nemo-Base-2407": (mistral(40, 5120, 14336, 32, 8, 131072, 128000, head_dim=128), 12247782400),
    "Mistral-NeMo-Minitron-8B-Base": (mistral(40, 4096, 11520, 32, 8, 131072, 8192, head_dim=128), None),
    "Nemotron-4-15B": (nemotron(32, 6144, 24576, 48, 8, 256000, 4096), None),
    "Minitron-8B-Base": (nemotron(32, 4096, 16384, 48, 8, 256000, 4096), None),
    "Minitron-4B-Base": (nemotron(32, 3072, 9216, 24, 8, 256000, 4096), None),
    "Qwen2.5-0.5B": (qwen("qwen2", 24, 896, 4864, 14, 2, 151936, 32768, tie_word_embeddings=True), 494032768),
    "Qwen2.5-7B": (qwen("qwen2", 28, 3584, 18944, 28, 4, 152064, 131072), 7615616512),
    "Qwen3-8B": (qwen("qwen3", 36, 4096, 12288, 32, 8, 151936, 40960, head_dim=128), 8190735360),
}


@pytest.mark.parametrize("name", RELEASED)
def test_every_field_arrives(name: str, tmp_path: Path) -> None:
    config, _ = RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    a = read_config(tmp_path)
    arrived = (a.num_layers, a.hidden_size, a.ffn_hidden_size, a.num_attention_heads, a.num_query_groups)
    assert arrived == tuple(config[key] for key in list(shape(*range(7)))[:5])
    assert (a.vocab_size, a.max_position_embeddings) == (config["vocab_size"], config["max_position_embeddings"])
    assert a.kv_channels == config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    assert a.padded_vocab_size % 128 == 0 and 0 <= a.padded_vocab_size - a.vocab_size < 128
    assert a.layernorm_epsilon == config.get("rms_norm_eps", config.get("norm_eps"))
    assert a.rotary_base == config.get("rope_theta", 10000.0)
    assert a.rotary_percent == config.get("partial_rotary_factor", 1.0)
    assert a.untie_embeddings_and_output_weights is not config["tie_word_embeddings"]
    assert (a.rope_scaling is None) == ("rope_scaling" not in config)
    if a.rope_scaling is not None:
        assert a.rope_scaling == RopeScaling(**{k: v for k, v in config["rope_scaling"].items() if k != "rope_type"})
    is_nemotron = config["model_type"] == "nemotron"
    assert a.normalization == ("LayerNorm" if is_nemotron else "RMSNorm")
    assert a.layernorm_zero_centered_gamma is is_nemotron and a.gated_linear_unit is not is_nemotron
    assert a.activation == ("squared_relu" if is_nemotron else "silu")
    assert a.add_qkv_bias is (config["model_type"] == "qwen2") and a.qk_layernorm is (config["model_type"] == "qwen3")


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_are_exactly_as_many(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config, stated = RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    ours = read_config(tmp_path).num_parameters
    assert ours == theirs.num_parameters()
    assert stated is None or ours == stated


@pytest.mark.parametrize("name", RELEASED)
def test_the_config_that_we_write_means_the_same(name: str, tmp_path: Path) -> None:
    """To us, and to transformers."""
    from transformers import AutoConfig

    config, _ = RELEASED[name]
    for folder, content in (("theirs", config), ("ours", None)):
        (tmp_path / folder).mkdir()
        if content is None:
            architecture = read_config(tmp_path / "theirs")
            content = config_of(find_family(architecture.family, "a test"), architecture, "a test")
        (tmp_path / folder / "config.json").write_text(json.dumps(content))
    theirs, ours = (AutoConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("theirs", "ours"))
    assert read_config(tmp_path / "ours") == read_config(tmp_path / "theirs")
    # `architectures` and marks of the tokenizer are no part of the shape; a window that is not used has no length.
    skipped = ("architectures", "_name_or_path", "bos_token_id", "eos_token_id", "max_window_layers")
    assert all(theirs[key] == ours[key] for key in theirs if key not in skipped and key in ours)
    assert theirs.keys() - ours.keys() <= {*skipped}


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("nemotron-4-15b", "Nemotron-4-15B"),
        ("llama-3.1-8b", "Llama-3.1-8B"),
        ("mistral-nemo-12b", "Mistral-Nemo-Base-2407"),
    ],
)
def test_the_shapes_in_configs_are_the_released_ones(folder: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[name][0]))
    assert read_architecture(Path(__file__).parents[3] / "configs" / "models" / folder) == read_config(tmp_path)
