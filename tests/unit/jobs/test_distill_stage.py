"""What `distill` and `cache` refuse or warn of before it reads: temperatures, idle keys, a teacher of itself."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from minitron_mcore.distillation.config import CacheConfig
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.cache import check_top_k
from minitron_mcore.jobs.distill import is_itself
from minitron_mcore.jobs.inputs import find_model
from minitron_mcore.jobs.job import NOTHING
from minitron_mcore.recipe import load_recipe
from tests.distributed.models import tiny
from tests.unit.jobs.test_cached_stage import checkpoint


@pytest.mark.parametrize("temperature", ["1e-300", "9e-4", "101", "1e4", "1e30", "inf", "nan", "-1", "0"])
def test_temperatures_that_fp32_does_not_carry_are_refused(temperature: str) -> None:
    for key in ("distill.temperature", "cache.temperature", "cache.proposal_temperature"):
        with pytest.raises(InputError, match=rf"^{key}=\S+ must lie between 0\.001 and 100: "):
            load_recipe(None, [f"{key}={temperature}"])


def test_temperatures_at_the_bounds_are_taken() -> None:
    for temperature in (1e-3, 100.0):
        load_recipe(None, [f"distill.temperature={temperature}", f"cache.temperature={temperature}"])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["distill.jensen_shannon_mix=0.3"],
            "distill.jensen_shannon_mix=0.3 has no effect with distill.logit_loss=forward_kl: ",
        ),
        (["distill.logit_loss=jensen_shannon", "distill.jensen_shannon_mix=0.3"], ""),
        (["distill.jensen_shannon_mix=0.5", "distill.hidden_states.weight=1.0"], ""),
        (["distill.hidden_states.layers=[[1,1]]"], "distill.hidden_states.layers=[[1, 1]] has no effect without"),
        (["cache.top_k=10"], "cache.top_k=10 has no effect with cache.method=sampled"),
        (["cache.top_k=10", "cache.method=top_k"], ""),
        (["cache.top_k=100", "cache.draws=12"], ""),
        (["cache.draws=12", "cache.method=top_k"], "cache.draws=12 has no effect with cache.method=top_k"),
        (["cache.draws=50", "cache.method=top_k"], ""),
        (
            ["cache.proposal_temperature=1.4", "cache.method=top_k"],
            "cache.proposal_temperature=1.4 has no effect with cache.method=top_k",
        ),
    ],
)
def test_keys_that_do_nothing_are_refused_unless_they_are_the_default(overrides: list[str], told: str) -> None:
    try:
        load_recipe(None, overrides)
        assert not told
    except InputError as error:
        assert told and re.match(re.escape(told), str(error)), error


def test_draws_are_had_of_a_vocabulary_smaller_than_the_other_methods_top_k() -> None:
    small = replace(tiny("llama"), vocab_size=64)
    check_top_k(CacheConfig(), small)
    with pytest.raises(InputError, match=r"cache\.top_k=100 is more than the teacher's vocab_size=64"):
        check_top_k(CacheConfig(method="top_k"), small)


def test_a_student_that_is_its_own_teacher_is_known(tmp_path: Path) -> None:
    first, second = (checkpoint(tmp_path / name, tiny("llama")) for name in ("first", "second"))
    (tmp_path / "link").symlink_to(first)
    for teacher in (second, first, tmp_path / "link"):
        model = find_model(teacher, "teacher.checkpoint", NOTHING)
        assert is_itself(model, find_model(first, "distill.load", NOTHING)) == (teacher != second)
