"""What benchmarks/step_time.py makes of measurements; the measurements themselves are a dated result."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

from minitron_mcore.estimate.calibrate import calibrated
from minitron_mcore.estimate.step_time import step_time

benchmark = importlib.import_module("benchmarks.step_time")
# As measured on two cores: FLOP/s, bytes a second, seconds.
RATES = {"peak": 80e9, "attention": 30e9, "bandwidth": 65e9, "latency": 2e-3, "link": 0.5e9}


def test_a_machine_is_what_was_measured() -> None:
    """The smallest step comes back; the first case too, once the efficiency is calibrated on it, and no other."""
    machine = benchmark.machine_of(RATES, smallest=0.08)
    assert step_time(benchmark.setting_of(benchmark.SMALLEST), machine).total == pytest.approx(0.08)
    first, *others = benchmark.CASES
    own = calibrated(machine, [(benchmark.setting_of(first), 0.78)])
    assert step_time(benchmark.setting_of(first), own).total == pytest.approx(0.78)
    for name in others:
        assert 0.2 < step_time(benchmark.setting_of(name), own).total < 2, "of the size of a step"


def test_orders_are_compared() -> None:
    """By hand: of six pairs one is turned round, by 4% as measured."""
    names = list(benchmark.CASES)
    measured = dict(zip(names, [1.0, 2.0, 3.0, 3.12, 4.0], strict=False))
    estimated = dict(zip(names, [1.0, 2.0, 3.3, 3.12, 5.0], strict=False))
    result = {"measured": measured, "estimated": {n: SimpleNamespace(total=t) for n, t in estimated.items()}}
    found = benchmark.judged(result)
    assert found["pairs"] == 6 and found["wrong"] == [(names[3], names[2])] and found["wrong_and_apart"] == []
    assert found["worst"] == pytest.approx(0.25) and names[0] not in found["off"]


def test_every_case_can_run() -> None:
    for name, (ranks, _, _) in benchmark.CASES.items():
        setting = benchmark.setting_of(name)
        assert setting.world_size == ranks and setting.microbatches >= setting.parallel.pipeline
