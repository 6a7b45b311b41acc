"""The whole road on one CUDA device, in fp32 and in bf16; with Transformer Engine's layers where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_run import start, write_recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_road_on_cuda(precision: str, tmp_path: Path) -> None:
    """The losses are those of the same recipe on the CPU: 1e-3 in fp32 after training, 2e-2 in bf16."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cuda").mkdir()
    results = {}
    for device, hidden in (("cpu", ""), ("cuda", "0")):
        recipe, log = write_recipe(tmp_path / device), tmp_path / f"{device}.log"
        overrides = ["parallel.tensor=1", f"precision={precision}"]
        process = start(recipe, log, *overrides, ranks=1, CUDA_VISIBLE_DEVICES=hidden)
        assert process.wait(timeout=280) == 0, log.read_text()
        results[device] = json.loads((tmp_path / device / "run" / "results.json").read_text())
    tolerance = {"fp32": 1e-3, "bf16": 2e-2}[precision]
    for name in ("teacher", "width next-token loss", "width random weights"):
        assert results["cuda"][name]["lm loss"] == pytest.approx(results["cpu"][name]["lm loss"], rel=tolerance), name
