"""The engine against `transformers.generate`, in fp32, at several layouts.

Greedy tokens must be equal: the margins of these random models are far above rounding (their logits differ by 1e-6 of
the largest one).
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


def generate_on_rank(folder: str, parallel: dict[str, Any], world_size: int) -> dict[str, Any]:
    """By case: greedy tokens in one batch with the cache, in batches of two without it."""
    from minitron_mcore.checkpoint.folder import read_architecture
    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.inference.engine import Engine, Sampling
    from minitron_mcore.model.gpt import build_model

    layout = start_layout(parallel, world_size)
    found = {}
    for case in CASES:
        checkpoint = Path(folder, f"imported-{case}")
        architecture = read_architecture(checkpoint)
        chunks = build_model(architecture, layout, "fp32", trainable=False)
        load_weights(checkpoint, 0, as_chunks(chunks), architecture)
        ways = {
            "cached": Engine(chunks, architecture),
            "whole": Engine(chunks, architecture, cached=False, max_batch=2),
        }
        found[case] = {
            name: [list(one.tokens) for one in engine.generate(prompts(), Sampling(NEW))]
            for name, engine in ways.items()
        }
    return found


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


@pytest.mark.parametrize("name", PLACES)
def test_greedy_tokens_are_those_of_transformers(folder: Path, expected: dict[str, Any], name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    for rank in run_on_ranks(generate_on_rank, world_size, str(folder), parallel, world_size):
        for case, ways in rank.items():
            for way, tokens in ways.items():
                assert tokens == expected[case], (case, way)
