"""Random scores: what any way of scoring has to beat."""

from __future__ import annotations

from typing import Any

import numpy

from minitron_mcore.architecture import Architecture
from minitron_mcore.importance.scores import Scores


def random_scores(architecture: Architecture, seed: int, settings: dict[str, Any] | None = None) -> Scores:
    """Uniform in [0, 1), by `seed` alone; every axis has a stream of its own. Any rank calls; all get the same."""
    a = architecture
    shapes: dict[str, tuple[int, ...]] = {
        "hidden": (a.hidden_size,),
        "ffn": (a.num_layers, a.ffn_hidden_size),
        "heads": (a.num_layers, a.num_attention_heads),
        "groups": (a.num_layers, a.num_query_groups),
        "layers": (a.num_layers,),
    }
    arrays: dict[str, Any] = {
        axis: numpy.random.default_rng([abs(seed), place]).random(shape)
        for place, (axis, shape) in enumerate(shapes.items())
    }
    return Scores(architecture=a, settings={"importance": {"method": "random"}, **(settings or {})}, **arrays)
