"""What torch's allocator has out at most on a rank over the first steps of a training, as a recipe has it."""

from __future__ import annotations

import ctypes
import gc
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.recipe import Recipe, load_recipe
from minitron_mcore.training.budget import Shape, Timetable, plan_timetable
from tests.distributed.models import start_layout, tiny

if TYPE_CHECKING:
    from minitron_mcore.estimate.forecast import Forecast
    from minitron_mcore.model.gpt import LanguageModel

VOCABULARY, SEQUENCE = 4096, 256
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 2 * SEQUENCE}
STUDENT = {**COMMON, "hidden_size": 128, "ffn_hidden_size": 384}
TEACHER = {**COMMON, "hidden_size": 256, "ffn_hidden_size": 768}
BUDGET = [f"data.sequence_length={SEQUENCE}", "distill.micro_batch_size=2", "train.micro_batch_size=2"]


@dataclass(frozen=True)
class Case:
    """`words`: the recipe's, beside BUDGET; the batch size and two iterations are added where they are not given.

    student, teacher: changes of STUDENT and TEACHER, in `family`; no teacher: next-token training.
    """

    ranks: int = 1
    words: tuple[str, ...] = ()
    family: str = "llama"
    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] | None = field(default_factory=dict)
    microbatches: int = 4

    @property
    def section(self) -> str:
        return "train" if self.teacher is None else "distill"

    @property
    def models(self) -> tuple[Architecture, Architecture | None]:
        student = tiny(self.family, **{**STUDENT, **self.student})
        return student, None if self.teacher is None else tiny(self.family, **{**TEACHER, **self.teacher})

    def recipe(self) -> Recipe:
        section, words = self.section, [*BUDGET, *self.words]
        layout = load_recipe(None, words).parallel
        samples = 2 * self.microbatches * self.ranks // layout.replica_ranks
        sizes = {"global_batch_size": samples, "tokens": 2 * samples * SEQUENCE, "lr_decay_style": "constant"}
        return load_recipe(None, [*(f"{section}.{name}={value}" for name, value in sizes.items()), *words])

    def timetable(self, recipe: Recipe) -> Timetable:
        return plan_timetable(getattr(recipe, self.section), recipe.data.sequence_length, self.section)

    def forecast(self) -> Forecast:
        from minitron_mcore.estimate.forecast import forecast_run
        from minitron_mcore.runtime.world import World

        recipe, (student, teacher) = self.recipe(), self.models
        world = World(size=self.ranks, local_size=self.ranks, device="cpu")
        return forecast_run(recipe, self.section, student, self.timetable(recipe), world, teacher)


_STATES = (
    "distill.hidden_states.sites=[embedding,block_output,mlp_input]",
    "distill.hidden_states.layers=[[1,1],[2,2]]",
)
_RELATION = ("distill.hidden_states.sites=[attention_relation]", "distill.hidden_states.layers=[[1,1],[2,3]]")
_BF16, _FULL = "precision=bf16", "distill.recompute_granularity=full"
_TP2, _PP2, _CP2 = "parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"
_SP, _VPP2 = "parallel.sequence=true", "parallel.virtual_pipeline=2"
_TIED = {"untie_embeddings_and_output_weights": False}
_SMALL = {"vocab_size": 512}
_WIDE = {**_SMALL, "hidden_size": 512, "ffn_hidden_size": 1536}
CASES = {
    "states": Case(1, _STATES),
    "cosine bf16": Case(1, (*_STATES, _BF16, "distill.hidden_states.loss=cosine")),
    "relations": Case(1, (*_RELATION, "distill.teacher_window=1")),
    "PP2 states": Case(2, (*_STATES, _PP2)),
    "PP2-VPP2 bf16": Case(2, (_PP2, _VPP2, _BF16, "distill.teacher_window=2")),
    "offloaded": Case(1, ("teacher.placement=offloaded",)),
    "TP2 states": Case(2, (*_STATES, _TP2)),
    "TP2-SP bf16": Case(2, (_TP2, _SP, _BF16, "distill.teacher_window=1")),
    "DP2": Case(2),
    "DP2 sharded": Case(2, ("teacher.placement=sharded",)),
    "full states": Case(1, (*_STATES, _FULL)),
    "block bf16": Case(1, (_BF16, _FULL, "distill.recompute_method=block", "distill.recompute_num_layers=2")),
    "PP2-VPP2 uniform": Case(2, (_PP2, _VPP2, _FULL, "distill.recompute_num_layers=1")),
    "TP2 selective": Case(2, (_TP2, "distill.recompute_granularity=selective")),
    # Other families, shapes, layouts and keys than those above.
    "nemotron TP2-SP bf16": Case(2, (_TP2, _SP, _BF16), "nemotron"),
    "nemotron PP2-VPP2 bf16": Case(2, (_PP2, _VPP2, _BF16), "nemotron"),
    "nemotron DP2 bf16, trained alone": Case(2, (_BF16,), "nemotron", teacher=None),
    "qwen3 PP2": Case(2, (_PP2,), "qwen3"),
    "qwen3 DP2 bf16 selective": Case(2, (_BF16, "distill.recompute_granularity=selective"), "qwen3"),
    "qwen3 PP2 full, 8 microbatches": Case(2, (_PP2, _FULL), "qwen3", microbatches=8),
    "tied PP2": Case(2, (_PP2,), student=_TIED, teacher=_TIED),
    "tied bf16": Case(1, (_BF16,), student=_TIED, teacher=_TIED),
    "12 of 16 layers": Case(1, student={"num_layers": 12}, teacher={"num_layers": 16}),
    "CP2 bf16": Case(2, (_CP2, _BF16)),
    "CP2 wide keys": Case(2, (_CP2,), student={**_SMALL, "num_query_groups": 6, "kv_channels": 64}, teacher=None),
    "CP4 wide keys": Case(
        4, ("parallel.context=4",), student={**_SMALL, "num_query_groups": 6, "kv_channels": 64}, teacher=None
    ),
    "TP2-CP2-SP": Case(4, (_TP2, _CP2, _SP)),
    "TP2-PP2 bf16": Case(4, (_TP2, _PP2, _BF16)),
    "PP4": Case(4, ("parallel.pipeline=4",)),
    "PP4 states, 8 microbatches": Case(4, (*_STATES, "parallel.pipeline=4"), microbatches=8),
    "corrected teacher": Case(1, ("distill.correct_teacher=true",)),
    "corrected teacher PP2 bf16": Case(2, ("distill.correct_teacher=true", _PP2, _BF16)),
    "DP2, a batch that grows": Case(
        2, ("distill.rampup_batch_size=[4,4,16]", "distill.global_batch_size=16", "distill.tokens=16384")
    ),
    "all tokens' logits at once": Case(1, ("distill.loss_chunk_tokens=512",)),
    "a teacher in bf16": Case(1, ("teacher.precision=bf16",)),
    "a teacher at TP2 beside DP2": Case(
        2,
        ("teacher.parallel.tensor=2", _FULL),
        student={**_SMALL, "num_layers": 2},
        teacher={**_SMALL, "num_layers": 2, "hidden_size": 512},
        microbatches=16,
    ),
    "a teacher at PP2 beside TP2": Case(2, (_TP2, "teacher.parallel.pipeline=2")),
    "a teacher at TP2, states": Case(2, (*_STATES, "teacher.parallel.tensor=2")),
    "PP2 embedding": Case(
        2,
        (_PP2, "train.recompute_granularity=full", "train.micro_batch_size=1", _BF16),
        student={"vocab_size": 16384},
        teacher=None,
    ),
    "wide TP2-SP, trained alone": Case(2, (_TP2, _SP), student={**_WIDE, "num_layers": 2}, teacher=None),
    "few tokens bf16, trained alone": Case(
        1, ("data.sequence_length=32", "train.micro_batch_size=1", _BF16), student=_WIDE, teacher=None, microbatches=2
    ),
    "a wide teacher": Case(
        1, (_FULL,), student={**_SMALL, "num_layers": 2, "hidden_size": 64}, teacher={**_WIDE, "num_layers": 2}
    ),
}


def peak_on_rank(case: Case, folder: str) -> tuple[int, int]:
    """(pipeline stage, bytes that were allocated at most) from before the models are built to after the last step: one
    step of every shape of the budget, two of the last. `folder`: for traces, by rank."""
    from megatron.core import parallel_state
    from torch.profiler import ProfilerActivity, profile

    recipe = case.recipe()
    start_layout(vars(recipe.parallel), case.ranks)
    count_every_thread()
    gc.collect()  # what an earlier test left is not to be given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.empty(1)  # the total before
        _train(case, recipe, folder)
    return parallel_state.get_pipeline_model_parallel_rank(), most_allocated(profiler, folder)


def most_allocated(profiler: Any, folder: str) -> int:
    """Bytes that were allocated at most, above those that were when `profiler` began; its trace lies in `folder`.

    Not counted is what a product takes for itself while it runs: a processor without bf16 arithmetic makes the product
    in fp32 first, one that has it does not.
    """
    trace = Path(folder) / f"rank{torch.distributed.get_rank()}.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    products = [event for event in events if event.get("name") in _PRODUCTS]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    begun = changes[0]["args"]["Total Allocated"]
    return max(event["args"]["Total Allocated"] for event in _without(_scratch(changes, products), changes)) - begun


_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def _scratch(changes: list[Any], products: list[Any]) -> list[tuple[float, float]]:
    """When, from and to, a product had memory that it had let go of again by its end."""
    ends = {(product["tid"], product["ts"]): product["ts"] + product["dur"] for product in products}
    starts: dict[Any, list[float]] = {}
    for tid, start in sorted(ends):
        starts.setdefault(tid, []).append(start)
    taken: dict[Any, tuple[float, Any]] = {}
    found = []
    for change in changes:
        address = change["args"]["Addr"]
        if change["args"]["Bytes"] > 0:
            taken[address] = change["ts"], change["tid"]
        elif address in taken:
            begun, tid = taken.pop(address)
            before = bisect_right(starts.get(tid, []), begun)
            if before and change["ts"] <= ends[tid, starts[tid][before - 1]]:
                found.append((begun, change["ts"]))
    return found


def _without(spans: list[tuple[float, float]], changes: list[Any]) -> Iterator[Any]:
    """`changes` but those within one of `spans`, which do not overlap."""
    spans = sorted(spans)
    starts = [start for start, _ in spans]
    for change in changes:
        before = bisect_right(starts, change["ts"])
        if not before or change["ts"] >= spans[before - 1][1]:
            yield change


def count_every_thread() -> None:
    """Have the total of the CPU's allocator count in every thread, not only where the profiler records: gloo lets go
    of a collective's tensors in threads of its own."""
    libraries = Path(torch.__file__).parent / "lib"
    flag = ctypes.c_bool.in_dll(ctypes.CDLL(str(libraries / "libc10.so")), "FLAGS_caffe2_report_cpu_memory_usage")
    flag.value = True


def _train(case: Case, recipe: Recipe, folder: str) -> None:
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.states.loss import StateLosses
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.model.recompute import recompute_of
    from minitron_mcore.training.step import Trained, train_step
    from minitron_mcore.training.teaching import TrainedTeacher

    train, (student, wide), timetable = getattr(recipe, case.section), case.models, case.timetable(recipe)
    teacher = None if wide is None else load_teacher(recipe, wide)
    models = build_model(student, recipe.parallel, recipe.precision, recompute=recompute_of(train))
    initialize(models, student, seed=1)
    states = None
    if teacher is not None and wide is not None and recipe.distill.hidden_states.sites:
        states = StateLosses(models, recipe.distill.hidden_states, student, wide, recipe.parallel, seed=3)
        teacher.want_states(states.pairs, student.num_layers)
    if teacher is not None and recipe.distill.correct_teacher:
        teacher = TrainedTeacher(teacher, recipe.correct, timetable, Path(folder), lambda tokens: None)
    trained = Trained.of(models, train, timetable)
    settings = LossSettings(student.vocab_size, chunk_tokens=train.loss_chunk_tokens)
    if teacher is not None:
        settings = LossSettings.of(recipe.distill, student.vocab_size)
    objective = Objective(settings, teacher, states, recipe.distill.teacher_window)
    for shape in [*(start.shape for start in timetable.starts), timetable.starts[-1].shape]:
        train_step(trained, objective, shape, batch_of(shape, student.vocab_size))
        if isinstance(teacher, TrainedTeacher):
            teacher.step(shape.tokens)


def load_teacher(recipe: Recipe, wide: Architecture) -> Any:
    """As Teacher.load, with random weights in place of a checkpoint's."""
    from minitron_mcore.distillation.teacher.ahead import Grid, Teacher
    from minitron_mcore.distillation.teacher.placement import place
    from minitron_mcore.model.gpt import DTYPES, build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.model.recompute import KEEP_ALL, recompute_of
    from minitron_mcore.runtime.groups import on_last_stage
    from minitron_mcore.runtime.parallel import teacher_groups

    world, parallel, placement = torch.distributed.get_world_size(), recipe.parallel, recipe.teacher.placement
    layout, precision = recipe.teacher.parallel or parallel, recipe.teacher.precision or recipe.precision
    groups = teacher_groups(layout, world) if layout != parallel else None
    again = recompute_of(recipe.correct) if recipe.distill.correct_teacher else KEEP_ALL
    how: dict[str, Any] = {"groups": groups, "bare_layers": placement != "resident", "recompute": again}
    chunks: list[LanguageModel] = build_model(wide, layout, precision, trainable=False, **how)
    head = None
    if groups is not None:
        if chunks[-1].post_process:
            del chunks[-1].output_layer
        if on_last_stage():
            shape = wide.padded_vocab_size // parallel.tensor, wide.hidden_size
            head = torch.randn(shape, dtype=torch.float32).mul_(0.02).to(DTYPES[precision])
    placed = place(chunks, placement, groups.dp_cp if groups is not None else None)
    if placed is None:
        initialize(chunks, wide, seed=2)
    else:
        for chunk in chunks:
            for _, _, values in placed.rows(chunk):
                values.detach().normal_(std=0.02)
            del values  # of the last layer, in the memory that it was read into
    if groups is None:
        return Teacher(chunks, wide, placed=placed)
    return Teacher(chunks, wide, student=Grid.of(parallel, world), groups=groups, head=head, placed=placed)


def batch_of(shape: Shape, vocab_size: int) -> list[Any]:
    """This rank's microbatches of random tokens, equal on the ranks of a replica as far as memory goes."""
    from minitron_mcore.model.microbatch import Microbatch, on_this_context_rank
    from minitron_mcore.runtime.groups import data_group

    rows, length = shape.micro_batch_size, shape.sequence_length
    batch = []
    for _ in range(shape.global_batch_size // (rows * data_group().size())):
        ids = torch.randint(0, vocab_size, (rows, length + 1))
        positions = torch.arange(length).expand(rows, length).contiguous()
        parts = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(rows, length), positions
        batch.append(on_this_context_rank(Microbatch(*parts)))
    return batch
