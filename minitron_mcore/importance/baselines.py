"""Random scores, the baseline that every scoring method has to beat. Pure."""

from __future__ import annotations

from typing import Any

import numpy

from minitron_mcore.architecture import Architecture
from minitron_mcore.importance.scores import Scores, axis_shapes


def random_scores(architecture: Architecture, seed: int, settings: dict[str, Any] | None = None) -> Scores:
    """Uniform in [0, 1), from `seed` alone, with a stream for each axis. Any rank calls; all get the same."""
    arrays: dict[str, Any] = {
        axis: numpy.random.default_rng([abs(seed), place]).random(shape)
        for place, (axis, shape) in enumerate(axis_shapes(architecture).items())
    }
    return Scores(
        architecture=architecture, settings={"importance": {"method": "random"}, **(settings or {})}, **arrays
    )
