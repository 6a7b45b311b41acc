"""The buckets that the step-time model takes are those that Megatron's DDP makes: as many, of the same layers and the
same size in all; each to one matrix, since the model does not know in what order a layer has its parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from minitron_mcore.estimate.model import chunk_layers
from minitron_mcore.estimate.overlap import Bucket, buckets
from minitron_mcore.runtime.config import ParallelConfig
from tests.distributed.models import LAYOUTS, start_layout, tiny
from tests.distributed.ranks import run_on_ranks

BUCKET = 20_000  # parameters: less than a layer


def buckets_on_rank(parallel: dict[str, Any], world_size: int, tied: bool) -> tuple[list[Bucket], list[int]]:
    """(a rank's buckets, and which of them set out when the weights are gathered)."""
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.runtime.overlap import Overlap, start_gathering
    from minitron_mcore.training.step import wrap_model

    layout = start_layout(parallel, world_size)
    models = build_model(tiny("llama", untie_embeddings_and_output_weights=not tied), layout, "fp32")
    chunks: list[Any] = wrap_model(models, Overlap(grad_reduce=True, param_gather=True, bucket_size=BUCKET))
    before, found = sum(len(model.decoder.layers) for model in models), list[Bucket]()
    for chunk, model in reversed([*zip(chunks, models, strict=True)]):
        after, before = before, before - len(model.decoder.layers)
        places = {id(p): before + place for place, layer in enumerate(model.decoder.layers) for p in layer.parameters()}
        start = 0 if model.pre_process else after
        for group in chunk.bucket_groups:
            held = [p for bucket in group.buckets for p in bucket.params]
            found.append(Bucket(sum(p.numel() for p in held), min(places.get(id(p), after) for p in held)))
            if model.pre_process and any(p is model.embedding.word_embeddings.weight for p in held):
                found[-1] = found[-1]._replace(place=start)
    groups, order = [group for chunk in reversed(chunks) for group in chunk.bucket_groups], list[int]()
    for number, group in enumerate(groups):
        group.start_param_sync = partial(order.append, number)
    start_gathering(chunks)
    return found, order


@pytest.mark.parametrize(("layout", "tied"), [("TP2", False), ("PP2", True), ("PP2-VPP2", True)])
def test_buckets_are_megatrons(layout: str, tied: bool) -> None:
    world_size, parallel = LAYOUTS[layout]
    architecture, config = tiny("llama", untie_embeddings_and_output_weights=not tied), ParallelConfig(**parallel)
    for rank, (found, order) in enumerate(run_on_ranks(buckets_on_rank, world_size, parallel, world_size, tied)):
        stage = rank // config.tensor
        ends = stage == 0, stage == config.pipeline - 1
        expected = buckets(architecture, config.tensor, chunk_layers(architecture, config)[stage], ends, BUCKET)
        assert [b.place for b in found] == [b.place for b in expected], rank
        assert order == [*reversed(range(len(found)))], "weights: in the order of forward"
        sizes = [(one.parameters, other.parameters) for one, other in zip(found, expected, strict=True)]
        assert sum(one - other for one, other in sizes) == 0 and len(sizes) > 1, rank
        assert all(abs(one - other) <= 2 * 96 * 48 for one, other in sizes), sizes
