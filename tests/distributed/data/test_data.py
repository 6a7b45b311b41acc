"""Data on two ranks: the stages' files, the same datasets on both, and refusals that reach both."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.dataset import build_datasets
from minitron_mcore.data.described import split_part
from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.jobs import preprocess as preprocess_job
from minitron_mcore.jobs import tokenizer as tokenizer_job
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.world import World
from minitron_mcore.stages import preprocess as preprocess_stage
from minitron_mcore.stages import tokenizer as tokenizer_stage
from tests.distributed.ranks import run_on_ranks
from tests.unit.text_data import JSON_PACKAGE, small_tokenizer


def _stages(folder: str) -> tuple[str, list[str]]:
    rank = torch.distributed.get_rank()
    runtime = Runtime(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
    recipe = Recipe(input=JSON_PACKAGE, output_prefix=f"{folder}/json")
    recipe.tokenizer = dataclasses.replace(
        recipe.tokenizer, model=f"{folder}/tokenizer.model", extensions=[".py"], vocab_size=400
    )
    recipe.preprocess = dataclasses.replace(recipe.preprocess, extensions=[".py"], workers=2, valid_fraction=0.3)
    world = World(rank=rank, size=2, local_rank=rank)
    tokenizing = tokenizer_job.resolve(recipe, world)
    runtime.barrier()  # a rank that resolves late would find what the first has written
    model = tokenizer_stage.run(tokenizing, runtime)
    preprocessing = preprocess_job.resolve(recipe, world)
    runtime.barrier()
    return model, preprocess_stage.run(preprocessing, runtime)


def _rows(config: DataConfig, model: str) -> Any:
    """Samples of (train, valid) on this rank, or the refusal."""
    parts = [split_part(config, "train", 300), split_part(config, "valid", 5)]
    try:
        train, valid = build_datasets(config, load_tokenizer(model), parts, seed=1)
    except InputError as error:
        return str(error)
    assert train is not None and valid is not None
    return [train[i]["tokens"].tolist() for i in range(300)], [valid[i]["tokens"].tolist() for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def config(folder, corpus):
    first, second = (str(corpus / f"{name}_text_document") for name in ("email", "json"))
    return DataConfig(train=[2, first, 1, second], valid=second, sequence_length=32, cache_path=str(folder / "cache"))


def test_stages_return_the_same_on_every_rank(folder):
    first, second = run_on_ranks(_stages, 2, str(folder))
    assert first == second
    model, prefixes = first
    assert prefixes == [f"{folder}/json_text_document", f"{folder}/json_valid_text_document"]
    assert load_tokenizer(model).vocab_size == 400


def test_every_rank_reads_the_same_samples(corpus, config):
    model = str(corpus / "tokenizer.model")
    first, second = run_on_ranks(_rows, 2, config, model)
    assert first == second and len(first[0]) == 300
    assert not torch.distributed.is_initialized()
    assert _rows(config, model) == first, "a process without process groups reads them too"
    assert not torch.distributed.is_initialized()


def test_a_refusal_reaches_every_rank(folder, config):
    other = small_tokenizer(folder / "other.model", vocab_size=500)
    first, second = run_on_ranks(_rows, 2, config, other.path)
    assert first == second and "made with another tokenizer" in first
    gone = dataclasses.replace(config, train=str(folder / "gone"))
    first, second = run_on_ranks(_rows, 2, gone, other.path)
    assert first == second and "lacks its .bin or its .idx" in first
