"""What an exchange of states during products needs, on a planned machine too, and what it takes of memory."""

from __future__ import annotations

import dataclasses
import re

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.forecast import settings_of, stage_parts
from minitron_mcore.jobs.exchange import exchange_of
from minitron_mcore.recipe import Recipe, load_recipe
from minitron_mcore.runtime.user_buffers import Exchange, user_buffers
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import plan_timetable

SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 1000}
MODEL = build_architecture(SHAPE)
WORDS = ["train.tp_comm_overlap=true", "parallel.tensor=4", "parallel.sequence=true", "precision=bf16"]
WORDS += ["data.sequence_length=64", "train.tokens=1M", "train.global_batch_size=8", "train.micro_batch_size=2"]
CUDA = World(size=8, device="cuda")


def found(recipe: Recipe, world: World = CUDA) -> Exchange | None:
    timetable = plan_timetable(recipe.train, recipe.data.sequence_length, "train")
    return exchange_of(recipe, "train", MODEL, world, timetable)


def test_the_buffers_are_a_microbatch_of_states() -> None:
    assert found(load_recipe(None, WORDS)) == Exchange("train.tp_comm_overlap", 128, 64, 4)
    assert found(load_recipe(None, [*WORDS, "parallel.context=2"])) == Exchange("train.tp_comm_overlap", 64, 64, 4)
    assert found(load_recipe(None, [*WORDS, "train.tp_comm_overlap=false"])) is None


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "parallel.sequence=false",
            "needs sequence parallelism, whose gathers and scatters it overlaps: set parallel.",
        ),
        ("precision=fp32", "needs Transformer Engine's layers, which are in bf16, and precision=fp32: set"),
        (
            "train.phases=[{tokens: 500k}, {sequence_length: 32}]",
            "has buffers for microbatches of one size, but those of train.phases have 64 and 128 tokens: give all",
        ),
    ],
)
def test_what_it_cannot_go_with_is_named(word: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"train.tp_comm_overlap=true {said}")):
        found(load_recipe(None, [*WORDS, word]))


def test_ranks_without_transformer_engine_say_so() -> None:
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("Transformer Engine is installed")
    words = "train.tp_comm_overlap=true needs Transformer Engine, which is not installed: leave it out"
    with pytest.raises(InputError, match=re.escape(words)), user_buffers(found(load_recipe(None, WORDS))):
        pass


def test_ten_buffers_are_in_the_forecast() -> None:
    recipe = load_recipe(None, WORDS)
    timetable = plan_timetable(recipe.train, 64, "train")
    (setting,) = settings_of(recipe, "train", MODEL, timetable, CUDA, None)
    without = stage_parts(dataclasses.replace(setting, tp_comm_overlap=False), 0)
    assert stage_parts(setting, 0) == without | {"user buffers": 10 * 2 * 128 * 64}
