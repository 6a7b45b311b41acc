"""Prompts of random ids: an engine's speed does not depend on what they say. Pure."""

from __future__ import annotations

import numpy

from minitron_mcore.bench.figures import Case


def prompts_of(case: Case, vocab_size: int, seed: int) -> list[list[int]]:
    """[batch_size][prompt_tokens] ids; the same of one seed, vocabulary and case."""
    draw = numpy.random.default_rng([seed, case.batch_size, case.prompt_tokens])
    return draw.integers(0, vocab_size, (case.batch_size, case.prompt_tokens)).tolist()
