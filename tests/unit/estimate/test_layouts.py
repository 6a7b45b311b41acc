"""Layouts of a number of GPUs: which there are, which fit, that a recipe with their keys is what was estimated."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.estimate.cost import cost_of
from minitron_mcore.estimate.estimate import Estimate
from minitron_mcore.estimate.forecast import Forecast, forecast, stage_parts
from minitron_mcore.estimate.layouts import best_layouts, is_possible, parallels, smallest
from minitron_mcore.estimate.words import report
from minitron_mcore.estimate.work import Limits
from minitron_mcore.jobs.estimate import resolve, training_of
from minitron_mcore.jobs.sketch import TRAININGS, sketch_road
from minitron_mcore.layout import check_tensor_parallel, split_layers
from minitron_mcore.recipe import load_recipe
from minitron_mcore.runtime.config import ParallelConfig, check_sequence
from minitron_mcore.runtime.world import Memory, World
from tests.refusals import refuses

ROOT = Path(__file__).parents[3]
LLAMA = [f"teacher.checkpoint={ROOT}/configs/models/llama-3.1-8b", "precision=bf16", "data.sequence_length=8192"]
LLAMA += ["student.hidden_size=3072", "student.ffn_hidden_size=9216", "distill.tokens=94B", "distill.teacher_window=64"]
LLAMA += ["distill.global_batch_size=1152", "cluster.device=H100"]
CORRECTED = ["correct.tokens=100B", "correct.global_batch_size=1152"]


def estimate(*words: str) -> Estimate:
    return resolve(load_recipe(None, [*LLAMA, *words]), World()).estimate


@pytest.mark.parametrize("gpus", [6, 16])
def test_every_layout_that_is_possible_is_there(gpus: int) -> None:
    """Against all products of small numbers, by the checks that a run makes."""
    trainings = estimate(f"cluster.gpus={gpus}", *CORRECTED).trainings
    found = {(p.tensor, p.pipeline, p.virtual_pipeline) for p in parallels(trainings, gpus, 8)}
    shapes = trainings[1].setting.student, trainings[1].setting.teacher
    expected = set()
    for tensor, pipeline, chunks in itertools.product(range(1, 9), range(1, 17), (None, 2, 4, 8, 16, 32)):
        if gpus % (tensor * pipeline) or (pipeline == 1 and chunks):
            continue
        try:
            for shape in filter(None, shapes):
                check_tensor_parallel(shape, tensor)
                split_layers(shape.num_layers, pipeline, chunks)
            parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks, sequence=tensor > 1)
            check_sequence(8192, parallel)
        except InputError:
            continue
        expected.add((tensor, pipeline, chunks))
    # Beside powers of two, as many chunks as there are layers for.
    assert expected <= found
    assert all(chunks == 32 // pipeline for _, pipeline, chunks in found - expected)


def test_a_recipe_with_the_keys_of_a_layout_is_what_was_estimated() -> None:
    """Each of the best layouts, typed as it is told: possible, of the same memory, and of the same time."""
    asked = ["cluster.gpus=64", *CORRECTED, "parallel.tensor=4", "cluster.gpu_memory=40Gi"]
    found = estimate(*asked)
    world, kinds = World(size=64, local_size=8, device="cuda"), set()
    for layout in found.layouts[::4]:
        recipe = load_recipe(None, [*LLAMA, *asked, *layout.keys(found.trainings)])
        assert found.teacher is not None
        works = [each for each in sketch_road(recipe, found.teacher).works if each.verb in TRAININGS]
        again = [training_of(each, world) for each in works]
        assert [each.problem for each in again] == ["", ""]
        assert max(each.forecast.total for each in again if each.forecast) == layout.memory
        times = [cost_of(each.timetable, each.settings, found.machine).seconds for each in again]
        assert sum(times) == pytest.approx(layout.seconds)
        kinds |= {(c.setting.recompute.granularity, c.setting.teacher_placement) for c in layout.choices}
    assert len(kinds) > 2, "several kinds of choices are tried"


def test_layouts_keep_the_instances_of_the_optimizer_that_they_can() -> None:
    found = estimate("parallel.num_distributed_optimizer_instances=4", "cluster.gpus=32")
    counts = [(p.num_distributed_optimizer_instances, 32 // p.replica_ranks) for p in parallels(found.trainings, 32, 8)]
    assert all(count == (1 if data % 4 else 4) for count, data in counts)
    assert {count for count, _ in counts} == {1, 4}
    changed = next(layout for layout in found.layouts if layout.data_parallel % 4)
    assert "parallel.num_distributed_optimizer_instances=1" in changed.keys(found.trainings)


def test_the_fastest_comes_first_and_fits() -> None:
    found = estimate("cluster.gpus=64", "cluster.gpu_memory=16Gi")
    times = [layout.seconds or 0 for layout in found.layouts]
    assert times == sorted(times) and found.limits.usable is not None
    assert all(layout.memory <= found.limits.usable for layout in found.layouts)
    everything = best_layouts(found.trainings, 64, 8, Limits())
    assert len(everything) > len(found.layouts), "some do not fit"


def test_the_fewest_gpus() -> None:
    """No fewer fit, asked one by one."""
    found = estimate("cluster.gpus=64", *CORRECTED)
    (first, *_) = smallest(found.trainings, 8, found.limits)
    assert found.fewest[0] == first and first.gpus > 1
    assert not any(best_layouts(found.trainings, gpus, 8, found.limits) for gpus in range(1, first.gpus))
    assert smallest(found.trainings, 8, Limits(2**20)) == []


def test_the_fewest_gpus_are_the_same_whatever_is_asked_for() -> None:
    """Also where no number is; a node's host memory is then shared by its own ranks, not by those asked for."""
    offloaded = ["teacher.placement=offloaded", "cluster.host_memory=9Gi", "cluster.gpu_memory=52Gi"]
    for words in ([], CORRECTED, offloaded):
        found = [estimate(*words, *gpus).fewest for gpus in ([], ["cluster.gpus=8"], ["cluster.gpus=64"])]
        alike = [[(each.gpus, each.parallel, each.memory) for each in fewest] for fewest in found]
        assert alike[0] and alike[0] == alike[1] == alike[2], words


def test_it_is_said_what_ranks_an_estimate_is_for() -> None:
    """Without a cluster those of this machine: of a CPU, which need other amounts, with its memory."""
    own = [word for word in LLAMA if not word.startswith("cluster.")]
    here = World(memory=Memory(2**30, 2**30, 2**30, 2**30))
    told = resolve(load_recipe(None, own), here).estimate
    assert told.on_cpu and told.limits.device == 2**30
    shown = report(told)
    assert shown.startswith("estimate: run on 1 CPU rank of this machine in bf16\n")
    assert "no layout of 1 CPU rank fits" in shown and "GPU" not in shown
    for words, place in (([], "one H100"), (["cluster.gpus=2", "cluster.device=null"], "2 x GPU")):
        found = resolve(load_recipe(None, [*LLAMA, *words]), here).estimate
        assert not found.on_cpu and f" on {place} in bf16" in report(found)


def test_numbers_that_no_layout_holds_are_refused() -> None:
    """1,152 sequences on 37 ranks: 37 divides neither them nor anything of the model, and is more than its layers."""
    with refuses("cluster.gpus", 37, "can be laid out in no way", "the nearest that can be are 36 and 38"):
        estimate("cluster.gpus=37")
    trainings = estimate("cluster.gpus=36").trainings
    assert [is_possible(trainings, gpus, 8) for gpus in (36, 37, 38)] == [True, False, True]


def test_far_too_many_gpus_are_refused_at_once() -> None:
    """A million was walked down to the most that 1,152 sequences, 32 layers and a node of 8 can take, one by one."""
    with refuses("cluster.gpus", 1_000_000, "can be laid out in no way", f"the nearest that can be is {8 * 32 * 1152}"):
        estimate("cluster.gpus=1000000")


def test_a_teacher_s_own_layout_is_named_where_none_is_possible() -> None:
    with refuses("cluster.gpus", 64, "can be laid out in no way", "or teacher.parallel"):
        estimate("cluster.gpus=64", "teacher.parallel.tensor=128")


def test_a_missing_figure_is_named() -> None:
    with refuses(
        "cluster.inter_node_bandwidth", None, "is not given, and the table has none of cluster.device=A100 PCIe"
    ):
        estimate("cluster.gpus=64", "cluster.device=A100 PCIe")
    untimed = estimate("cluster.gpus=64", "cluster.device=null")
    assert untimed.costs == () and untimed.layouts and untimed.twice is None


@pytest.mark.parametrize(
    "words",
    [
        {"pipeline": 8},
        {"pipeline": 3, "tensor": 2, "sequence": True},
        {"pipeline": 5, "virtual_pipeline": 2},
        {"pipeline": 4, "virtual_pipeline": 8},
    ],
    ids=str,
)
def test_the_fullest_stage_is_the_first_or_the_last(words: dict[str, Any]) -> None:
    """`forecast` looks at these two alone, where nothing lies at a place of its own: against all stages."""
    setting = estimate("cluster.gpus=8").trainings[0].setting
    for teacher, vocabulary in itertools.product((setting.teacher, None), (128256, 1024)):
        student = setting.student.replace(vocab_size=vocabulary, padded_vocab_size=vocabulary)
        laid = replace(setting, parallel=ParallelConfig(**words), teacher=teacher, student=student, data_parallel=2)
        every = [Forecast(stage_parts(laid, stage), laid) for stage in range(laid.parallel.pipeline)]
        assert forecast(laid).total == max(found.total for found in every)


def test_phases_keep_their_micro_batches() -> None:
    """Whose times are those of their own shapes."""
    phases = "distill.phases=[{tokens: 47B, micro_batch_size: 2}, {sequence_length: 4096, micro_batch_size: 4}]"
    found = estimate("cluster.gpus=64", "parallel.tensor=4", phases)
    for layout in found.layouts[:5]:
        assert {each.micro_batch_size for each in layout.choices[0].settings[0]} == {2, 4}
    (training,) = found.trainings
    assert cost_of(training.timetable, training.settings, found.machine) == found.costs[0]
