"""Whether a stop fits into the grace is told once the steps are known, and refused where it never can."""

from __future__ import annotations

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.world import grace_seconds
from minitron_mcore.training.grace import Grace

SLOW_START = [0, 90.0, 30.0, 20.0, 25.0]  # the first ask knows of no step; the first step is slow everywhere


def told(grace: Grace, steps: list[float], growth: float = 1.0) -> list[str]:
    return [words for words in (grace.step(seconds, growth) for seconds in steps) if words]


def test_nothing_is_said_of_a_grace_that_is_long_enough_or_not_known() -> None:
    for seconds in (None, 30.0):
        grace = Grace(seconds, given=False)
        assert told(grace, SLOW_START) == [] and grace.save(5.0) == ""


def test_a_grace_below_a_step_is_refused_where_the_recipe_gives_it() -> None:
    with pytest.raises(InputError) as caught:
        told(Grace(19.0, given=True), SLOW_START)
    assert str(caught.value) == (
        "cluster.grace_seconds=19 is shorter than a step, which takes 20.0 s, so that no stop could save: a larger "
        "--signal=USR1@N or GraceTime, named here too, or a smaller global_batch_size mends it"
    )
    # Not by the launcher's default, nor for a machine that is slow today.
    for grace in (Grace(19.0, given=False), Grace(19.0, given=True, resumes=True)):
        assert len(told(grace, SLOW_START)) == 1


def test_what_a_stop_takes_is_added_up_and_told_again_where_it_gets_much_longer() -> None:
    grace = Grace(40.0, given=False)
    assert grace.validation(10.0) == "" and told(grace, SLOW_START) == []
    assert grace.save(6.0) == (
        "a stop by a signal may take 41.0 s (a step of 25.0 s, a validation of 10.0 s and a save of 6.0 s), more than "
        "MINITRON_GRACE_SECONDS=40: what follows the newest checkpoint could be lost; a larger --signal=USR1@N or "
        "GraceTime, named here too, or a smaller global_batch_size mends it"
    )
    assert grace.save(12.0) == "" and "62.0 s" in grace.save(27.0) and grace.save(5.0) == ""


def test_larger_steps_to_come_count() -> None:
    assert "a step of 100.0 s" in told(Grace(60.0, given=False), SLOW_START, growth=4.0)[0]


def test_the_launchers_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINITRON_GRACE_SECONDS", raising=False)
    assert grace_seconds() is None
    monkeypatch.setenv("MINITRON_GRACE_SECONDS", "600")
    assert grace_seconds() == 600
    monkeypatch.setenv("MINITRON_GRACE_SECONDS", "10m")
    with pytest.raises(InputError, match="MINITRON_GRACE_SECONDS=10m must be a whole number of seconds"):
        grace_seconds()
