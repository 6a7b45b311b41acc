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
from dataclasses import dataclass

from minitron_mcore.checkpoint.hybrid import gpt_names
from minitron_mcore.errors import InputError
from minitron_mcore.layout import BESIDE_THE_MODEL, LAYERS, checkpoint_key

_PREFIX = re.compile(r"^(?:(?:module|model)\.)*")
_NOT_THE_MODEL = re.compile(
    r"(^|\.)(optimizer|chained_\d+|rng_state|rerun_state_machine_state|opt_param_scheduler)(\.|$)"
)


def _is_of_model(name: str) -> bool:
    return not name.endswith("_extra_state") and _NOT_THE_MODEL.search(name) is None


@dataclass(frozen=True)
class Place:
    """A stored tensor, and which index of its leading axis is meant; None for all of it."""

    name: str
    layer: int | None


class StoredNames:
    """Looks up (checkpoint key, layer); layers either all stacked in one tensor or each in its own."""

    def __init__(self, stored: Iterable[str]) -> None:
        """`stored`: names of the tensors. Raises InputError if two of them are the same parameter, or if they belong to
        a hybrid model that is not a GPT."""
        self.names: dict[tuple[str, int | None], str] = {}
        of_model = {name: _PREFIX.sub("", name) for name in stored if _is_of_model(name)}
        gpt = gpt_names(of_model.values())
        for name, plain in of_model.items():
            if plain.startswith(BESIDE_THE_MODEL):
                continue
            plain = gpt[plain]
            stacked = plain.startswith(LAYERS) and not plain.removeprefix(LAYERS)[:1].isdigit()
            key, layer = checkpoint_key(plain.replace(LAYERS, LAYERS + "0.", 1) if stacked else plain)
            place = (key, None if stacked else layer)
            if place in self.names:
                raise InputError("", f"{name} and {self.names[place]}", "are the same parameter, stored twice")
            self.names[place] = name

    def find(self, key: str, layer: int | None) -> Place | None:
        """None if the checkpoint does not have the parameter."""
        if (key, layer) in self.names:
            return Place(self.names[key, layer], None)
        if layer is not None and (key, None) in self.names:
            return Place(self.names[key, None], layer)
        return None

    def keys(self) -> set[str]:
        """Keys of all parameters that are stored."""
        return {key for key, _ in self.names}

    def layers(self, key: str) -> list[int] | None:
        """Which layers of `key` are stored one by one; None if they are stacked in one tensor."""
        if (key, None) in self.names:
            return None
        return sorted(layer for stored, layer in self.names if stored == key and layer is not None)
