"""The efficiency that steps were measured at is found again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.calibrate import calibrated
from minitron_mcore.estimate.model import Setting
from minitron_mcore.estimate.step_time import step_time
from minitron_mcore.runtime.config import ClusterConfig, ParallelConfig
from minitron_mcore.runtime.devices import machine_of

MODEL = build_architecture(
    {"num_layers": 8, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16, "vocab_size": 32000}
)
MACHINE = machine_of(ClusterConfig(device="H100"))


def setting(tensor: int) -> Setting:
    parallel = ParallelConfig(tensor=tensor)
    return Setting(MODEL, parallel, "bf16", 8 // tensor, 4096, 64, 1, None)


@pytest.mark.parametrize("efficiency", [0.05, 0.43, 0.9])
def test_the_efficiency_comes_back(efficiency: float) -> None:
    true = replace(MACHINE, efficiency=efficiency)
    points = [(each, step_time(each, true).total) for each in (setting(1), setting(2))]
    assert calibrated(MACHINE, points[:1]).efficiency == pytest.approx(efficiency, rel=1e-6)
    assert calibrated(MACHINE, points).efficiency == pytest.approx(efficiency, rel=1e-6)


def test_points_that_disagree_are_met_in_the_mean() -> None:
    own = setting(1)
    seconds = step_time(own, MACHINE).total
    found = calibrated(MACHINE, [(own, 1.1 * seconds), (own, seconds / 1.1)])
    assert found.efficiency == pytest.approx(MACHINE.efficiency, rel=1e-6)


@pytest.mark.parametrize(("seconds", "said"), [(1e-3, "shorter than their communication"), (1e9, "longer than any")])
def test_what_no_efficiency_explains_is_refused(seconds: float, said: str) -> None:
    with pytest.raises(InputError, match=rf"^estimate\.measured holds steps that are {said}"):
        calibrated(MACHINE, [(setting(1), seconds)])
