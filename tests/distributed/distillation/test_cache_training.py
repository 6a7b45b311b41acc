"""Distilling from a cache that holds all logits is distilling from the teacher: losses and gradients, at every layout.

Tolerance 1e-5, of losses and of gradients by relative Frobenius norm: the cache holds log-probabilities in fp32, which
round at 1e-6 where a probability is small.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.distillation.test_cache import LENGTH, SAMPLES, VOCAB, WHOLE, cache
from tests.distributed.models import relative_error, start_layout, tiny
from tests.distributed.ranks import run_on_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {  # world size, layout, micro-batch size
    "1": (1, {}, 2),
    "TP2-SP": (2, {"tensor": 2, "sequence": True}, 1),
    "PP2": (2, {"pipeline": 2}, 2),
    "PP2-VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, 1),
    "DP2": (2, {}, 2),
    "CP2": (2, {"context": 2}, 2),
}
CACHES = {"whole": WHOLE, "sampled": [], "top_k": ["cache.method=top_k", "cache.top_k=20", "cache.dtype=fp32"]}


def losses_on_rank(
    root: Path, parallel: dict[str, Any], world_size: int, micro_batch: int, divergence: str = ""
) -> dict[str, Any]:
    """Means and gradients of this rank, of the same student under the teacher and under each cache.

    divergence: at temperature 2, under the teacher and all its logits alone; "": forward KL at temperature 1, all.
    """
    from minitron_mcore.data.config import DataConfig
    from minitron_mcore.data.dataset import build_datasets
    from minitron_mcore.data.described import split_part
    from minitron_mcore.data.tokenizer import load_tokenizer
    from minitron_mcore.distillation.cache.teacher import CachedTeacher
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize, named_parameters
    from minitron_mcore.training.budget import Shape
    from minitron_mcore.training.job import batch_reader
    from minitron_mcore.training.step import wrap_model

    layout = start_layout(parallel, world_size)
    data = DataConfig(train=str(root / "json_text_document"), split="1", sequence_length=LENGTH)
    tokenizer = load_tokenizer(str(root / "tokenizer.model"))
    (dataset,) = build_datasets(data, tokenizer, [split_part(data, "train", SAMPLES)], seed=5)
    reader = batch_reader(dataset, Shape(0, LENGTH, 4, micro_batch))
    architecture = tiny("llama", hidden_size=32, ffn_hidden_size=64)
    models = build_model(architecture, layout, "fp32")
    initialize(models, architecture, seed=11)
    chunks = wrap_model(models)
    resident = Teacher.load(root / "teacher", 3, tiny("llama"), layout, "fp32")
    temperature = 2.0 if divergence else 1.0
    found: dict[str, Any] = {}
    for name in ("resident", *CACHES):
        teacher = resident if name == "resident" else CachedTeacher(root / name, temperature)
        if divergence and name in ("sampled", "top_k"):
            continue
        objective = Objective(
            LossSettings(
                vocab_size=VOCAB,
                lm_weight=0.3,
                kd_weight=1.0,
                divergence=divergence or "forward_kl",
                temperature=temperature,
                chunk_tokens=24,
            ),
            teacher=teacher,
        )
        for chunk in chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        batch = next(reader(4, 1))
        means = objective.run(chunks, batch)
        gradients = {
            (key, layer): tensor.main_grad.clone()  # type: ignore[attr-defined]
            for model in models
            for key, layer, tensor in named_parameters(model)
        }
        validation = objective.held_out().run(chunks, next(reader(4, 1)), forward_only=True)
        found[name] = {"means": means, "gradients": gradients, "validation": validation}
    return found


@pytest.fixture(scope="module")
def caches(corpus_with_teacher: Callable[[str], Path]) -> Path:
    root = corpus_with_teacher("cache_training")
    for name, how in CACHES.items():
        refused = run_on_ranks(cache, 1, root, [*how, f"cache.folder=@/{name}"])[0][1]
        assert not refused
    return root


@pytest.fixture(scope="module")
def single(caches: Path) -> dict[str, Any]:
    return run_on_ranks(losses_on_rank, 1, caches, {}, 1, 2)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_logits_are_the_teacher(caches: Path, single: dict[str, Any], name: str) -> None:
    world_size, parallel, micro_batch = LAYOUTS[name]
    for rank in run_on_ranks(losses_on_rank, world_size, caches, parallel, world_size, micro_batch):
        resident, whole = rank["resident"], rank["whole"]
        for loss in ("lm loss", "logits distillation loss"):
            assert abs(whole["means"][loss] - resident["means"][loss]) < 1e-5
        for key, gradient in resident["gradients"].items():
            assert relative_error(whole["gradients"][key], gradient) < 1e-5, key
        # The other caches: the same loss at every layout; what they put in the gradient is other than the whole does.
        for kind in ("sampled", "top_k"):
            ours, theirs = rank[kind]["means"], single[kind]["means"]
            assert abs(ours["logits distillation loss"] - theirs["logits distillation loss"]) < 1e-5
            assert ("top-1 agreement" in ours) == (kind == "top_k")
            assert ours["lm loss"] == pytest.approx(resident["means"]["lm loss"], abs=1e-6)
        # Validation samples are not in a cache: next-token loss alone.
        assert whole["validation"]["lm loss"] == pytest.approx(resident["means"]["lm loss"], abs=1e-6)
        assert "logits distillation loss" not in whole["validation"]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_another_temperature_of_all_logits(caches: Path, divergence: str) -> None:
    found = run_on_ranks(losses_on_rank, 1, caches, {}, 1, 2, divergence)[0]
    resident, whole = found["resident"], found["whole"]
    assert abs(whole["means"]["logits distillation loss"] - resident["means"]["logits distillation loss"]) < 1e-5
    for key, gradient in resident["gradients"].items():
        assert relative_error(whole["gradients"][key], gradient) < 1e-5, key
