"""Where products in fp8 and a narrow optimizer are refused: what is not installed, old GPUs, sizes that do not do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.narrow import check_narrow, check_teacher
from minitron_mcore.recipe import load_recipe
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import plan_timetable

SHAPE = build_architecture(
    {
        "family": "llama",
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 8,
        "vocab_size": 1000,
    }
)
HOPPER = World(size=8, device="cuda", engine="2.3.0+5fdd7bb", capability=(9, 0), cuda=(12, 9))
BASE = ["precision=bf16", "distill.tokens=8192", "data.sequence_length=64", "distill.micro_batch_size=2"]
FP8 = "distill.fp8_format=hybrid"
BLOCKS, AWARE = "distill.fp8_recipe=blockwise", "distill.use_precision_aware_optimizer=true"
FIRST = "distill.first_last_layers_bf16=true"


def check(words: list[str], world: World = HOPPER, shape: Any = SHAPE) -> None:
    recipe = load_recipe(None, [*BASE, *words])
    timetable = plan_timetable(recipe.distill, recipe.data.sequence_length, "distill")
    check_narrow(recipe, "distill", shape, world, timetable)


@pytest.mark.parametrize(
    ("words", "world"),
    [
        ([FP8], {}),
        ([FP8, BLOCKS], {}),
        ([FP8, FIRST, "parallel.pipeline=2", "distill.num_layers_at_start_in_bf16=2"], {}),
        ([FP8], {"capability": (8, 9)}),
        ([FP8, "distill.fp8_recipe=delayed"], {"engine": "1.13.0", "cuda": (12, 4)}),
        ([FP8, AWARE, "distill.exp_avg_dtype=bf16"], {}),
        ([AWARE], {"capability": (8, 0)}),  # Adam multiplies nothing
        ([FP8, BLOCKS], {"capability": (10, 0), "engine": "2.12.0"}),
        # A planned machine, of which the device's name alone is known.
        ([FP8, "cluster.device=H100"], {"engine": None, "capability": None, "cuda": None}),
        ([FP8, "cluster.device=A100", "cluster.peak_tflops_fp8=600"], {"engine": None, "capability": None}),
        ([FP8], {"engine": "?"}),
        ([], {"device": "cpu", "engine": ""}),
    ],
)
def test_where_it_goes(words: list[str], world: dict[str, Any]) -> None:
    check(words, replace(HOPPER, **world))


@pytest.mark.parametrize(
    ("words", "world", "said"),
    [
        ([FP8], {"device": "cpu", "engine": ""}, "fp8_format=hybrid needs Transformer Engine and a CUDA device, which"),
        ([FP8], {"engine": ""}, "fp8_format=hybrid needs Transformer Engine, which is not installed: install it, or"),
        (
            [FP8],
            {"capability": (8, 0)},
            "fp8_recipe=tensorwise needs a GPU of compute capability 8.9 (Ada) or newer, and a rank's has 8.0",
        ),
        (
            [FP8, BLOCKS],
            {"capability": (8, 9)},
            "fp8_recipe=blockwise needs a GPU of compute capability 9.0 (Hopper) or newer, and a rank's has 8.9",
        ),
        (
            [FP8, BLOCKS],
            {"engine": "2.2.0"},
            "fp8_recipe=blockwise needs Transformer Engine 2.3 or newer, and 2.2.0 is installed",
        ),
        (
            [FP8, BLOCKS],
            {"cuda": (12, 8)},
            "fp8_recipe=blockwise needs CUDA 12.9 or newer, and this torch was built with 12.8",
        ),
        ([FP8], {"engine": "2.1.0"}, "fp8_recipe=tensorwise needs Transformer Engine 2.2 or newer, and 2.1.0 is"),
        (
            [FP8, "cluster.device=A100"],
            {"engine": None, "capability": None, "cuda": None},
            "fp8_recipe=tensorwise needs a GPU that multiplies in fp8, and cluster.device=A100 does not",
        ),
        ([FP8, "precision=fp32"], {}, "fp8_format=hybrid needs bf16 weights, and precision=fp32: set precision=bf16"),
        ([AWARE, "precision=fp32"], {}, "use_precision_aware_optimizer=true needs bf16 weights, and precision=fp32"),
        ([AWARE], {"device": "cpu"}, "use_precision_aware_optimizer=true needs Transformer Engine and a CUDA device"),
        (
            [AWARE, "distill.exp_avg_sq_dtype=bf16"],
            {"engine": "2.2.0"},
            "exp_avg_sq_dtype=bf16 needs Transformer Engine 2.3 or newer, and 2.2.0 is installed",
        ),
        ([AWARE], {"engine": "1.13"}, "use_precision_aware_optimizer=true needs Transformer Engine 2.1 or newer, and"),
        (
            [FP8, "parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=24"],
            {},
            "micro_batch_size=2 gives a rank 24 tokens",
        ),
        (
            [FP8, "data.sequence_length=36"],
            {},
            "micro_batch_size=2 gives a rank 72 tokens at a time, and distill.fp8_format=hybrid takes multiples of 16",
        ),
        (
            [FP8, "distill.phases=[{tokens: 4096},{sequence_length: 18, micro_batch_size: 4}]"],
            {},
            "phases[1].micro_batch_size=4 gives a rank 72 tokens",
        ),
        (
            [FP8, FIRST, "distill.num_layers_at_start_in_bf16=3", "parallel.pipeline=2"],
            {},
            "num_layers_at_start_in_bf16=3 is more than the 2 layers of a pipeline stage (4 at parallel.pipeline=2)",
        ),
        (
            [FP8, FIRST, "distill.num_layers_at_start_in_bf16=2", "distill.num_layers_at_end_in_bf16=2"],
            {},
            "first_last_layers_bf16=true leaves none of the 4 layers in fp8",
        ),
    ],
)
def test_where_it_is_refused(words: list[str], world: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        check(words, replace(HOPPER, **world))
    assert str(caught.value).startswith(f"distill.{said}")


@pytest.mark.parametrize(
    ("changes", "tensor", "said"),
    [
        ({"hidden_size": 136}, 1, "hidden_size=136 at tensor=1"),
        ({"ffn_hidden_size": 264}, 1, "ffn_hidden_size=264 at tensor=1"),
        ({"ffn_hidden_size": 272}, 2, "ffn_hidden_size=272 at tensor=2"),
        ({"num_attention_heads": 6, "num_query_groups": 6, "kv_channels": 4}, 1, "query heads' width=24 at tensor=1"),
        ({"num_query_groups": 2, "kv_channels": 18}, 1, "width of queries, keys and values=216"),
    ],
)
def test_widths(changes: dict[str, Any], tensor: int, said: str) -> None:
    """Of student and teacher alike."""
    shape = SHAPE.replace(**changes)
    with pytest.raises(InputError) as caught:
        check([FP8, f"parallel.tensor={tensor}"], shape=shape)
    assert f"needs multiples of 16 on every rank, and {said}" in str(caught.value)
    with pytest.raises(InputError, match=r"^teacher\.precision=fp8 needs multiples of 16"):
        check_teacher(shape, tensor, HOPPER, load_recipe(None, []).cluster)


def test_a_teacher_on_an_old_gpu() -> None:
    with pytest.raises(InputError, match=r"^teacher\.precision=fp8 needs a GPU of compute capability 8\.9 \(Ada\)"):
        check_teacher(SHAPE, 1, replace(HOPPER, capability=(8, 6)), load_recipe(None, []).cluster)
