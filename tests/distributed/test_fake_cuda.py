"""Forward passes on the device `cuda` of torch's fake tensors: no tensor of the host meets one of the device.

The same code as on a GPU, in shapes alone: the scoring pass with every aggregation and neuron site and the measures of
depth, the teacher's pass, the student's with both kinds of losses and the gradient that the loss works out in forward.
What runs backward, and all values, are the stand-in's part (test_device_stand_in.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy
import torch

from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.runtime.config import ParallelConfig
from tests.distributed.models import MICRO_BATCH, SEQUENCE, global_batch, my_batch, tiny
from tests.distributed.packed_rows import packed
from tests.distributed.ranks import run_on_ranks

SITES = ["embedding", "block_output", "mlp_input", "attention_relation"]
Place = tuple[ParallelConfig, int, int]  # layout, this rank, of how many
ALONE: Place = ParallelConfig(), 0, 1
SPLIT: Place = ParallelConfig(tensor=2, sequence=True), 1, 2
LAST: Place = ParallelConfig(pipeline=2), 1, 2
VIRTUAL: Place = ParallelConfig(pipeline=2, virtual_pipeline=2), 0, 2
SCORED = [
    (ALONE, "llama", "bf16"),
    (SPLIT, "nemotron", "fp32"),
    (SPLIT, "qwen3", "bf16"),
    (LAST, "llama", "fp32"),
    (VIRTUAL, "llama", "bf16"),
]
# name -> (where, precision, the loss between logits, the losses between states, what else)
DISTILLED: dict[str, tuple[Place, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "every site, windows": (ALONE, "bf16", {"temperature": 2.0, "lm_weight": 0.3}, {"sites": SITES}, {"window": 1}),
    "packed rows": (ALONE, "fp32", {}, {"sites": SITES, "weighting": "fixed"}, {"packed": True}),
    "few outcomes": (SPLIT, "bf16", {"divergence": "reverse_kl", "top_k": 5}, {"sites": SITES}, {}),
    "a mixture": (SPLIT, "fp32", {"divergence": "jensen_shannon"}, {"sites": SITES[:3], "loss": "cosine"}, {}),
    "logits themselves, offloaded": (ALONE, "bf16", {"divergence": "mse"}, {}, {"placement": "offloaded"}),
    "their direction, recomputed": (ALONE, "fp32", {"divergence": "cosine", "recompute": True}, {}, {}),
    "cached outcomes": (ALONE, "bf16", {}, {}, {"cached": "top_k"}),
    "cached draws": (SPLIT, "bf16", {}, {}, {"cached": "sampled"}),
    "a teacher in a layout of its own": (SPLIT, "bf16", {}, {}, {"layout": ParallelConfig(pipeline=2)}),
    "the next token": (ALONE, "bf16", {"kd_weight": 0.0}, {}, {"alone": True}),
}


@contextmanager
def on_fake_cuda(place: Place, lengths: tuple[int, ...] = ()) -> Iterator[ParallelConfig]:
    """A rank on a GPU that is not there; `lengths` of packed segments are what is read off their boundaries."""
    from minitron_mcore.importance import score
    from minitron_mcore.runtime.parallel import seed_everything
    from tests.distributed.fake_world import fake_rank
    from tests.fake_cuda import fake_cuda

    layout, rank, world_size = place
    with fake_rank(layout, world_size, rank):
        seed_everything(7)
        try:
            with fake_cuda(lengths):
                yield layout
        finally:
            score._row_numbers.cache_clear()  # they belong to this block


def built(architecture: Any, layout: ParallelConfig, precision: str, **how: Any) -> Any:
    """A model that lies on the device, buffers and all."""
    from minitron_mcore.model.gpt import build_model

    chunks = build_model(architecture, layout, precision, **how)
    named = [tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers())]
    assert {tensor.device.type for tensor in named} == {"cuda"}, "all of the model on the device"
    return chunks


def model_of(family: str) -> Any:
    return tiny(family, num_layers=2)


def batch_of(vocab_size: int) -> list[Any]:
    """Two microbatches; the second sample of each is a filler."""
    parts = my_batch(global_batch(vocab_size, microbatches=2))
    valid, samples = torch.tensor([1, 0]), torch.arange(MICRO_BATCH)
    return [replace(part, valid=valid, samples=samples).to(torch.cuda.current_device()) for part in parts]


def scored(place: Place, family: str, precision: str) -> dict[str, Any]:
    """The shapes of all scores."""
    from minitron_mcore.importance.config import AGGREGATIONS, NEURON_SITES, TEXT_METRICS, ImportanceConfig
    from minitron_mcore.importance.depth import measure_depth
    from minitron_mcore.importance.score import score_model

    pairs = ["/".join(pair) for pair in itertools.product(AGGREGATIONS, AGGREGATIONS)]
    menu = ImportanceConfig(aggregations=pairs, neuron_sites=list(NEURON_SITES))
    architecture = tiny(family) if place is VIRTUAL else model_of(family)
    with on_fake_cuda(place) as layout:
        chunks = built(architecture, layout, precision, trainable=False)
        batch = batch_of(architecture.vocab_size)
        scores = score_model(chunks, batch, architecture, menu)
        depth = measure_depth(chunks, batch, architecture, TEXT_METRICS) if place is ALONE else None
    found = dict(scores.arrays()) | (depth.damage if depth else {})
    return {name: values.shape for name, values in found.items()}


def cached_teacher(method: str, vocab_size: int) -> Any:
    """A teacher whose targets are here already, three ids a token: what is read of a sample's number has no value."""
    from minitron_mcore.distillation.cache.file import Targets
    from minitron_mcore.distillation.cache.teacher import CachedTeacher

    ids = numpy.tile(numpy.arange(3), SEQUENCE)
    what: dict[str, Any] = {"values": numpy.full(len(ids), -2.0, numpy.float32), "tails": numpy.full(SEQUENCE, -1.0)}
    if method == "sampled":
        what = {"counts": numpy.ones_like(ids)}
    targets: Future[Targets] = Future()
    targets.set_result(Targets(numpy.full(SEQUENCE, 3), ids, **what))

    class Held(CachedTeacher):
        def __init__(self) -> None:
            settings = {"method": method, "top_k": 3, "vocab_size": vocab_size, "dtype": "fp16"}
            self.reader: Any = type("Reader", (), {"settings": settings})
            self.is_drawn, self.is_whole, self.exponent = method == "sampled", False, 1.0

        def _load(self, samples: list[int]) -> Iterator[Future[Targets]]:
            return itertools.repeat(targets)

        def _check_tokens(self, samples: list[int], tokens_bS: Any) -> None:
            tokens_bS.cpu().numpy()

    return Held()


def elsewhere(architecture: Any, layout: ParallelConfig, own: ParallelConfig, precision: str) -> Any:
    """A teacher in a layout of its own: token ids travel to it, and states back."""
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.distillation.teacher.routes import Grid
    from minitron_mcore.runtime.parallel import teacher_groups

    world_size = torch.distributed.get_world_size()
    groups = teacher_groups(own, world_size)
    chunks = built(architecture, own, precision, trainable=False, groups=groups)
    head = torch.empty(architecture.padded_vocab_size // layout.tensor, architecture.hidden_size)
    head = head.to(torch.cuda.current_device(), chunks[0].config.params_dtype)
    return Teacher(chunks, architecture, student=Grid.of(layout, world_size), groups=groups, head=head)


def teacher_of(
    student: Any, models: Any, layout: ParallelConfig, precision: str, states: dict[str, Any], options: dict[str, Any]
) -> tuple[Any, Any]:
    """(the teacher, the losses between its states and the student's), either of them perhaps None."""
    from minitron_mcore.distillation.config import HiddenStatesConfig
    from minitron_mcore.distillation.states.loss import StateLosses
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.distillation.teacher.placement import place
    from minitron_mcore.model.initialize import named_parameters

    if "alone" in options:
        return None, None
    if "cached" in options:
        return cached_teacher(options["cached"], student.vocab_size), None
    if "layout" in options:
        return elsewhere(student, layout, options["layout"], precision), None
    wide, placement = student.replace(hidden_size=64, ffn_hidden_size=128), options.get("placement", "resident")
    chunks = built(wide, layout, precision, trainable=False, bare_layers=placement != "resident")
    placed = place(chunks, placement, None)
    for chunk in chunks:
        for _ in placed.rows(chunk) if placed is not None else named_parameters(chunk):
            pass  # as loading does, which fills them
    teacher = Teacher(chunks, wide, placed=placed)
    if not states:
        return teacher, None
    losses = StateLosses(models, HiddenStatesConfig(**states), student, wide, layout, seed=3)
    teacher.want_states(losses.pairs, student.num_layers)
    return teacher, losses


def distilled(
    place: Place, precision: str, loss: dict[str, Any], states: dict[str, Any], options: dict[str, Any]
) -> list[str]:
    """The names of what is reported of a batch, whose gradients were wanted."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective

    class Watched(Objective):
        def loss(self, *given: Any) -> Any:
            found = super().loss(*given)
            assert found[0].requires_grad, "the loss is there to be trained on"
            return found

    student = model_of("llama")
    # Laid end to end on the host, where the readers are.
    rows = [Microbatch.of(part) for part in packed(student.vocab_size, 1)[:1]] if "packed" in options else []
    with on_fake_cuda(place, rows[0].packed.lengths if rows else ()) as layout:  # type: ignore[union-attr]
        models = built(student, layout, precision)
        for parameter in models[0].parameters():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        teacher, losses = teacher_of(student, models, layout, precision, states, options)
        settings = LossSettings(student.vocab_size, chunk_tokens=24, **{"kd_weight": 1.0, **loss})
        objective = Watched(settings, teacher, losses, window=options.get("window", 0))
        batch = [row.to(torch.cuda.current_device()) for row in rows] or batch_of(student.vocab_size)
        # Gradients are recorded, as in training, but no backward pass follows.
        return list(objective.run(models, batch, forward_only=True))


def all_on_rank() -> dict[str, Any]:
    found: dict[str, Any] = {str(case): scored(*case) for case in SCORED}
    return found | {name: distilled(*case) for name, case in DISTILLED.items()}


def test_forward_passes_keep_to_the_device() -> None:
    (found,) = run_on_ranks(all_on_rank, 1, device="cpu")
    for place, family, precision in SCORED:
        a, shapes = model_of(family), found[str((place, family, precision))]
        assert shapes["hidden"] == (a.hidden_size,) and shapes["groups"][1] == a.num_query_groups
        assert len([name for name in shapes if name.startswith("variants")]) == 17 * 4
    assert [name for name in found[str(SCORED[0])] if "@" in name] == [
        "lm_loss@1",
        "logit_mse@1",
        "normalized_logit_mse@1",
    ]
    for name, (_, _, _, states, options) in DISTILLED.items():
        metrics = {"lm loss", *(f"{site.replace('_', ' ')} loss" for site in states.get("sites", ()))}
        metrics |= set() if "alone" in options else {"logits distillation loss"}
        assert metrics <= {*found[name]}, name


def host_labels(part: Any, device: Any) -> Any:
    return replace(moved(part, device), labels=part.labels)


moved = Microbatch.to
# A change to the code, and the pass that meets it: each leaves one tensor on the host.
PLANTED: dict[str, tuple[str, Callable[..., Any], Callable[[], Any]]] = {
    "a hook's weights": (
        "minitron_mcore.importance.hooks.unchanged",
        lambda x: x * torch.ones(x.shape[-1]),
        lambda: scored(*SCORED[0]),
    ),
    "the rotary embedding": (
        "megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding.forward",
        lambda rope, length, *others, **how: torch.ones(length, 1, 1, 2 * len(rope.inv_freq)),
        lambda: scored(*SCORED[0]),
    ),
    "a batch's labels": (
        "minitron_mcore.model.microbatch.Microbatch.to",
        host_labels,
        lambda: distilled(*DISTILLED["the next token"]),
    ),
}
SMALL: dict[str, Callable[[], Any]] = {
    "a product": lambda: here(2, 2) @ torch.ones(2, 2),
    "a lookup": lambda: torch.nn.functional.embedding(torch.zeros(3, dtype=torch.int64), here(4, 2)),
    "a sum into the host's memory": lambda: torch.zeros(3).add_(here(3)),
    "a collective": lambda: torch.distributed.all_reduce(torch.ones(2)),
    "numpy": lambda: here(2).numpy(),
}


def here(*size: int) -> torch.Tensor:
    return torch.ones(*size, device=torch.cuda.current_device())


def what_it_raises(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "nothing"


def mistakes_on_rank() -> dict[str, str]:
    found = {}
    for name, (target, change, run) in PLANTED.items():
        with patch(target, change):
            found[name] = what_it_raises(run)
    with on_fake_cuda(ALONE):
        found |= {name: what_it_raises(call) for name, call in SMALL.items()}
        found["nothing wrong"] = what_it_raises(lambda: here(2) + torch.ones(2).to(here(1).device) + torch.ones(()))
    return found


def test_a_tensor_of_the_host_is_refused_where_it_meets_one_of_the_device() -> None:
    (raised,) = run_on_ranks(mistakes_on_rank, 1, device="cpu")
    mixed = {*PLANTED, *SMALL} - {"a collective", "numpy"}
    assert {name: raised.pop(name) for name in mixed} == dict.fromkeys(mixed, "FakeTensorDeviceMismatchError")
    assert raised == {"a collective": "HostMemoryError", "numpy": "HostMemoryError", "nothing wrong": "nothing"}
