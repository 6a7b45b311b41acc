"""Which engines are warned of for which shapes: what was met when they were run (docs/serving.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.families.find import known_families
from minitron_mcore.families.serving_limits import LIMITS, serving_warnings
from minitron_mcore.pruning.plan import export_warnings

SHAPE = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
DOCS = Path(__file__).parents[3] / "docs" / "serving.md"


def warned(family: str, **sizes: Any) -> list[str]:
    """The engines, by name."""
    shape = build_architecture({**SHAPE, "kv_channels": 32, "family": family, **sizes})
    assert export_warnings(shape) == [], "it can be exported all the same"
    return [words.partition(" will not load")[0] for words in serving_warnings(shape)]


@pytest.mark.parametrize("family", sorted(known_families()))
def test_a_plain_shape_warns_of_nothing(family: str) -> None:
    assert warned(family) == []
    assert warned(family, num_layers=1, ffn_hidden_size=7) == [], "nor does depth, nor an odd MLP"


@pytest.mark.parametrize(
    ("family", "engines"),
    [
        ("llama", ["CTranslate2"]),
        ("mistral", []),
        ("nemotron", ["llama.cpp"]),
        ("qwen2", ["llama.cpp", "vLLM", "CTranslate2"]),
        ("qwen3", []),
    ],
)
def test_heads_that_are_not_as_wide_as_the_model(family: str, engines: list[str]) -> None:
    assert warned(family, hidden_size=96) == engines
    assert warned(family, num_attention_heads=2) == engines


def test_a_head_dimension_without_a_kernel() -> None:
    assert warned("qwen3", kv_channels=20, hidden_size=80) == ["vLLM on a CPU"]
    shape = build_architecture({**SHAPE, "family": "nemotron", "kv_channels": 32, "hidden_size": 96})
    assert [*serving_warnings(shape)] == [
        "llama.cpp will not load this shape: it needs hidden_size=96 to be num_attention_heads=4 x kv_channels=32 = "
        "128 in nemotron models (docs/serving.md)"
    ]
    assert [*serving_warnings(shape, shape)] == [], "its teacher was no better"


def test_the_documentation_has_every_rule_with_its_source() -> None:
    text = " ".join(DOCS.read_text(encoding="utf-8").split())
    for limit in LIMITS:
        assert limit.engine in text
        assert all(part in text for part in limit.source.split("; ")), limit.source
