"""Where a checkpoint parameter is stored in an iteration, whatever names it was saved under.

    ours, of layer 7                                  stored as
    decoder.layers.mlp.linear_fc2.weight   decoder.layers.mlp.linear_fc2.weight      [L, …], its 8th part
                                           decoder.layers.7.mlp.linear_fc2.weight    layers saved one by one
    decoder.layers.self_attention.linear_qkv.layer_norm_weight
                                           decoder.layers.7.input_layernorm.weight   the local layers' own name

and each of them behind `module.` or `model.`, as wrappers add it; a hybrid model's as in hybrid.py. Optimizer, random
states, Transformer Engine's `_extra_state` and what was trained beside the model are not part of the model. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from minitron_mcore.checkpoint.hybrid import gpt_names
from minitron_mcore.errors import InputError
from minitron_mcore.layout import BESIDE_THE_MODEL, LAYERS, checkpoint_key

_PREFIX = re.compile(r"^(?:(?:module|model)\.)*")
_NOT_THE_MODEL = re.compile(
    r"(^|\.)(optimizer|chained_\d+|rng_state|rerun_state_machine_state|opt_param_scheduler)(\.|$)|_extra_state$"
)


def stored_names(stored: Iterable[str]) -> dict[str, dict[int | None, str]]:
    """Checkpoint key -> layer -> the name, among `stored`, of the tensor that holds it.

    The layer is None for all layers in one tensor, and for a parameter without layers.

    Raises InputError if two tensors are the same parameter, or if they belong to a hybrid model that is not a GPT.
    """
    names: dict[str, dict[int | None, str]] = {}
    of_model = {name: _PREFIX.sub("", name) for name in stored if not _NOT_THE_MODEL.search(name)}
    gpt = gpt_names(of_model.values())
    for name, plain in of_model.items():
        if plain.startswith(BESIDE_THE_MODEL):
            continue
        plain = gpt[plain]
        stacked = plain.startswith(LAYERS) and not plain.removeprefix(LAYERS)[:1].isdigit()
        key, layer = checkpoint_key(plain.replace(LAYERS, LAYERS + "0.", 1) if stacked else plain)
        other = names.setdefault(key, {}).setdefault(None if stacked else layer, name)
        if other != name:
            raise InputError("", f"{name} and {other}", "are the same parameter, stored twice")
    return names
