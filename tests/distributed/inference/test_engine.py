"""The engine against `transformers.generate` at several layouts.

In fp32 greedy tokens must be equal: the margins of these random models are far above rounding (their logits differ by
1e-6 of the largest one). In bf16 near ties fall either way: every token must be the best, or almost, in transformers'
fp32 computation with the same bf16 weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.hf_cases import CASES, SHAPE, alone, save_with_transformers, transformers_tokens
from tests.distributed.models import LAYOUTS, start_layout
from tests.distributed.ranks import run_on_ranks

# Unequal, and one alone of its length; the longest leaves no room for NEW tokens.
LENGTHS = (5, 11, 11, 2, 1, 60)
NEW = 9
PLACES = ["1", "TP2", "PP2"]
IN_BF16 = ("llama-scaled", "nemotron", "qwen3")
# How far below the best logit, of the largest one: roundings of 2^-9 add up over three layers and the head.
NEAR_TIE = 0.03


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator).tolist() for length in LENGTHS]


def imported(folder: str) -> None:
    """`imported-CASE` of every `theirs-CASE`."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.hf_config import read_config
    from minitron_mcore.checkpoint.import_hf import import_checkpoint

    layout = start_layout({}, 1)
    for case in CASES:
        theirs, target = Path(folder, f"theirs-{case}"), Path(folder, f"imported-{case}")
        architecture = read_config(theirs)
        import_checkpoint(theirs, target, architecture, layout, alone())
        write_description(target, architecture, lineage={}, recipe="", save_tokenizer=None)


def generate_on_rank(folder: str, parallel: dict[str, Any], world_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """By case: greedy tokens in one batch with the cache, in batches of two without it; and those in bf16."""
    from minitron_mcore.checkpoint.folder import read_architecture
    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.inference.engine import Engine, Sampling
    from minitron_mcore.model.gpt import build_model

    layout = start_layout(parallel, world_size)

    def made(case: str, precision: str) -> dict[str, list[list[int]]]:
        checkpoint = Path(folder, f"imported-{case}")
        architecture = read_architecture(checkpoint)
        chunks = build_model(architecture, layout, precision, trainable=False)
        load_weights(checkpoint, 0, as_chunks(chunks), architecture)
        ways = {
            "cached": Engine(chunks, architecture),
            "whole": Engine(chunks, architecture, cached=False, max_batch=2),
        }
        return {
            name: [list(one.tokens) for one in engine.generate(prompts(), Sampling(NEW))]
            for name, engine in ways.items()
        }

    return {case: made(case, "fp32") for case in CASES}, {case: made(case, "bf16") for case in IN_BF16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    for case in CASES:
        save_with_transformers(case, root / f"theirs-{case}")
    run_on_ranks(imported, 1, str(root))
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[list[int]]]:
    return {case: transformers_tokens(folder / f"theirs-{case}", prompts(), NEW) for case in CASES}


def shortfall(folder: Path, tokens: list[list[int]]) -> float:
    """How far the logits of tokens after `prompts()` lie below the best ones, at most, of the largest one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
    worst = 0.0
    for prompt, after in zip(prompts(), tokens, strict=True):
        with torch.no_grad():
            logits_sV = model(torch.tensor([prompt + after])).logits[0, len(prompt) - 1 : -1]
        chosen_s = logits_sV.gather(1, torch.tensor(after)[:, None])[:, 0]
        worst = max(worst, float(((logits_sV.max(dim=1).values - chosen_s) / logits_sV.abs().max()).max()))
    return worst


@pytest.mark.parametrize("name", PLACES)
def test_greedy_tokens_are_those_of_transformers(folder: Path, expected: dict[str, Any], name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    ranks = run_on_ranks(generate_on_rank, world_size, str(folder), parallel, world_size)
    for found, in_bf16 in ranks:
        assert in_bf16 == ranks[0][1]
        for case, ways in found.items():
            for way, tokens in ways.items():
                assert tokens == expected[case], (case, way)
    for case, ways in ranks[0][1].items():
        for way, tokens in ways.items():
            assert shortfall(folder / f"theirs-{case}", tokens) < NEAR_TIE, (case, way)
        wrong = [[token + 1 for token in each] for each in tokens]
        assert shortfall(folder / f"theirs-{case}", wrong) > 10 * NEAR_TIE, "the bound tells right from wrong"
