"""The runner of `make gpu-check`: parts that fail, hang, crash and pass, each leaving the rest; and its own table."""

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"

PARTS = """
- {name: passing, shows: a, limit: 60, command: bash -c "echo 1; cat FOLDER/line"}
- {name: failing, shows: b, limit: 60, command: 'python -c "print(7); assert False, 8"'}
- {name: hanging, shows: c, limit: 0.5, command: 'bash -c "sleep 600 & echo $! > FOLDER/child; echo begun; wait"'}
- {name: crashing, shows: d, limit: 60, command: 'bash -c "kill -SEGV $$"'}
- {name: skipping, shows: e, limit: 60, command: 'bash -c "echo not here; exit 77"'}
- {name: needing, shows: f, limit: 60, command: 'python -c 1', needs: no_such_module}
- {name: last, shows: g, limit: 60, command: 'bash -c "echo $MINITRON_TEST_DEVICE; test -n \\"$0\\""', small: small}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("check")
    table = folder / "parts.yaml"
    table.write_text(PARTS.replace("FOLDER", str(folder)))
    (folder / "line").write_text(json.dumps({"summary": "all well", "x": 2}))
    command = [sys.executable, str(FOLDER / "check.py"), "--small", "--parts", str(table), "--results", str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = process.stdout.splitlines()
    (result,) = folder.glob("*-gpu_check-*.txt")
    rows = {row["name"]: row for row in json.loads(lines[-1])["parts"]}
    return {"code": process.returncode, "rows": rows, "result": result.read_text(), "folder": folder, "lines": lines}


def test_every_part_is_told_and_one_that_failed_fails_all(done: dict[str, Any]) -> None:
    found = {name: (row["status"], row["text"]) for name, row in done["rows"].items()}
    assert done["code"] == 1
    assert found["passing"] == ("PASS", "all well")
    assert done["rows"]["passing"]["figures"]["x"] == 2
    assert found["failing"] == ("FAIL", "exit code 1: AssertionError: 8")
    assert found["hanging"][0] == "FAIL" and "not done after its 1.5 s: begun" in found["hanging"][1]
    assert found["crashing"] == ("FAIL", "ended by SIGSEGV")
    assert found["skipping"] == ("SKIP", "not here")
    assert found["needing"] == ("SKIP", "no_such_module is not installed")
    assert found["last"][0] == "PASS" and found["last"][1] in ("stand-in", "cuda")


def test_the_result_has_the_table_and_the_ends_of_what_failed(done: dict[str, Any]) -> None:
    for name, row in done["rows"].items():
        assert f"{row['status']}  {name}" in done["result"]
    assert "--- failing, the end of its output\n7\nTraceback" in done["result"]
    assert "--- passing" not in done["result"]
    assert done["result"].rstrip().splitlines()[-1] == done["lines"][-1]


def test_what_a_hanging_part_started_is_ended_too(done: dict[str, Any]) -> None:
    child = Path("/proc") / (done["folder"] / "child").read_text().strip() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_time_that_is_used_up_skips_the_rest(tmp_path: Path) -> None:
    table = tmp_path / "parts.yaml"
    rows = ("slow, limit: 60, command: sleep 600", "late, limit: 60, command: 'true'")
    table.write_text("\n".join(f"- {{shows: a, name: {row}}}" for row in rows))
    command = [sys.executable, str(FOLDER / "check.py"), "--small", "--parts", str(table), "--limit", "0.5"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    slow, late = json.loads(process.stdout.splitlines()[-1])["parts"]
    assert (slow["status"], late["status"], late["text"]) == ("FAIL", "SKIP", "no time left of 0.5 s")


def test_missing_packages_are_named_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    check = importlib.import_module("benchmarks.gpu.check")
    assert check.missing_packages() == []
    there = check.is_there
    monkeypatch.setattr(check, "is_there", lambda name: name not in ("megatron.core", "pydantic") and there(name))
    assert [line.partition("==")[0] for line in check.missing_packages()] == ["megatron-core", "pydantic"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(any(pin.startswith(line) for pin in pins) for line in check.missing_packages())
    assert not {"wandb", "matplotlib", "nvidia-modelopt"} & set(check.NEEDED.values())


def test_every_part_names_files_that_are_there_in_eight_minutes() -> None:
    check = importlib.import_module("benchmarks.gpu.check")
    parts = check.read_parts(FOLDER / "parts.yaml")
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        words = shlex.split(part.command)
        assert words[0] == "python" and 0 < part.limit <= check.LIMIT <= 480
        files = [word for word in words if word.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files), part.name
        assert part.shows and part.small, part.name
