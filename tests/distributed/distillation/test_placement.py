"""A teacher whose layers are sharded or offloaded gives the resident teacher's states, bit for bit, and holds less.

The same weights in the same kernels: nothing may differ at all. Memory is counted over all live tensors of a rank, on
CPU, where host and device are one: so offloaded layers count there as held.
"""

from __future__ import annotations

import gc
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.models import global_batch, my_batch, start_layout, tiny
from tests.distributed.ranks import run_on_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "DP2": (2, {}),
    "CP2": (2, {"context": 2}),
    "TP2-DP2": (4, {"tensor": 2}),
    "PP2-VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "PP2-VPP2-DP2": (4, {"pipeline": 2, "virtual_pipeline": 2}),
}
SLOW = ("DP2", "PP2-VPP2")  # PP2-VPP2-DP2 is both
PLACEMENTS = ("sharded", "offloaded")


def teacher_of(variant: str) -> Any:
    """Seven layers: unlike chunks at two stages. `nemotron` has biases in its norms and no gate."""
    family, _, tied = variant.partition("-")
    return tiny(family, num_layers=7, untie_embeddings_and_output_weights=not tied)


def save_on_rank(folder: str, architecture: Any) -> None:
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, model_state, save_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.start import start

    chunks = build_model(architecture, start_layout({}, 1), "fp32")
    initialize(chunks, architecture, seed=5)
    write_description(Path(folder), architecture, lineage={}, recipe="", save_tokenizer=None)
    save_state(Path(folder), 1, model_state(as_chunks(chunks)), start())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def saved(variant: str) -> str:
        folder = str(tmp_path_factory.mktemp(variant) / "teacher")
        run_on_ranks(save_on_rank, 1, folder, teacher_of(variant))
        return folder

    return saved


def states_on_rank(
    folder: str,
    variant: str,
    parallel: dict[str, Any],
    world_size: int,
    precision: str,
    own: dict[str, Any] | None = None,
) -> dict[str, list[list[torch.Tensor]]]:
    """Placement -> the final hidden states, then the inner ones, of windows of 4, 2 and again 4 microbatches; and the
    final ones of a pass that was not foretold."""
    from minitron_mcore.checkpoint.store import as_chunks
    from minitron_mcore.distillation.states.map import Pair
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.microbatch import on_this_context_rank
    from minitron_mcore.model.schedule import final_hidden_states
    from minitron_mcore.runtime.config import ParallelConfig

    layout = start_layout(parallel, world_size)
    of_teacher = None if own is None else ParallelConfig(**own)
    architecture = teacher_of(variant)
    batch = my_batch(global_batch(architecture.vocab_size, microbatches=8))
    batch = [on_this_context_rank(microbatch) for microbatch in batch]
    found: dict[str, list[list[torch.Tensor]]] = {}
    for placement in ("resident", *PLACEMENTS):
        teacher = Teacher.load(Path(folder), 1, architecture, layout, precision, layout=of_teacher, placement=placement)
        assert (teacher.placed is None) == (placement == "resident")
        assert not any(parameter.requires_grad for chunk in teacher.chunks for parameter in chunk.parameters())
        found[placement] = []
        teacher.want_states([Pair("embedding", 0, 0), Pair("block_output", 3, 1), Pair("mlp_input", 6, 3)], 4)
        for window in (batch[:4], batch[:2], batch[:4]):
            teacher.run_ahead(window)
            finals = [part.teacher.final for part in window]
            found[placement].append([final for final in finals if final is not None])
            found[placement].append([state for part in window for state in part.teacher.states.values()])
        found[placement].append(final_hidden_states(as_chunks(teacher.chunks), batch[:2], groups=teacher.groups))
        if teacher.placed is not None:
            teacher.placed.release()
            empty = [parameter.numel() for flat in teacher.placed.layers for parameter, _ in flat.places]
            assert not any(empty), "no layer lies whole on the device after a pass"
    return found


@pytest.mark.parametrize(
    ("variant", "layout", "precision"),
    [
        *(("llama", layout, "fp32") for layout in LAYOUTS if layout not in SLOW),
        ("nemotron-tied", "PP2-VPP2", "bf16"),
        *(pytest.param("llama", layout, "fp32", marks=pytest.mark.slow) for layout in SLOW),
    ],
)
def test_states_are_those_of_a_resident_teacher(variant: str, layout: str, precision: str, checkpoint: Any) -> None:
    world_size, parallel = LAYOUTS[layout]
    ranks = run_on_ranks(states_on_rank, world_size, checkpoint(variant), variant, parallel, world_size, precision)
    compare(ranks)


@pytest.mark.parametrize(("parallel", "own"), [({"tensor": 2}, {}), ({}, LAYOUTS["PP2-VPP2"][1])])
def test_a_teacher_in_its_own_layout_too(parallel: dict[str, Any], own: dict[str, Any], checkpoint: Any) -> None:
    """Sharded over the data-parallel ranks of its own layout: two beside a student at TP2, one at PP2-VPP2."""
    compare(run_on_ranks(states_on_rank, 2, checkpoint("llama"), "llama", parallel, 2, "fp32", own))


def compare(ranks: list[dict[str, list[list[torch.Tensor]]]]) -> None:
    last = [rank for rank in ranks if rank["resident"][0]]
    assert last and [len(window) for window in last[0]["resident"]][:6:2] == [4, 2, 4]
    assert any(rank["resident"][1] for rank in ranks)
    for rank in ranks:
        for placement in PLACEMENTS:
            for ours, theirs in zip(rank[placement], rank["resident"], strict=True):
                for mine, other in zip(ours, theirs, strict=True):
                    assert float(other.float().norm()) > 0
                    torch.testing.assert_close(mine, other, rtol=0, atol=0)


def fetches_on_rank(folder: str, parallel: dict[str, Any], world_size: int, count: int) -> list[tuple[int, bool]]:
    """Every fetch of a pass: (layer, whether it was started before its layer was asked for)."""
    from minitron_mcore.distillation.teacher.ahead import Teacher

    layout = start_layout(parallel, world_size)
    architecture = teacher_of("llama")
    teacher = Teacher.load(Path(folder), 1, architecture, layout, "fp32", placement="offloaded")
    placed = teacher.placed
    assert placed is not None
    asked: list[int] = []
    fetched: list[tuple[int, bool]] = []
    fetch = placed.source.fetch

    def watched(index: int, target: torch.Tensor) -> Any:
        fetched.append((index, not asked or asked[-1] != index))
        return fetch(index, target)

    placed.source.fetch = watched  # type: ignore[method-assign]
    for index, flat in enumerate(placed.layers):
        flat.layer.register_forward_pre_hook(lambda *_, index=index: asked.append(index), prepend=True)
    teacher.run_ahead(my_batch(global_batch(architecture.vocab_size, microbatches=count)))
    return fetched


def test_every_layer_but_the_first_is_fetched_ahead(checkpoint: Any) -> None:
    """Once a layer and microbatch; interleaved, the two chunks' turns are foretold too."""
    (fetched,) = run_on_ranks(fetches_on_rank, 1, checkpoint("llama"), {}, 1, 3)
    assert [index for index, _ in fetched] == 3 * list(range(7))
    assert [ahead for _, ahead in fetched] == [False] + 20 * [True]
    ranks = run_on_ranks(fetches_on_rank, 2, checkpoint("llama"), LAYOUTS["PP2-VPP2"][1], 2, 4)
    for fetched in ranks:
        assert [ahead for _, ahead in fetched] == [False] + (len(fetched) - 1) * [True]


BIG = {"num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 1024, "num_attention_heads": 8, "kv_channels": 32}


def big_teacher() -> Any:
    return tiny("llama", **BIG)


def live_bytes() -> int:
    """Memory of all tensors of this process, every storage once."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory_on_rank(folder: str, placement: str) -> dict[str, int]:
    """Bytes beyond those before it: at most while it is built and while it is filled, between passes, in a pass."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from minitron_mcore.checkpoint.reader import TensorReader
    from minitron_mcore.distillation.teacher.ahead import Teacher

    layout = start_layout({}, 2)
    architecture = big_teacher()
    gc.collect()
    before = live_bytes()
    seen: dict[str, list[int]] = {"building": [], "filling": [], "running": []}

    def looked(name: str, work: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = work(*args, **kwargs)
            if name == "building" or args[2].key.endswith("linear_fc2.weight"):  # a layer's last
                seen[name].append(live_bytes() - before)
            return result

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerLayer, "__init__", looked("building", TransformerLayer.__init__))
        patch.setattr(TensorReader, "fill_part", looked("filling", TensorReader.fill_part))
        teacher = Teacher.load(Path(folder), 1, architecture, layout, "fp32", placement=placement)
    between = live_bytes() - before

    def look(*_: Any) -> None:
        seen["running"].append(live_bytes() - before)

    teacher.chunks[0].decoder.layers[4].register_forward_hook(look)
    batch = my_batch(global_batch(architecture.vocab_size, microbatches=2))
    teacher.run_ahead(batch)
    return {"between": between, **{name: max(values) for name, values in seen.items()}}


def test_sharded_layers_take_a_half_and_two_whole_ones(tmp_path: Path) -> None:
    """At DP2. Activations of 2 x 16 tokens, and what reading needs, take less than half a layer."""
    folder = str(tmp_path / "teacher")
    run_on_ranks(save_on_rank, 1, folder, big_teacher())
    a = big_teacher()
    layer = 4 * (a.hidden_size * (8 + 2 * 2) * 32 + 8 * 32 * a.hidden_size + 3 * a.hidden_size * a.ffn_hidden_size)
    beside = 4 * 2 * a.padded_vocab_size * a.hidden_size
    slack = 0.5 * layer
    sharded = run_on_ranks(memory_on_rank, 2, folder, "sharded")
    resident = run_on_ranks(memory_on_rank, 2, folder, "resident")
    for rank in sharded:
        assert 4 * layer <= rank["between"] - beside <= 4 * layer + slack
        assert 6 * layer <= rank["running"] - beside <= 6 * layer + slack
    for rank in resident:
        assert 8 * layer <= rank["between"] - beside <= 8 * layer + slack
    # The model is built one layer at a time, and filled one at a time, beside the parts that are kept.
    for rank in sharded:
        assert rank["building"] - beside <= layer + slack
        assert 4 * layer <= rank["filling"] - beside <= 5 * layer + slack
    for rank in resident:
        assert rank["building"] - beside >= 7 * layer


def train_on_rank(folder: str, placement: str) -> list[dict[str, float]]:
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.training.budget import plan_timetable
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, build_optimizer, build_scheduler, train_step, wrap_model

    layout = start_layout({}, 2)
    student, train = tiny("llama"), TrainConfig(lr=1e-2, tokens=3 * 8 * 16)
    teacher = Teacher.load(Path(folder), 1, teacher_of("llama"), layout, "fp32", placement=placement)
    objective = Objective(
        LossSettings(vocab_size=student.vocab_size, kd_weight=1.0, lm_weight=0.3), teacher=teacher, window=1
    )
    models = build_model(student, layout, "fp32")
    initialize(models, student, seed=11)
    chunks = wrap_model(models)
    optimizer, timetable = build_optimizer(chunks, train, "fp32"), plan_timetable(train, 16, "train")
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


def test_training_does_not_see_where_the_teacher_lies(checkpoint: Any) -> None:
    """DP2, windows of one microbatch: every number of every step is the same."""
    rows = {
        placement: run_on_ranks(train_on_rank, 2, checkpoint("llama"), placement)
        for placement in ("resident", *PLACEMENTS)
    }
    assert rows["resident"][0][0]["logits distillation loss"] > 0
    for placement in PLACEMENTS:
        assert rows[placement] == rows["resident"]
