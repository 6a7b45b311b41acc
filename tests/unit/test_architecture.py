"""Architecture: sizes against the papers' table, FLOPs against torch's own counter, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minitron_mcore.architecture import (
    Architecture,
    RopeScaling,
    build_architecture,
    load_architecture,
    padded_vocab,
    save_architecture,
)
from minitron_mcore.errors import InputError
from minitron_mcore.families.find import known_families
from minitron_mcore.layout import parameter_table
from tests.refusals import refuses

SMALL: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 103,
    "max_position_embeddings": 64,
}

# Of arXiv 2407.14679 and 2408.11796 and the released models' config.json: family, layers, hidden, ffn, heads,
# vocabulary, parameters and those without embeddings in billions (the papers print one digit less: 8.3 and 6.2, 4.5
# and 3.7). 8 KV groups, head dimension 128.
RELEASED = {
    "Nemotron-4 15B": ("nemotron", 32, 6144, 24576, 48, 256000, "15.63", "12.48"),
    "Minitron-8B": ("nemotron", 32, 4096, 16384, 48, 256000, "8.27", "6.17"),
    "Minitron-4B": ("nemotron", 32, 3072, 9216, 24, 256000, "4.19", "2.62"),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 128256, "8.03", "6.98"),
    "Llama-3.1-Minitron-4B-Width": ("llama", 32, 3072, 9216, 32, 128256, "4.51", "3.72"),
    "Llama-3.1-Minitron-4B-Depth": ("llama", 16, 4096, 14336, 32, 128256, "4.54", "3.49"),
    "Mistral-NeMo 12B": ("mistral", 40, 5120, 14336, 32, 131072, "12.25", "10.91"),
    "Mistral-NeMo-Minitron-8B": ("mistral", 40, 4096, 11520, 32, 131072, "8.41", "7.34"),
}


def small(**changes: Any) -> Architecture:
    return build_architecture({**SMALL, **changes})


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_the_printed_sizes(name: str) -> None:
    family, layers, hidden, ffn, heads, vocab, total, without_embeddings = RELEASED[name]
    model = build_architecture(
        {
            "family": family,
            "num_layers": layers,
            "hidden_size": hidden,
            "ffn_hidden_size": ffn,
            "vocab_size": vocab,
            "num_attention_heads": heads,
            "num_query_groups": 8,
            "kv_channels": 128,
        }
    )
    assert f"{model.num_parameters / 1e9:.2f}" == total
    assert f"{model.num_non_embedding_parameters / 1e9:.2f}" == without_embeddings


@pytest.mark.parametrize("family", known_families())
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_as_many_as_in_transformers(tied: bool, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 103,
        "tie_word_embeddings": tied,
    }
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    ours = small(family=family, untie_embeddings_and_output_weights=not tied)
    assert ours.num_parameters == theirs.num_parameters()


def matrix_products(model: Architecture, s: int) -> None:
    """The products of one forward pass over s tokens, and nothing else, on tensors without values."""

    def by(x: torch.Tensor, width: int) -> torch.Tensor:
        return x @ torch.empty(x.shape[-1], width, device="meta")

    d, heads, groups = model.kv_channels, model.num_attention_heads, model.num_query_groups
    x = torch.empty(s, model.hidden_size, device="meta")
    for _ in range(model.num_layers):
        query, key, value = (by(x, n * d).view(s, n, d).transpose(0, 1) for n in (heads, groups, groups))
        key, value = (part.repeat_interleave(heads // groups, 0) for part in (key, value))
        x = by(((query @ key.transpose(1, 2)) @ value).transpose(0, 1).reshape(s, heads * d), model.hidden_size)
        up = by(x, model.ffn_hidden_size)
        if model.gated_linear_unit:
            up = up * by(x, model.ffn_hidden_size)
        x = by(up, model.hidden_size)
    by(x, model.vocab_size)


@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_flops_are_those_that_torch_counts(family: str) -> None:
    model, s = small(family=family), 32
    with FlopCounterMode(display=False) as counter:
        matrix_products(model, s)
    assert model.forward_flops_per_token(s) * s == counter.get_total_flops()
    assert model.training_flops_per_token(s) == 3 * model.forward_flops_per_token(s)
    head = 2 * model.hidden_size * model.vocab_size
    assert model.forward_flops_per_token(s, output_head=False) == model.forward_flops_per_token(s) - head


def test_what_is_stored_counts_the_padding_and_parameters_do_not() -> None:
    model = small()
    assert model.padded_vocab_size == 128
    padding = 2 * (128 - 103) * model.hidden_size
    stored = sum(parameter.count(model, model.padded_vocab_size) for parameter in parameter_table(model))
    assert stored == model.num_parameters + padding


def test_padding_is_a_multiple() -> None:
    assert [padded_vocab(size) for size in (1, 128, 129, 1003)] == [128, 128, 256, 1024]
    assert small(make_vocab_size_divisible_by=10).padded_vocab_size == 110


def test_defaults_follow_from_the_family_and_the_other_fields() -> None:
    nemotron = small(family="nemotron")
    assert (nemotron.normalization, nemotron.activation, nemotron.rotary_percent) == ("LayerNorm", "squared_relu", 0.5)
    model = small(num_query_groups=None, kv_channels=None)
    assert (model.num_query_groups, model.kv_channels) == (6, 8)
    assert small(rotary_base=1e6).rotary_base == 1e6
    assert small(rope_scaling={"factor": 4.0}).rope_scaling == RopeScaling(factor=4.0)


@pytest.mark.parametrize(
    ("changes", "key", "value", "rule"),
    [
        ({"family": "gpt5"}, "family", "gpt5", "is not known"),
        ({"hidden_size": None}, "hidden_size", None, "is missing"),
        ({"num_layer": 3}, "num_layer", None, "is not a field of an architecture"),
        ({"num_layers": 0}, "num_layers", 0, "must be a whole number of at least 1"),
        ({"ffn_hidden_size": 80.0}, "ffn_hidden_size", 80.0, "must be a whole number of at least 1"),
        ({"num_query_groups": 4}, "num_attention_heads", 6, "must be a multiple of num_query_groups=4"),
        ({"kv_channels": None, "hidden_size": 50}, "hidden_size", 50, "is not a multiple of num_attention_heads=6"),
        ({"padded_vocab_size": 100}, "padded_vocab_size", 100, "must be at least vocab_size=103"),
        ({"kv_channels": 7}, "kv_channels", 7, "x rotary_percent=1.0 makes 7 rotary channels per head"),
        ({"rotary_percent": 1.5}, "rotary_percent", 1.5, "must be above 0 and at most 1"),
        ({"rotary_base": 0.0}, "rotary_base", 0.0, "must be a number above 0"),
        ({"layernorm_epsilon": float("nan")}, "layernorm_epsilon", float("nan"), "must be a number above 0"),
        ({"make_vocab_size_divisible_by": 0}, "make_vocab_size_divisible_by", 0, "must be at least 1"),
        ({"kv_channels": None, "num_attention_heads": 0}, "num_attention_heads", 0, "must be at least 1"),
        ({"rope_scaling": {"factors": 2}}, "rope_scaling.factors", None, "is not a field of rope_scaling"),
        ({"rope_scaling": {"factor": "8"}}, "rope_scaling.factor", "8", "must be a number above 0, not text"),
        ({"rope_scaling": {"high_freq_factor": 1.0}}, "rope_scaling.high_freq_factor", 1.0, "must be above rope"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict[str, Any], key: str, value: Any, rule: str) -> None:
    with refuses(key, value, rule):
        small(**changes)


def test_file_round_trip(tmp_path: Path) -> None:
    model = small(rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32}, rotary_base=1e4)
    save_architecture(model, tmp_path / "architecture.yaml")
    assert load_architecture(tmp_path / "architecture.yaml") == model
    with pytest.raises(InputError, match="is missing"):
        load_architecture(tmp_path / "none" / "architecture.yaml")
    (tmp_path / "wrong.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="holds no mapping"):
        load_architecture(tmp_path / "wrong.yaml")
    (tmp_path / "wrong.yaml").write_bytes(b"num_layers: [\xff")
    with pytest.raises(InputError, match=r"wrong\.yaml is not YAML"):
        load_architecture(tmp_path / "wrong.yaml")
    (tmp_path / "wrong.yaml").write_text("num_layers: 3\n")
    with refuses("hidden_size", None, f"in {tmp_path / 'wrong.yaml'} is missing", "an architecture needs num_layers"):
        load_architecture(tmp_path / "wrong.yaml")
