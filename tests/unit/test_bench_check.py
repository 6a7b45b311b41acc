"""The benchmark gate: what it lets through, and what it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

GATE = Path(__file__).resolve().parents[2] / "benchmarks" / "gate"
# Reports, at each start, the next of the given ratios.
BENCHMARK = """
import json, pathlib, sys
tape = pathlib.Path(sys.argv[1])
first, *rest = json.loads(tape.read_text())
tape.write_text(json.dumps(rest))
print("some words")
print(json.dumps({"results": [{"ratio": first}]}))
"""


def gate(folder: Path, ratios: list[float], **bound: float) -> tuple[int, str, list[float]]:
    """Exit code, output and what is left of the tape: the ratios of tries that were not made."""
    (folder / "benchmark.py").write_text(BENCHMARK)
    tape, table = folder / "tape.json", folder / "ratios.yaml"
    tape.write_text(json.dumps(ratios))
    row = {"at": "results.0.ratio", "was": 1.0, "breaks": "it waits", **(bound or {"at_most": 1.3})}
    command = f"{folder}/benchmark.py {tape}"
    table.write_text(yaml.safe_dump({"tries": 3, "benchmarks": [{"command": command, "ratios": [row]}]}))
    words = [sys.executable, str(GATE / "ratios.py"), "--table", str(table)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, json.loads(tape.read_text())


def test_a_ratio_that_holds_once_is_let_through(tmp_path: Path) -> None:
    code, shown, left = gate(tmp_path, [1.31, 1.29, 1.0])
    assert code == 0 and "1.29" in shown and "holds" in shown and left == [1.0]


def test_a_ratio_that_is_too_high_every_time_fails(tmp_path: Path) -> None:
    code, shown, left = gate(tmp_path, [1.5, 1.4, 1.6, 1.0])
    assert code == 1 and "1.4" in shown and "TOO HIGH: perhaps it waits" in shown and left == [1.0]


def test_a_ratio_may_have_to_be_high(tmp_path: Path) -> None:
    code, shown, left = gate(tmp_path, [0.7, 0.9, 1.0], at_least=0.8)
    assert code == 0 and "at least 0.8   holds" in shown and left == [1.0]
    code, shown, left = gate(tmp_path, [0.7, 0.6, 0.5], at_least=0.8)
    assert code == 1 and "0.7" in shown and "TOO LOW: perhaps it waits" in shown


def test_every_benchmark_of_the_table_is_there() -> None:
    table = yaml.safe_load((GATE / "ratios.yaml").read_text())
    for row in table["benchmarks"]:
        assert (GATE.parent / row["command"].split()[0]).is_file()
        for ratio in row["ratios"]:
            assert ratio["breaks"] and ("at_most" in ratio) != ("at_least" in ratio)
            assert ratio.get("at_least", 0) < ratio["was"] < ratio.get("at_most", float("inf"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_ratios_hold() -> None:
    command = [sys.executable, str(GATE / "ratios.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
