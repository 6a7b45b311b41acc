"""Names that a parameter may be stored under."""

from __future__ import annotations

import pytest

from minitron_mcore.checkpoint.stored import stored_names
from minitron_mcore.errors import InputError

QKV, NORM = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.module.", "model.module."])
def test_prefixes_and_forms(prefix: str) -> None:
    stacked = stored_names([f"{prefix}{QKV}", f"{prefix}decoder.layers.pre_mlp_layernorm.weight"])
    assert stacked == {
        QKV: {None: f"{prefix}{QKV}"},
        NORM: {None: f"{prefix}decoder.layers.pre_mlp_layernorm.weight"},
    }
    names = [f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in (10, 2)]
    names += [f"decoder.layers.{layer}.pre_mlp_layernorm.weight" for layer in (2, 10)]
    assert stored_names(prefix + name for name in [*names, "output_layer.weight"]) == {
        QKV: {10: prefix + names[0], 2: prefix + names[1]},
        NORM: {2: prefix + names[2], 10: prefix + names[3]},
        "output_layer.weight": {None: f"{prefix}output_layer.weight"},
    }


def test_what_is_not_the_models() -> None:
    names = [
        f"optimizer.state.exp_avg.{QKV}",
        "chained_0.optimizer.state.param.output_layer.weight",
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.bfloat16).bucket_idx_0.param",
        "decoder.layers.3.mlp.linear_fc1._extra_state",
        "rng_state",
        "state_projection.weight",
        "module.state_projection.weight",
    ]
    assert stored_names(names) == {}


def test_a_parameter_stored_twice() -> None:
    with pytest.raises(InputError, match=r"model\.output_layer\.weight and output_layer\.weight are the same"):
        stored_names(["output_layer.weight", "model.output_layer.weight"])
    with pytest.raises(InputError, match="are the same parameter, stored twice"):
        stored_names([NORM, "decoder.layers.pre_mlp_layernorm.weight"])
