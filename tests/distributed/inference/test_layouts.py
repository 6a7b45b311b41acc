"""What is generated does not depend on the layout, on the batch or on the order of the prompts.

Drawn tokens too: logits differ by rounding alone, 1e-6 of the largest one, and a draw falls that near to a boundary
about once in ten thousand tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.models import LAYOUTS, start_layout, tiny
from tests.distributed.ranks import run_on_ranks

LENGTHS = (3, 17, 17, 1, 8)
NEW = 12
FAMILIES = ("llama", "qwen3")
SLOW = {"TP2", "PP2", "TP2-PP2"}  # parts of others, and of test_engine.py


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(0, 1003, (length,), generator=generator).tolist() for length in LENGTHS]


def generate_on_rank(parallel: dict[str, Any], world_size: int) -> dict[str, Any]:
    """By family and way, (tokens, stopped) of every prompt; and the steps that were told of."""
    from minitron_mcore.inference.engine import Engine, Sampling
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.model.sites import without_layers

    layout = start_layout(parallel, world_size)
    found: dict[str, Any] = {}
    for family in FAMILIES:
        architecture = tiny(family)
        chunks = build_model(architecture, layout, "fp32")
        initialize(chunks, architecture, seed=1)
        drawn = Sampling(NEW, temperature=0.9, top_p=0.8, seed=5)
        each = [Sampling(2 + number, temperature=number % 2, seed=5) for number in range(len(LENGTHS))]
        steps: list[int] = []
        ways = {
            "greedy": Engine(chunks, architecture).generate(prompts(), Sampling(NEW), on_token=steps.append),
            "drawn": Engine(chunks, architecture).generate(prompts(), drawn),
            "one by one": Engine(chunks, architecture, max_batch=1).generate(prompts(), drawn),
            "without the cache": Engine(chunks, architecture, cached=False).generate(prompts(), drawn),
            "each its own": Engine(chunks, architecture).generate(prompts(), each),
        }
        last = ways["greedy"][1].tokens[4]
        ways["stopped"] = Engine(chunks, architecture).generate(
            prompts(), Sampling(NEW), stop_tokens=[last], is_stopped=lambda new: len(new) == 7
        )
        with without_layers(chunks, range(architecture.num_layers)):
            ways["without layers"] = Engine(chunks, architecture).generate(prompts(), Sampling(NEW))
            lasts = [prompt[-1:] for prompt in prompts()]
            ways["of the last token"] = Engine(chunks, architecture).generate(lasts, Sampling(NEW))
        found |= {f"{family} {way}": [(each.tokens, each.stopped) for each in rows] for way, rows in ways.items()}
        found[f"{family} steps"] = steps
        assert chunks[0].training and chunks[0].decoder.layers[0].mlp.linear_fc1.sequence_parallel == layout.sequence
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    (found,) = run_on_ranks(generate_on_rank, 1, {}, 1)
    return found


def test_one_rank(alone: dict[str, Any]) -> None:
    for family in FAMILIES:
        of = {way.removeprefix(f"{family} "): rows for way, rows in alone.items() if way.startswith(family)}
        assert of["drawn"] == of["one by one"] == of["without the cache"] != of["greedy"]
        assert all((len(tokens), stopped) == (NEW, False) for tokens, stopped in of["drawn"])
        assert max(token for tokens, _ in of["drawn"] for token in tokens) < 1003
        assert [len(tokens) for tokens, _ in of["each its own"]] == [2, 3, 4, 5, 6]
        assert of["each its own"][2][0] == of["greedy"][2][0][:4], "temperature 0 beside others"
        assert of["without layers"] == of["of the last token"] != of["greedy"], "nothing else is seen"
        assert of["steps"] == [*range(NEW)]
        last = of["greedy"][1][0][4]
        for (tokens, stopped), (whole, _) in zip(of["stopped"], of["greedy"], strict=True):
            end = min(7, *(place + 1 for place, token in enumerate(whole) if token == last), 7)
            assert stopped and tokens == whole[:end]
        assert len(of["stopped"][1][0]) == 1 + of["greedy"][1][0].index(last) <= 5


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS if name != "1"]
)
def test_every_layout_writes_the_same(alone: dict[str, Any], name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    for rank in run_on_ranks(generate_on_rank, world_size, parallel, world_size):
        for way, rows in alone.items():
            assert rank[way] == rows, way


def chosen_on_rank(parallel: dict[str, Any], world_size: int) -> dict[tuple[int, float], list[int]]:
    """Of logits with ties within and across shards; the last shard ends within, or is all padding."""
    from minitron_mcore.inference.sampling import Sampling, choose
    from minitron_mcore.model.vocab_parallel import VocabularyShard
    from minitron_mcore.runtime.groups import tensor_group

    start_layout(parallel, world_size)
    group, found = tensor_group(), dict[tuple[int, float], list[int]]()
    for vocabulary in (16, 13, 7):
        whole = torch.full((4, 16), 9.0)  # padding is the largest
        whole[:, :vocabulary] = torch.tensor([[0.0], [1.0], [2.0], [-3.0]])
        whole[1, [5, 6]] = whole[2, 6] = 4.0
        rows = 16 // group.size()
        shard = VocabularyShard.of(rows, vocabulary, group)
        for temperature in (0.0, 1.0):
            part = whole[:, rows * group.rank() :][:, :rows].clone()
            whose = [(Sampling(1, temperature=temperature, seed=seed), 0) for seed in range(4)]
            whose[0] = Sampling(1), 0
            found[vocabulary, temperature] = choose(part, shard, whose, 0, vocabulary).tolist()
    return found


def chosen_where_sums_differ_on_rank(parallel: dict[str, Any], world_size: int) -> dict[tuple[int, float], list[int]]:
    """As if the sums of a draw had come out otherwise on the ranks but the first."""
    from minitron_mcore.inference import sampling

    draw = sampling.draw

    def rounded_otherwise(logits_BW: torch.Tensor, settings: Any, draws: Any) -> torch.Tensor:
        return (draw(logits_BW, settings, draws) + torch.distributed.get_rank()) % logits_BW.shape[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "draw", rounded_otherwise)
        return chosen_on_rank(parallel, world_size)


def test_ties_and_padding() -> None:
    (one,), two = run_on_ranks(chosen_on_rank, 1, {}, 1), run_on_ranks(chosen_on_rank, 2, {"tensor": 2}, 2)
    assert two == [one, one]
    for (vocabulary, temperature), tokens in one.items():
        assert max(tokens) < vocabulary
        assert tokens[0] == 0 if temperature else tokens == [0, 5, 6, 0]
    assert run_on_ranks(chosen_where_sums_differ_on_rank, 2, {"tensor": 2}, 2) == [one, one], "one rank decides"


def prompts_refused_on_rank() -> list[str]:
    from minitron_mcore.errors import InputError
    from minitron_mcore.inference.engine import Engine, Sampling
    from minitron_mcore.model.gpt import build_model

    engine = Engine(build_model(tiny("llama"), start_layout({}, 1), "fp32"), tiny("llama"))
    said = []
    for last in ([], [1] * 64):
        with pytest.raises(InputError) as caught:
            engine.generate([[1], last], Sampling(1))
        said.append(str(caught.value))
    return said


def test_a_prompt_has_a_token_and_leaves_room_for_one() -> None:
    ((empty, full),) = run_on_ranks(prompts_refused_on_rank, 1)
    assert empty.startswith("prompts[1] holds no token to go on from: begin it with the tokenizer's end-of-document")
    assert full == (
        "prompts[1] holds 64 tokens, and the model takes max_position_embeddings=64, of which one must be new: "
        "shorten it"
    )


def refused_on_rank() -> str:
    from minitron_mcore.errors import InputError
    from minitron_mcore.inference.engine import Engine, Sampling
    from minitron_mcore.model.gpt import build_model

    chunks = build_model(tiny("llama"), start_layout({"context": 2}, 2), "fp32")
    try:
        Engine(chunks, tiny("llama")).generate([[1]], Sampling(1))
    except InputError as error:
        return str(error)
    return "nothing"


def test_context_parallel_is_refused() -> None:
    for said in run_on_ranks(refused_on_rank, 2):
        assert said.startswith("parallel.context=2 is not possible in generation")
