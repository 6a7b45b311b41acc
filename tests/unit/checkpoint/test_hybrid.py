"""Which hybrid models are a GPT under other names, by pattern and by tensors; the others are refused by name.

That the right ones compute the same is shown in tests/distributed/checkpoint/test_other_versions.py, on its own.
"""

from __future__ import annotations

import pytest

from minitron_mcore.checkpoint.hybrid import as_gpt, gpt_names
from minitron_mcore.checkpoint.stored import stored_names
from minitron_mcore.errors import InputError
from tests.refusals import refuses

ATTENTION, MLP = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"


def names_of(pattern: str) -> list[str]:
    """A tensor of every position, and the last norm."""
    inner = {"*": ATTENTION, "-": MLP, "M": "mixer.in_proj.weight", "E": "mlp.experts.linear_fc1.weight"}
    layers = [f"decoder.layers.{position}.{inner[symbol]}" for position, symbol in enumerate(pattern)]
    return [*layers, "decoder.final_norm.weight", "embedding.word_embeddings.weight"]


@pytest.mark.parametrize("key", ["hybrid_layer_pattern", "hybrid_override_pattern"])
@pytest.mark.parametrize(("pattern", "positions", "layers"), [("*-*-", 4, 2), ("*-|*-*-", 6, 3), ("*-", None, 1)])
def test_pairs_are_half_as_many_layers(key: str, pattern: str, positions: int | None, layers: int) -> None:
    given = {key: pattern, "num_layers": positions, "is_hybrid_model": True, "hidden_size": 8}
    found = as_gpt(given, "here")
    assert (found["num_layers"], found["is_hybrid_model"], found["hidden_size"]) == (layers, False, 8)


def test_a_pattern_that_is_not_said_is_left_to_the_tensors() -> None:
    assert as_gpt({"is_hybrid_model": True, "num_layers": 8, "hybrid_layer_pattern": None}, "here")["num_layers"] == 4
    gpt = {"is_hybrid_model": False, "num_layers": 8}
    assert as_gpt(gpt, "here") == gpt and as_gpt({"num_layers": 8}, "here") == {"num_layers": 8}


@pytest.mark.parametrize(
    "pattern", ["M-M-", "*-M-", "*E*E", "**--", "-*-*", "*-*", "*-*-/MM", "*-|M-", "G-G-", "+-", "|"]
)
def test_other_patterns_are_refused_by_name(pattern: str) -> None:
    with refuses("hybrid_layer_pattern", pattern, "in FILE is not supported: a hybrid model can be read only if"):
        as_gpt({"hybrid_layer_pattern": pattern, "num_layers": 4}, "FILE")


def test_a_pattern_of_another_length_is_refused() -> None:
    with refuses("hybrid_layer_pattern", "*-*-", "in FILE has 4 layers, but num_layers=6"):
        as_gpt({"hybrid_layer_pattern": "*-*-", "num_layers": 6}, "FILE")


def test_names_of_pairs_are_those_of_a_gpt() -> None:
    found = stored_names(f"module.{name}" for name in names_of("*-*-"))
    assert set(found[f"decoder.layers.{ATTENTION}"]) == set(found[f"decoder.layers.{MLP}"]) == {0, 1}
    assert found[f"decoder.layers.{MLP}"][1] == f"module.decoder.layers.3.{MLP}"
    assert found["decoder.final_layernorm.weight"] == {None: "module.decoder.final_norm.weight"}
    gpt = ["decoder.layers.0.self_attention.linear_qkv.weight", "decoder.final_layernorm.weight"]
    assert gpt_names(gpt) == {name: name for name in gpt}


@pytest.mark.parametrize(
    ("pattern", "named"),
    [("M-*-", "layers.0.mixer"), ("**--", "layers.1.self"), ("-*", "layers.0.mlp"), ("*E", "layers.1.mlp.experts")],
)
def test_tensors_of_other_layers_are_refused_by_name(pattern: str, named: str) -> None:
    with pytest.raises(InputError, match=rf"the tensor decoder\.{named}.* is not supported: a hybrid model"):
        gpt_names(names_of(pattern))
    with pytest.raises(InputError, match=r"the tensor decoder\.layers\.0\.mlp"):
        gpt_names([*names_of("*-"), f"decoder.layers.0.{MLP}"])
