"""Everything only a GPU can show, in one command of at most 8 minutes: the parts of parts.yaml, one after another.

    make gpu-check                        by the virtual environment
    make gpu-check PYTHON=python3.12      by that interpreter, with the packages it has: see benchmarks/README.md
    make gpu-check ARGS="--only step"     some parts alone
    make gpu-check ARGS="--small"         a dry run at small shapes; without a GPU always so

Each part is a process of its own with a time limit of its own, so that one that fails, hangs or crashes leaves the
rest. Ends with a table, the same in a dated file, and one JSON line. Exit code 1 if a part failed, 2 if none could run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 480.0  # seconds of all parts together
SLACK = 3  # times the limits in a dry run: of a CPU that others use too, and no device waits
SKIPPED = 77  # the exit code of a part that cannot show anything here
TAIL = 40  # lines of a failed part's output that the result keeps
# Modules that the parts import -> the package each comes in.
NEEDED = {
    "torch": "torch",
    "megatron.core": "megatron-core",
    "transformers": "transformers",
    "sentencepiece": "sentencepiece",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "psutil": "psutil",
    "xxhash": "xxhash",
    "packaging": "packaging",
    "tensorboard": "tensorboard",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
}
PROBE = """
import importlib.metadata, json, platform, torch
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
names = ("torch", "triton", "megatron-core", "transformer-engine", "transformers")
found = {"python": platform.python_version(), **{name: version(name) for name in names}, "cuda": torch.version.cuda}
print(json.dumps({"device": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "versions": found}))
"""


@dataclass(frozen=True)
class Part:
    """A row of parts.yaml."""

    name: str
    shows: str
    command: str
    limit: float
    small: str = ""
    needs: str = ""


@dataclass
class Outcome:
    """What became of a part. `text`: its last line, or why it was skipped or failed."""

    name: str
    status: str  # PASS, FAIL or SKIP
    seconds: float
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def pinned(package: str) -> str:
    """The package with its version of constraints.txt for this Python."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if re.match(rf"{re.escape(package)}==", line) and _applies(line.partition(";")[2]):
            return line.partition(";")[0].strip()
    return package


def _applies(marker: str) -> bool:
    if not marker.strip():
        return True
    if not is_there("packaging"):
        return True
    from packaging.markers import Marker

    return Marker(marker.strip()).evaluate()


def missing_packages() -> list[str]:
    return [pinned(package) for module, package in NEEDED.items() if not is_there(module)]


def read_parts(path: Path) -> list[Part]:
    import yaml

    return [Part(**row) for row in yaml.safe_load(path.read_text(encoding="utf-8"))]


def environment(device: str | None) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    changed["MINITRON_TEST_DEVICE"] = "cuda" if device else "stand-in"
    return {**os.environ, **changed}


def run_part(part: Part, *, small: bool, limit: float, env: dict[str, str]) -> Outcome:
    """The part in a process group of its own, ended after `limit` seconds."""
    if part.needs and not is_there(part.needs):
        return Outcome(part.name, "SKIP", 0.0, f"{part.needs} is not installed")
    words = shlex.split(part.command) + (shlex.split(part.small) if small else [])
    words[0] = sys.executable if words[0] == "python" else words[0]
    started = time.monotonic()
    # Into a file: whatever a part leaves behind could hold a pipe open for ever.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        seconds = time.monotonic() - started
        output.seek(0)
        lines = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    return _outcome(part, code, seconds, limit, lines)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole group, what the part has started included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _outcome(part: Part, code: int | None, seconds: float, limit: float, lines: list[str]) -> Outcome:
    last = lines[-1].strip() if lines else ""
    figures = _figures(last)
    text = str(figures.get("summary", last))[:300]
    if code == 0 and not re.match(r"\d+ skipped", last):  # pytest's, where no test ran
        return Outcome(part.name, "PASS", seconds, text, figures)
    if code in (0, SKIPPED):
        return Outcome(part.name, "SKIP", seconds, text, figures)
    if code is None:
        why = f"not done after its {limit:.3g} s"
    elif code < 0:
        why = f"ended by {signal.Signals(-code).name}"
    else:
        why = f"exit code {code}"
    return Outcome(part.name, "FAIL", seconds, f"{why}: {text}" if text else why, figures, lines[-TAIL:])


def _figures(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def table(outcomes: list[Outcome], parts: list[Part]) -> str:
    shows = {part.name: part.shows for part in parts}
    width = max(len(name) for name in shows)
    return "\n".join(
        f"{outcome.status}  {outcome.name:<{width}}  {outcome.seconds:6.1f} s  {outcome.text}\n"
        f"{'':{width + 6}}            ({shows[outcome.name]})"
        for outcome in outcomes
    )


def write_result(path: Path, heading: str, outcomes: list[Outcome], parts: list[Part], summary: str) -> None:
    sections = [heading, table(outcomes, parts)]
    sections += ["\n".join([f"--- {o.name}, the end of its output", *o.tail]) for o in outcomes if o.tail]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*sections, summary, ""]), encoding="utf-8")


def slug(device: str | None) -> str:
    """ "NVIDIA H200" -> "h200"."""
    words = re.findall(r"[a-z0-9]+", (device or "cpu").lower())
    return "-".join(word for word in words if word != "nvidia")


def probe() -> dict[str, Any]:
    """Device and versions, asked in another process: this one is to hold nothing of the device."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"gpu-check: torch does not start: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary_of(machine: dict[str, Any], small: bool, outcomes: list[Outcome], seconds: float) -> str:
    rows = [{name: value for name, value in asdict(outcome).items() if name != "tail"} for outcome in outcomes]
    return json.dumps(
        {"benchmark": "gpu_check", **machine, "small": small, "seconds": round(seconds, 1), "parts": rows}
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a dry run, at small shapes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these parts alone")
    parser.add_argument("--limit", type=float, help="seconds of all parts together (480; in a dry run 1440)")
    parser.add_argument("--parts", type=Path, default=Path(__file__).with_name("parts.yaml"), help="another table")
    parser.add_argument(
        "--results",
        type=Path,
        help="the folder of the dated file (benchmarks/results; without it a dry run writes none)",
    )
    return parser.parse_args()


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the running part is ended too
    missing = missing_packages()
    if missing:
        print(f"gpu-check: {sys.executable} lacks {', '.join(missing)}: install them, or carry their wheels")
        return 2
    parts = read_parts(options.parts)
    unknown = sorted(set(options.only or ()) - {part.name for part in parts})
    if unknown:
        print(f"gpu-check: --only: no part is named {', '.join(unknown)}: {', '.join(part.name for part in parts)}")
        return 2
    parts = [part for part in parts if not options.only or part.name in options.only]
    machine = probe()
    small = options.small or not machine["device"]
    whole = options.limit or LIMIT * (SLACK if small else 1)
    why = "" if not small else " (dry run: small shapes)" if machine["device"] else " (no GPU: dry run, small shapes)"
    date = datetime.datetime.now(datetime.timezone.utc).date()
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    heading = f"# gpu-check, {date}, {machine['device'] or 'CPU'}{why}; {versions}"
    print(heading, flush=True)
    folder = options.results or (None if small else ROOT / "benchmarks" / "results")
    path = folder / f"{date}-gpu_check-{slug(machine['device'])}.txt" if folder else None

    started, outcomes, summary = time.monotonic(), [], ""
    for part in parts:
        left = whole - (time.monotonic() - started)
        if left <= 0:
            outcome = Outcome(part.name, "SKIP", 0.0, f"no time left of {whole:g} s")
        else:
            outcome = run_part(
                part,
                small=small,
                limit=min(part.limit * (SLACK if small else 1), left),
                env=environment(machine["device"]),
            )
        outcomes.append(outcome)
        print(f"{outcome.status}  {part.name}  {outcome.seconds:.1f} s  {outcome.text}", flush=True)
        if outcome.tail:
            print("\n".join(f"      {line}" for line in outcome.tail), flush=True)
        summary = summary_of(machine, small, outcomes, time.monotonic() - started)
        if path is not None:  # after every part: the machine may be gone before the last
            write_result(path, heading, outcomes, parts, summary)
    print(table(outcomes, parts))
    if path is not None:
        print(f"written to {path}")
    print(summary)
    return int(any(outcome.status == "FAIL" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
