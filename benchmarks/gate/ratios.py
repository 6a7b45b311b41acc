"""Whether the benchmarks' ratios still hold: `make bench-check`.

    python benchmarks/gate/ratios.py [--only kd_step score] [--table FILE]

Runs each benchmark of ratios.yaml, one after another, and compares the ratios in its closing JSON line with the table.
Prints a row a ratio; exit code 1 where one is too high, or too low, in every try, or where a benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

BENCHMARKS = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("ratios.yaml")


def measured(command: str) -> dict[str, Any]:
    """The closing JSON line of a benchmark. Raises CalledProcessError where it fails."""
    words = [sys.executable, *shlex.split(command)]
    output = subprocess.run(words, cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def value_at(result: Any, path: str) -> float:
    """The number at `path`: keys and positions, divided by dots."""
    for part in path.split("."):
        result = result[int(part)] if isinstance(result, list) else result[part]
    return float(result)


def holds(ratio: dict[str, Any], value: float) -> bool:
    """Whether `value` lies where the row lets it: up to `at_most`, or from `at_least` on."""
    return bool(ratio.get("at_least", value) <= value <= ratio.get("at_most", value))


def check(benchmark: dict[str, Any], tries: int) -> bool:
    """Run it until every ratio has held once; print a row a ratio. Whether all have held."""
    command, ratios = benchmark["command"], benchmark["ratios"]
    best = dict[str, float]()
    for _ in range(tries):
        result = measured(command)
        for ratio in ratios:
            value, better = value_at(result, ratio["at"]), max if "at_least" in ratio else min
            best[ratio["at"]] = better(value, best.get(ratio["at"], value))
        if all(holds(ratio, best[ratio["at"]]) for ratio in ratios):
            break
    for ratio in ratios:
        value, name = best[ratio["at"]], f"{command.split('.')[0]} {ratio['at']}"
        bound, wrong = ("at_least", "TOO LOW") if "at_least" in ratio else ("at_most", "TOO HIGH")
        words = "holds" if holds(ratio, value) else f"{wrong}: perhaps {ratio['breaks']}"
        limit = f"{bound.replace('_', ' ')} {ratio[bound]:.3g}"
        print(f"{name:44} {value:10.3g}   was {ratio['was']:.3g}, {limit}   {words}", flush=True)
    return all(holds(ratio, best[ratio["at"]]) for ratio in ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of benchmarks, without .py")
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args()
    table = yaml.safe_load(options.table.read_text(encoding="utf-8"))
    chosen = [row for row in table["benchmarks"] if not options.only or row["command"].split(".")[0] in options.only]
    held = [check(row, table["tries"]) for row in chosen]
    return 0 if held and all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
