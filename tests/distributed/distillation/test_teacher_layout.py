"""A teacher laid over the student's ranks in another way leaves what a teacher on one rank would.

Compared in fp32 with a single-rank teacher from the same checkpoint: final hidden states, inner states and the output
head, wherever the student's layout needs them. Tolerance 1e-5 by relative Frobenius norm: tensor-parallel sums run in
another order, which leaves about 1e-7; a microbatch, a part of a sequence or a stage mixed up leaves 1. The losses of
three training steps: 1e-5, as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.models import global_batch, my_batch, relative_error, start_layout, steady, tiny
from tests.distributed.packed_rows import packed
from tests.distributed.ranks import run_on_ranks

TP2, PP2, SP2 = {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "sequence": True}
VPP2 = {"pipeline": 2, "virtual_pipeline": 2}
# name -> (ranks, student's layout, teacher's layout, microbatches of the global batch)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], int]] = {
    "TP2, teacher DP2": (2, TP2, {}, 4),
    "TP2, teacher DP2 with a filler": (2, TP2, {}, 3),
    "TP2-SP, teacher DP2": (2, SP2, {}, 2),
    "DP2, teacher TP2": (2, {}, TP2, 4),
    "TP2, teacher PP2": (2, TP2, PP2, 3),
    "PP2, teacher TP2-SP": (2, PP2, SP2, 2),
    "PP2-VPP2, teacher DP2": (2, VPP2, {}, 4),
    "DP2, teacher PP2-VPP2": (2, {}, VPP2, 4),
    "TP2, teacher PP2-VPP2 with a filler": (2, TP2, VPP2, 3),
    "PP2-VPP2, teacher PP2": (2, VPP2, PP2, 2),
    "TP2-PP2, teacher PP4": (4, {"tensor": 2, "pipeline": 2}, {"pipeline": 4}, 2),
    "TP2-SP-DP2, teacher TP2-PP2": (4, SP2, {"tensor": 2, "pipeline": 2}, 4),
    "CP2, teacher CP2-TP2": (4, {"context": 2}, {"context": 2, "tensor": 2}, 4),
}
# Teacher of 5 layers, student of 4: apart at every layout with stages; two of the student's layers read one state.
PAIRS = [
    ("embedding", 0, 0),
    ("block_output", 1, 3),
    ("mlp_input", 4, 0),
    ("mlp_input", 4, 3),
    ("attention_relation", 2, 1),
]


def teacher_of(variant: str) -> Any:
    """5 layers do not divide by two or four stages; 6 heads on 2 groups."""
    return tiny("llama", num_layers=5, untie_embeddings_and_output_weights=variant != "tied")


def save_on_rank(folder: str, variant: str) -> None:
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, model_state, save_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.start import start

    architecture = teacher_of(variant)
    chunks = build_model(architecture, start_layout({}, 1), "fp32")
    initialize(chunks, architecture, seed=5)
    write_description(Path(folder), architecture, lineage={}, recipe="", save_tokenizer=None)
    save_state(Path(folder), 1, model_state(as_chunks(chunks)), start())


def teach_on_rank(
    folder: str,
    variant: str,
    parallel: dict[str, Any],
    teacher: dict[str, Any] | None,
    world_size: int,
    count: int,
    placement: str = "resident",
    packs: bool = False,
) -> dict[str, Any]:
    """What `run_ahead` left on this rank, by number of the microbatch, and the teacher's head."""
    from megatron.core import parallel_state

    from minitron_mcore.distillation.states.map import Pair
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.microbatch import on_this_context_rank
    from minitron_mcore.runtime.config import ParallelConfig

    layout = start_layout(parallel, world_size)
    architecture = teacher_of(variant)
    own = None if teacher is None else ParallelConfig(**teacher)
    model = Teacher.load(Path(folder), 1, architecture, layout, "fp32", layout=own, placement=placement)
    pairs = [Pair(*pair) for pair in PAIRS if pair[0] != "attention_relation" or layout.context == 1]
    model.want_states(pairs, student_layers=4)
    parts = packed(architecture.vocab_size, 2) if packs else global_batch(architecture.vocab_size)
    batch = my_batch(parts[:count])
    batch = [on_this_context_rank(microbatch) for microbatch in batch]
    model.run_ahead(batch)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return {
        "place": (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
        ),
        "last": last,
        "left": [part.teacher.final is not None for part in batch],
        "hidden": {k * size + rank: part.teacher.final for k, part in enumerate(batch)} if last else {},
        "states": {k * size + rank: part.teacher.states for k, part in enumerate(batch)},
        "head": model.head_weight() if last else None,
        "parameters": sum(parameter.numel() for chunk in model.chunks for parameter in chunk.parameters()),
    }


def train_on_rank(
    folder: str, parallel: dict[str, Any], teacher: dict[str, Any] | None, world_size: int, precision: str = "fp32"
) -> list[dict[str, float]]:
    """Three steps of a student of 4 layers in fp32, by both losses, from a teacher in `precision`."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.config import ParallelConfig
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, build_optimizer, build_scheduler, train_step, wrap_model

    layout = start_layout(parallel, world_size)
    student = tiny("llama")
    own = None if teacher is None else ParallelConfig(**teacher)
    model = Teacher.load(Path(folder), 1, teacher_of("untied"), layout, precision, layout=own)
    objective = Objective(
        LossSettings(vocab_size=student.vocab_size, lm_weight=0.3, kd_weight=1.0), teacher=model, window=1
    )
    train = TrainConfig(lr=1e-2, min_lr=1e-3, lr_warmup_iters=1, global_batch_size=8, micro_batch_size=2)
    models = build_model(student, layout, "fp32")
    initialize(models, student, seed=11)
    chunks = wrap_model(models)
    optimizer, timetable = build_optimizer(chunks, train, "fp32"), steady(train, 5)
    scheduler = build_scheduler(optimizer, train, timetable)
    return [
        train_step(
            Trained(chunks, optimizer, scheduler),
            objective,
            timetable.at(step).shape,
            my_batch(global_batch(student.vocab_size, step)),
        )
        for step in range(3)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    found = {}
    for variant in ("untied", "tied"):
        found[variant] = str(tmp_path_factory.mktemp(variant))
        run_on_ranks(save_on_rank, 1, found[variant], variant)
    yield found
    alone.cache_clear()


@cache
def alone(folder: str, variant: str, count: int, packs: bool = False) -> dict[str, Any]:
    result: dict[str, Any] = run_on_ranks(teach_on_rank, 1, folder, variant, {}, None, 1, count, packs=packs)[0]
    return result


def part_of(whole: torch.Tensor, axis: int, rank: int, size: int) -> torch.Tensor:
    return whole.chunk(size, dim=axis)[rank] if size > 1 else whole


def compare(
    variant: str,
    folder: str,
    case: tuple[int, dict[str, Any], dict[str, Any] | None, int],
    placement: str = "resident",
    packs: bool = False,
) -> None:
    from minitron_mcore.distillation.states.map import holder
    from minitron_mcore.layout import split_layers
    from minitron_mcore.runtime.groups import context_part

    world_size, student, teacher, count = case
    tensor, sequence = student.get("tensor", 1), student.get("sequence", False)
    context = student.get("context", 1)
    single = alone(folder, variant, count, packs)
    given = folder, variant, student, teacher, world_size, count, placement, packs
    ranks = run_on_ranks(teach_on_rank, world_size, *given)
    stages = split_layers(4, student.get("pipeline", 1), student.get("virtual_pipeline"))
    seen = set()
    for rank in ranks:
        tp, pp, cp = rank["place"]

        def expected(whole: torch.Tensor, wide: bool = True, tp: int = tp, cp: int = cp) -> torch.Tensor:
            if not wide:
                return part_of(whole, 2, tp, tensor)
            whole = context_part(whole, 0, cp, context)
            return part_of(whole, 0, tp, tensor if sequence else 1)

        layers = {layer for chunk in stages[pp] for layer in chunk}
        wanted = {
            (site, theirs)
            for site, theirs, ours in PAIRS
            if holder(site, ours, 4) in layers and not (site == "attention_relation" and context > 1)
        }
        assert all(left == rank["last"] for left in rank["left"])
        assert all(bool(states) == bool(wanted) for states in rank["states"].values())
        for number, hidden in rank["hidden"].items():
            seen.add(number)
            whole = expected(single["hidden"][number])
            assert hidden.shape == whole.shape
            assert relative_error(hidden, whole) <= 1e-5, f"microbatch {number}"
        for number, states in rank["states"].items():
            assert set(states) == wanted
            for (site, layer), state in states.items():
                whole = expected(single["states"][number][site, layer], site != "attention_relation")
                assert state.shape == whole.shape
                assert relative_error(state, whole) <= 1e-5, f"{site} of layer {layer}, microbatch {number}"
        if rank["last"]:
            assert torch.equal(rank["head"], part_of(single["head"], 0, tp, tensor))
    assert seen == set(range(count))
    if teacher is not None and variant == "untied":
        whole = single["parameters"] - single["head"].numel()
        assert all(rank["parameters"] <= whole for rank in ranks), "no output layer that nothing reads"


@pytest.mark.parametrize("name", CASES)
def test_at_any_layout(name: str, folders: dict[str, str]) -> None:
    compare("untied", folders["untied"], CASES[name])


@pytest.mark.parametrize(
    "name",
    [
        "TP2-SP, teacher DP2",
        "DP2, teacher PP2-VPP2",
        "TP2, teacher PP2-VPP2 with a filler",
        "PP2, teacher TP2-SP",
        "TP2-PP2, teacher PP4",
    ],
)
def test_packed_rows(name: str, folders: dict[str, str]) -> None:
    """Every stage of the teacher needs to know where segments lie, not the first alone. That a single rank keeps them
    apart: tests/distributed/model/test_packing.py."""
    compare("untied", folders["untied"], CASES[name], packs=True)


@pytest.mark.parametrize("name", ["PP2, teacher TP2-SP", "TP2, teacher PP2"])
def test_tied_head(name: str, folders: dict[str, str]) -> None:
    compare("tied", folders["tied"], CASES[name])


@pytest.mark.parametrize("parallel", [PP2, VPP2, SP2], ids=["PP2", "PP2-VPP2", "TP2-SP"])
def test_states_cross_stages_of_one_layout(parallel: dict[str, Any], folders: dict[str, str]) -> None:
    compare("untied", folders["untied"], (2, parallel, None, 2))


@pytest.mark.parametrize(
    ("name", "placement"),
    [("TP2, teacher DP2 with a filler", "sharded"), ("DP2, teacher PP2-VPP2", "offloaded")],
)
def test_with_layers_placed_elsewhere(name: str, placement: str, folders: dict[str, str]) -> None:
    """Its replicas gather a layer together: where one has less to run, it would leave the other waiting."""
    compare("untied", folders["untied"], CASES[name], placement)


def test_training_does_not_notice(folders: dict[str, str]) -> None:
    """Windows of one microbatch: an odd number for a teacher of two replicas, whose second then runs a filler alone."""
    single = run_on_ranks(train_on_rank, 1, folders["untied"], {}, None, 1)[0]
    for parallel, teacher in ((TP2, {}), (PP2, SP2), ({}, PP2)):
        for rank in run_on_ranks(train_on_rank, 2, folders["untied"], parallel, teacher, 2):
            for ours, theirs in zip(rank, single, strict=True):
                for name in ("lm loss", "logits distillation loss"):
                    assert theirs[name] > 0
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
                assert ours["grad-norm"] == pytest.approx(theirs["grad-norm"], rel=1e-3)


def test_a_teacher_of_another_precision(folders: dict[str, str]) -> None:
    """bf16 keeps 8 bits: losses move by less than 1%, but move. At another layout they move as they do on one rank,
    but for the order of bf16 sums: within 1e-3."""
    exact, single = (
        run_on_ranks(train_on_rank, 1, folders["untied"], {}, None, 1, precision)[0] for precision in ("fp32", "bf16")
    )
    other = run_on_ranks(train_on_rank, 2, folders["untied"], TP2, {}, 2, "bf16")[0]
    name = "logits distillation loss"
    for wide, narrow, ours in zip(exact, single, other, strict=True):
        assert narrow[name] == pytest.approx(wide[name], rel=1e-2)
        assert narrow[name] != wide[name]
        assert ours[name] == pytest.approx(narrow[name], rel=1e-3)
