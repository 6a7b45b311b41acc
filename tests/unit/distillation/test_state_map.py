"""Which states are compared: the papers' default from both depths, given maps, where a state lies, what is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.distillation.config import HiddenStatesConfig
from minitron_mcore.distillation.states.map import Pair, check_hidden_states, holder, pairs, relation_heads
from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig


def model(**changes: Any) -> Architecture:
    fields = {
        "family": "llama",
        "num_layers": 16,
        "hidden_size": 48,
        "ffn_hidden_size": 96,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 16,
        "vocab_size": 128,
        "max_position_embeddings": 64,
    }
    return build_architecture({**fields, **changes})


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (16, 32, (29, 13)),  # arXiv 2407.14679, table 17
        (32, 32, (29, 29)),  # width alone
        (2, 8, (6, 0)),
        (1, 8, (7, 0)),
        (8, 4, (1, 5)),
    ],
)
def test_default_map(student: int, teacher: int, expected: tuple[int, int]) -> None:
    assert pairs(["block_output"], None, student, teacher) == [Pair("block_output", *expected)]


def test_every_site_at_every_pair_and_the_embedding_once() -> None:
    found = pairs(["embedding", "mlp_input", "block_output"], [[0, 0], [31, 15], [31, 14]], 16, 32)
    assert found[0] == Pair("embedding", 0, 0)
    assert found[1:4] == [Pair("mlp_input", 0, 0), Pair("mlp_input", 31, 15), Pair("mlp_input", 31, 14)]
    assert [pair.site for pair in found] == ["embedding", *["mlp_input"] * 3, *["block_output"] * 3]
    assert pairs([], None, 16, 32) == []


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[32, 13]], "teacher layer 32 with student layer 13, but the teacher has layers 0 to 31"),
        ([[29, 16]], "teacher layer 29 with student layer 16, but the student has layers 0 to 15"),
        ([[-1, 3]], "teacher layer -1 with student layer 3, but the teacher has layers 0 to 31"),
        ([[1, -3]], "the student has layers 0 to 15"),
    ],
)
def test_wrong_maps_are_refused(layers: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=rf"^distill\.hidden_states\.layers .*{message}"):
        pairs(["block_output"], layers, 16, 32)


def test_where_a_state_lies() -> None:
    assert holder("embedding", 0, 16) == 0
    assert [holder("block_output", layer, 16) for layer in (0, 14, 15)] == [1, 15, 15]
    assert [holder(site, 7, 16) for site in ("mlp_input", "attention_relation")] == [7, 7]


def test_relation_heads() -> None:
    student, teacher = model(), model(num_attention_heads=8, num_query_groups=4, kv_channels=24)
    assert relation_heads(0, student, teacher, 2) == math.gcd(2, 4)
    assert relation_heads(16, student, teacher, 4) == 16
    with pytest.raises(InputError, match=r"relation_heads=5 does not divide the 96 channels of the student's queries"):
        relation_heads(5, student, teacher, 1)
    with pytest.raises(InputError, match=r"relation_heads=64 does not divide the 96 channels of the student's queries"):
        relation_heads(64, student, teacher, 1)
    with pytest.raises(InputError, match=r"relation_heads=2 must be a multiple of parallel\.tensor=4"):
        relation_heads(2, student, teacher, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ["logits"]}, "sites[0]=logits must be one of embedding, block_output"),
        ({"sites": ["mlp_input", "mlp_input"]}, "sites=[mlp_input, mlp_input] holds mlp_input twice"),
        ({"layers": [[29]]}, "layers[0]=[29] must be a pair [teacher layer, student layer]"),
        ({"layers": [[2, 1], [29, 13, 2]]}, "layers[1]=[29, 13, 2] must be a pair"),
        ({"layers": [[29, 13], [1, 1], [29, 13]]}, "layers=[[29, 13], [1, 1], [29, 13]] holds the pair [29, 13] twice"),
        ({"layers": []}, "layers=[] is empty"),
        ({"weight": -1.0}, "weight=-1.0 must be finite and at least 0"),
        ({"weight": math.nan}, "weight=nan must be finite"),
        ({"relation_heads": -2}, "relation_heads=-2 must be at least 0"),
        ({"sites": ["attention_relation"], "relation_heads": 5}, "distill.hidden_states.relation_heads=5 does not"),
        ({"sites": [], "weighting": "fixed"}, "weighting=fixed has no effect without"),
        ({"sites": [], "layers": [[1, 1]]}, "layers=[[1, 1]] has no effect without"),
        (
            {"relation_heads": 2},
            "relation_heads=2 has no effect with distill.hidden_states.sites=[block_output]: leave",
        ),
        ({"sites": ["embedding"], "layers": [[1, 1]]}, "layers=[[1, 1]] has no effect with"),
        ({"sites": ["attention_relation"], "loss": "cosine"}, "loss=cosine has no effect with"),
    ],
)
def test_wrong_sections_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        config = HiddenStatesConfig(**{"sites": ["block_output"], **changes})
        check_hidden_states(config, model(), model(num_layers=32), ParallelConfig())


def test_attention_relations_need_the_whole_sequence() -> None:
    config = HiddenStatesConfig(sites=["attention_relation"])
    with pytest.raises(InputError, match=r"parallel\.context=2"):
        check_hidden_states(config, model(), model(), ParallelConfig(context=2))
    assert check_hidden_states(config, model(), model(), ParallelConfig()) == ([Pair("attention_relation", 13, 13)], 2)
