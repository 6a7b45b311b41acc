"""What a section's fp8 and optimizer keys become in megatron-core's own configs, by megatron-core's own rules."""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer import optimizer_config as megatron_optimizer

from minitron_mcore.architecture import build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.model import gpt
from minitron_mcore.model.fp8 import HISTORY, fp8_of
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.training.adam_state import AdamState
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.step import STATE_DTYPES

SHAPE = build_architecture(
    {
        "family": "llama",
        "num_layers": 6,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    }
)


def config_of(monkeypatch: pytest.MonkeyPatch, parallel: ParallelConfig | None = None, **keys: Any) -> Any:
    """TransformerConfig of a section with `keys`, checked by megatron-core, as if Transformer Engine were there."""
    monkeypatch.setattr(gpt, "HAVE_TE", True)
    return gpt.transformer_config(SHAPE, parallel or ParallelConfig(), "bf16", fp8=fp8_of(TrainConfig(**keys)))


def test_nothing_asked_for_is_megatrons_default(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(monkeypatch)
    assert (config.fp8, config.fp8_recipe, config.first_last_layers_bf16) == (None, "delayed", False)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
@pytest.mark.parametrize("kind", ["hybrid", "e4m3"])
def test_recipes(monkeypatch: pytest.MonkeyPatch, kind: Any, recipe: Any) -> None:
    config = config_of(monkeypatch, fp8_format=kind, fp8_recipe=recipe)
    assert (config.fp8, config.fp8_recipe) == (kind, recipe)
    assert config.bf16 and config.params_dtype is config.pipeline_dtype is torch.bfloat16
    history = (HISTORY, "max") if recipe == "delayed" else (1, "most_recent")
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == history
    # The weights' quantised copies are kept over a step's microbatches; the teacher's, kept elsewhere, are not.
    assert not config.disable_parameter_transpose_cache


@pytest.mark.parametrize("counts", [(1, 1), (0, 2), (3, 0), (2, 3)])
def test_which_layers_stay_in_bf16(monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int]) -> None:
    """By megatron-core's own rule, of the layers of all stages: what the forecast counts by too."""
    keys: dict[str, Any] = dict(
        zip(("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"), counts, strict=True),
        fp8_format="hybrid",
        first_last_layers_bf16=True,
    )
    config, fp8 = config_of(monkeypatch, ParallelConfig(pipeline=2), **keys), fp8_of(TrainConfig(**keys))
    wide = [is_first_last_bf16_layer(config, layer) for layer in range(6)]
    assert fp8 is not None and [not fp8.holds(layer, 6) for layer in range(6)] == wide
    assert sum(wide) == sum(counts)


def test_a_teacher_in_fp8_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "HAVE_TE", True)
    config = gpt.transformer_config(SHAPE, ParallelConfig(), "fp8", bare_layers=True)
    assert (config.fp8, config.fp8_recipe, config.bf16) == ("hybrid", "tensorwise", True)
    assert config.disable_parameter_transpose_cache


def test_without_the_module_it_is_said() -> None:
    """Installed, as the job has seen, but not to be imported."""
    with pytest.raises(InputError, match=r"fp8 needs Transformer Engine, which cannot be imported here"):
        gpt.transformer_config(SHAPE, ParallelConfig(), "fp8")


class FusedAdam:
    """The arguments that megatron-core looks for in Transformer Engine's."""

    def __init__(
        self,
        params: Any,
        master_weight_dtype: Any = None,
        exp_avg_dtype: Any = None,
        exp_avg_sq_dtype: Any = None,
        use_decoupled_grad: bool = False,
    ) -> None: ...


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What megatron-core imports of Transformer Engine for its OptimizerConfig, at a version of now."""
    assert "use_decoupled_grad" in inspect.signature(FusedAdam).parameters
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["transformer_engine.pytorch.optimizers"], "FusedAdam", FusedAdam, raising=False)
    monkeypatch.setattr(megatron_optimizer, "is_te_min_version", lambda *_, **__: True)


@pytest.mark.parametrize(
    ("keys", "each"),
    [
        ({}, 4 + 4 + 4),
        ({"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp8"}, 4 + 2 + 1),
        ({"main_params_dtype": "fp16"}, 2 + 4 + 4),
        ({"fp8_format": "hybrid", "fp8_recipe": "delayed", "exp_avg_dtype": "fp8"}, 4 + 1 + 4),
        ({"fp8_format": "hybrid", "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, 4 + 2 + 2),
        ({"fp8_format": "e4m3", "fp8_recipe": "blockwise", "main_params_dtype": "fp16"}, 2 + 4 + 4),
    ],
)
def test_the_optimizers_types(engine: None, keys: dict[str, Any], each: int) -> None:
    """Megatron accepts them, by the bytes that the forecast counts; main weights are whole, as they are saved."""
    train = TrainConfig(use_precision_aware_optimizer=True, **keys)
    state = AdamState.of(train)
    recipe = train.fp8_recipe if train.fp8_format else None
    fields = state.megatron_fields(STATE_DTYPES)
    config = OptimizerConfig(optimizer="adam", use_distributed_optimizer=True, fp8_recipe=recipe, **fields)
    named = ("main_params", "exp_avg", "exp_avg_sq")
    assert sum(getattr(config, f"{name}_dtype").itemsize for name in named) == state.bytes_each("bf16") == each
    assert not config.store_param_remainders
    # Where Megatron reads the state without its scales, none of it has any.
    if not config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        assert {config.exp_avg_dtype, config.exp_avg_sq_dtype} <= {torch.float32, torch.bfloat16}


def test_fp32_state_is_as_ever() -> None:
    state = AdamState.of(TrainConfig())
    assert state.megatron_fields(STATE_DTYPES) == {}
    assert (state.bytes_each("bf16"), state.bytes_each("fp32")) == (12, 8)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"fp8_recipe": "delayed"}, "fp8_recipe=delayed has no effect with fp8_format=null"),
        ({"first_last_layers_bf16": True}, "first_last_layers_bf16=true has no effect with fp8_format=null"),
        (
            {"fp8_format": "hybrid", "num_layers_at_end_in_bf16": 2},
            "num_layers_at_end_in_bf16=2 has no effect with first_last_layers_bf16=false",
        ),
        (
            {"fp8_format": "hybrid", "fp8_recipe": "delayed", "first_last_layers_bf16": True},
            "first_last_layers_bf16=true does not go with fp8_recipe=delayed",
        ),
        ({"exp_avg_dtype": "bf16"}, "exp_avg_dtype=bf16 has no effect with use_precision_aware_optimizer=false"),
        (
            {"fp8_format": "hybrid", "use_precision_aware_optimizer": True, "exp_avg_sq_dtype": "fp8"},
            "exp_avg_sq_dtype=fp8 does not go with fp8_recipe=tensorwise, under which a checkpoint would lack its",
        ),
        ({"fp8_format": "fp4"}, "fp8_format=fp4 must be one of hybrid, e4m3"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        TrainConfig(**keys)
    assert str(caught.value).startswith(said)
