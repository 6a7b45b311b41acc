"""runtime/repairs.py: megatron-core is wrong without each repair, and right with it.

Every test shows both, but for what newer versions alone do wrong. One that fails because the unrepaired part is right
tells that the repair can go.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
import torch
from packaging.version import Version

from tests.distributed.models import LAYOUTS, global_batch, my_batch, start_layout, steady, tiny
from tests.distributed.ranks import run_on_ranks


def helpers_on_rank() -> tuple[list[str], list[str]]:
    """Processes that the queue for the results of a save starts: with the repair, and without."""
    import multiprocessing

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from minitron_mcore.runtime.repairs import save_without_helper

    def started() -> list[str]:
        before = multiprocessing.active_children()
        names = ("_get_write_results_queue", "get_write_results_queue")  # of 0.16; since
        next(getattr(filesystem_async, name) for name in names if hasattr(filesystem_async, name))()
        return [type(child).__name__ for child in multiprocessing.active_children() if child not in before]

    kept, filesystem_async._results_queue = filesystem_async._results_queue, None
    try:
        save_without_helper()
        repaired = started()
        filesystem_async._results_queue = None
        return repaired, started()
    finally:
        filesystem_async._results_queue = kept


def test_a_save_needs_no_helper_process() -> None:
    """That the save itself works, and that a killed rank leaves no process: tests/e2e/test_killed.py."""
    repaired, unrepaired = run_on_ranks(helpers_on_rank, 1)[0]
    assert repaired == [] and len(unrepaired) == 1


def gradient_norm_on_rank(
    parallel: dict[str, Any], world_size: int, changes: dict[str, Any], marked: bool, weight: float
) -> float:
    """The gradient norm of one step, with fields of the TransformerConfig changed or shards left unmarked, and tokens
    that count `weight` each, or nothing."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, build_optimizer, build_scheduler, train_step, wrap_model

    layout = start_layout(parallel, world_size)
    architecture = tiny("llama")
    models = build_model(architecture, layout, "fp32")
    initialize(models, architecture, seed=11)
    for model in models:
        for field, value in changes.items():
            assert hasattr(model.config, field)
            setattr(model.config, field, value)
        for tensor in model.parameters():
            if not marked:
                tensor.tensor_model_parallel = False  # type: ignore[attr-defined]
    train = TrainConfig(global_batch_size=8)
    timetable = steady(train, 10)
    chunks = wrap_model(models)
    optimizer = build_optimizer(chunks, train, "fp32")
    scheduler = build_scheduler(optimizer, train, timetable)
    objective = Objective(LossSettings(vocab_size=architecture.vocab_size))
    batch = my_batch(global_batch(architecture.vocab_size))
    batch = [replace(part, loss_mask=part.loss_mask * weight) for part in batch]
    return train_step(Trained(chunks, optimizer, scheduler), objective, timetable.at(0).shape, batch)["grad-norm"]


def gradient_norm(
    layout: str, changes: dict[str, Any] | None = None, marked: bool = True, weight: float = 1.0
) -> float:
    world_size, parallel = LAYOUTS[layout]
    return run_on_ranks(gradient_norm_on_rank, world_size, parallel, world_size, changes or {}, marked, weight)[0]


def test_interleaved_pipeline_needs_ordered_sends() -> None:
    right = gradient_norm("1")
    assert gradient_norm("PP2-VPP2") == pytest.approx(right, rel=1e-4)
    wrong = gradient_norm("PP2-VPP2", {"overlap_p2p_comm": False, "batch_p2p_comm": True})
    assert abs(wrong / right - 1) > 0.05


def test_gradient_norm_needs_marked_shards() -> None:
    right = gradient_norm("1")
    assert gradient_norm("TP2") == pytest.approx(right, rel=1e-4)
    assert abs(gradient_norm("TP2", marked=False) / right - 1) > 0.05


@pytest.mark.parametrize("layout", ["DP2", "PP2", "TP2-SP"])
def test_token_weights_of_less_than_one_in_all(layout: str) -> None:
    """A mean does not depend on the scale of its weights: here 2**-12 for each of some 100 tokens, an exact factor.

    From megatron-core 0.18 on `finalize_model_grads` divides by 1 where it is given less.
    """
    assert gradient_norm(layout, weight=2.0**-12) == pytest.approx(gradient_norm(layout), rel=1e-5)
    assert gradient_norm(layout, weight=0.0) == 0.0


def adam_on_rank() -> dict[str, Any]:
    """What becomes of torch Adam's `step` when its state is asked for and loaded, with and without the repairs."""
    from minitron_mcore.checkpoint.store import model_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.repairs import SHARDING, optimizer_state
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import build_optimizer, wrap_model

    layout = start_layout({}, 1)
    architecture = tiny("llama")

    def fresh() -> tuple[Any, Any]:
        models = build_model(architecture, layout, "fp32")
        initialize(models, architecture, seed=11)
        chunks: Any = wrap_model(models)
        optimizer = build_optimizer(chunks, TrainConfig(), "fp32")
        for chunk in chunks:
            chunk.zero_grad_buffer()
        return optimizer, model_state(chunks)["model"]

    def distinct_steps(optimizer: Any) -> int:
        states = optimizer.chained_optimizers[0].optimizer.state.values()
        return len({id(state["step"]) for state in states})

    result: dict[str, Any] = {}
    optimizer, tensors = fresh()
    try:
        optimizer.sharded_state_dict(tensors, is_loading=True, metadata=SHARDING)
        result["before the first step"] = "saved"
    except AssertionError:
        result["before the first step"] = "asserts"
    optimizer, tensors = fresh()
    optimizer_state(optimizer, tensors, is_loading=True)
    result["repaired: steps"] = distinct_steps(optimizer)
    result["parameters"] = len(optimizer.chained_optimizers[0].optimizer.state)

    optimizer, tensors = fresh()
    optimizer.step()
    optimizer.sharded_state_dict(tensors, is_loading=True, metadata=SHARDING)
    result["unrepaired: steps"] = distinct_steps(optimizer)
    return result


def test_torch_adam_step() -> None:
    (result,) = run_on_ranks(adam_on_rank, 1)
    assert result["before the first step"] == "asserts"
    assert result["unrepaired: steps"] == 1
    assert result["repaired: steps"] == result["parameters"] > 1


def load_step_on_rank(folder: str) -> str:
    """Loading into a fresh optimizer without the `step` stand-in."""
    from pathlib import Path

    from minitron_mcore.checkpoint.store import load_state, save_state, training_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.repairs import load_optimizer_state
    from minitron_mcore.runtime.start import start
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import build_optimizer, build_scheduler, wrap_model

    layout = start_layout({}, 1)
    architecture = tiny("llama")
    models = build_model(architecture, layout, "fp32")
    initialize(models, architecture, seed=11)
    chunks = wrap_model(models)
    optimizer = build_optimizer(chunks, TrainConfig(), "fp32")
    scheduler = build_scheduler(optimizer, TrainConfig(), steady(TrainConfig(), 10))
    optimizer.step()
    save_state(Path(folder), 1, training_state(chunks, optimizer, scheduler, {}, is_loading=False), start())
    state = training_state(chunks, optimizer, scheduler, {}, is_loading=True)
    loaded = load_state(Path(folder), 1, state)["optimizer"]
    try:
        optimizer.load_state_dict({**loaded, "optimizer": dict(loaded["optimizer"])})
    except KeyError as error:
        load_optimizer_state(optimizer, loaded)
        return str(error)
    return "loaded"


def test_loading_adam_needs_its_step(tmp_path: Any) -> None:
    (result,) = run_on_ranks(load_step_on_rank, 1, str(tmp_path))
    assert result == "'step'"


def buckets_on_rank() -> tuple[int, int, int]:
    """How many parameters' means of gradients gathering mixes up, without the repair and with it, and of how many."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from minitron_mcore.checkpoint.store import model_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.runtime.overlap import Overlap
    from minitron_mcore.runtime.repairs import SHARDING, _padding_kept
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import build_optimizer, wrap_model

    layout = start_layout({}, 1)
    models = build_model(tiny("llama", num_layers=1), layout, "fp32")
    chunks: Any = wrap_model(models, Overlap(grad_reduce=True, bucket_size=5000))
    optimizer: Any = build_optimizer(chunks, TrainConfig(), "fp32")
    for parameter in models[0].parameters():
        parameter.main_grad.normal_()  # type: ignore[attr-defined]
    optimizer.step()
    (part,) = optimizer.chained_optimizers
    means = {id(p): part._get_main_param_and_optimizer_states(p)["exp_avg"].flatten() for p in models[0].parameters()}

    def mixed_up(state: Any) -> int:
        saved = {row.key: row.data.flatten() for row in nested_values(state) if "exp_avg." in getattr(row, "key", "")}
        rows = [(f"optimizer.state.exp_avg.{row.key}", means[id(row.data)]) for row in nested_values(weights)]
        assert len(rows) == len(means) == len(saved)
        return sum(not torch.equal(saved[name], mean) for name, mean in rows)

    weights = model_state(chunks)["model"]
    plain = optimizer.sharded_state_dict({"model": weights}, metadata=SHARDING)
    with _padding_kept(part):
        gathered = optimizer.sharded_state_dict({"model": weights}, metadata=SHARDING)
    return mixed_up(plain), mixed_up(gathered), len(means)


def test_several_buckets_gathered_keep_every_parameter_its_own_state() -> None:
    unrepaired, repaired, number = run_on_ranks(buckets_on_rank, 1)[0]
    assert repaired == 0 < number
    if Version(metadata.version("megatron-core")) < Version("0.18"):
        assert unrepaired > number // 2


Placed = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # key, offsets, sizes, the whole's shape


def states_on_rank(parallel: dict[str, Any], world_size: int, precision: str) -> tuple[list[Placed], list[str], int]:
    """Of an optimizer's state after one step, with several buckets: the pieces that this rank saves, those whose values
    Megatron's own gathering has otherwise, and how many of all are the optimizer's own memory."""
    from contextlib import ExitStack

    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    from minitron_mcore.checkpoint.store import model_state
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.repairs import SHARDING, _padding_kept, optimizer_state
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, train_step

    layout = start_layout(parallel, world_size)
    architecture = tiny("llama")
    models = build_model(architecture, layout, precision)
    initialize(models, architecture, seed=11)
    train = TrainConfig(global_batch_size=8, overlap_grad_reduce=True, ddp_bucket_size=5000)
    timetable = steady(train, 10)
    trained = Trained.of(models, train, timetable)
    objective = Objective(LossSettings(vocab_size=architecture.vocab_size))
    train_step(trained, objective, timetable.at(0).shape, my_batch(global_batch(architecture.vocab_size)))
    chunks = model_state(trained.chunks)
    tensors: Any = next(iter(chunks.values())) if len(chunks) == 1 else dict(enumerate(chunks.values()))
    ours = optimizer_state(trained.optimizer, tensors, is_loading=False)
    parts: list[Any] = trained.optimizer.chained_optimizers
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(_padding_kept(part))
        theirs = trained.optimizer.sharded_state_dict(tensors, is_loading=False, metadata=SHARDING)
    apply_factories(theirs)
    pieces, wholes = (
        [part for part in nested_values(state) if isinstance(part, ShardedTensor)] for state in (ours, theirs)
    )
    gathered: dict[str, torch.Tensor] = {}  # of each key what this rank has of it, and NaN elsewhere
    for whole in wholes:
        gathered.setdefault(whole.key, torch.full(whole.global_shape, torch.nan))[whole.global_slice()] = whole.data
    unlike = [piece.key for piece in pieces if not torch.equal(piece.data, gathered[piece.key][piece.global_slice()])]
    own = {held.untyped_storage().data_ptr() for part in parts for held in _held(part.optimizer)}
    is_own = [piece.data.untyped_storage().data_ptr() in own for piece in pieces]
    saved = [piece for piece in pieces if is_main_replica(piece.replica_id)]
    return (
        [(piece.key, piece.global_offset, tuple(piece.data.shape), piece.global_shape) for piece in saved],
        unlike,
        is_own.count(False),
    )


def _held(adam: Any) -> list[Any]:
    return [tensor for parameter, state in adam.state.items() for tensor in (parameter, *state.values())]


@pytest.mark.parametrize(
    ("layout", "data", "precision"),
    [
        ("1", 1, "fp32"),
        ("TP2", 1, "bf16"),
        ("DP2", 1, "bf16"),
        *(pytest.param(name, 2, "fp32", marks=pytest.mark.slow) for name in ("DP2", "TP2", "PP2")),
        pytest.param("PP2-VPP2", 1, "fp32", marks=pytest.mark.slow),
    ],
)
def test_every_rank_saves_what_it_holds_of_the_optimizer(layout: str, data: int, precision: str) -> None:
    """The ranks' pieces are over the optimizer's own memory, hold what Megatron gathers, and make up every tensor."""
    world_size, parallel = LAYOUTS[layout]
    ranks = run_on_ranks(states_on_rank, world_size * data, parallel, world_size * data, precision)
    covered: dict[str, torch.Tensor] = {}
    for saved, unlike, copied in ranks:
        assert unlike == [] and copied == 0
        for key, offsets, sizes, shape in saved:
            place = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
            covered.setdefault(key, torch.zeros(shape, dtype=torch.int32))[place] += 1
    assert len(covered) == 3 * 9  # of the model's nine names
    assert all(bool((count == 1).all()) for count in covered.values())
    if data > 1:  # what no rank has whole
        assert any(len(sizes) > 2 and sizes[-1] < shape[-1] for saved, *_ in ranks for _, _, sizes, shape in saved)
