"""Tokens a second on 8 to 1,024 GPUs, on paper: a recipe's trainings by the step-time model, with and without
overlapped data-parallel communication.

    python benchmarks/scale.py                                      the Llama-3.1-8B -> 4B recipe, H100s
    python benchmarks/scale.py --device B200 parallel.tensor=8      another device, further keys of the recipe

The layout is the recipe's, so that further GPUs are further data-parallel ranks. Weak scaling: the global batch grows
with them, and every rank has as many microbatches as the recipe gives it on --gpus. Strong scaling: the batch is the
recipe's own; `-` where it is not whole on the ranks. Efficiency: tokens a second and GPU against those on 8 GPUs, with
and without overlap each against its own. "Half the network": with overlap, on half the bandwidth between nodes that the
maker's systems have. Not modelled: waiting for the slowest GPU, and what communication takes from the computation
beside it (docs/estimate.md). Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minitron_mcore.estimate.model import Setting  # noqa: E402
from minitron_mcore.estimate.step_time import StepTime, step_time  # noqa: E402
from minitron_mcore.jobs.estimate import resolve  # noqa: E402
from minitron_mcore.recipe import load_recipe  # noqa: E402
from minitron_mcore.runtime.devices import Machine  # noqa: E402
from minitron_mcore.runtime.world import World  # noqa: E402
from minitron_mcore.tables import table  # noqa: E402

RECIPE = "configs/llama-3.1-8b-to-4b-width.yaml"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GOAL = 0.9
PART = "data-parallel communication"


def on_gpus(setting: Setting, gpus: int, *, weak: bool, overlapped: bool) -> Setting | None:
    """`setting` on so many GPUs; None where its batch is not whole on them."""
    ranks = gpus // setting.parallel.replica_ranks
    each = setting.micro_batch_size * ranks
    batch = setting.microbatches * each if weak else setting.global_batch_size
    if not ranks or batch % each:
        return None
    keys: dict[str, Any] = {"overlap_grad_reduce": overlapped, "overlap_param_gather": overlapped}
    return replace(setting, data_parallel=ranks, global_batch_size=batch, **keys)


def scaling(setting: Setting, machine: Machine) -> list[dict[str, Any]]:
    """A row for each of GPUS, of the training that `setting` is of."""
    rows: list[dict[str, Any]] = []

    def timed(gpus: int, weak: bool, overlapped: bool, on: Machine = machine) -> StepTime | None:
        found = on_gpus(setting, gpus, weak=weak, overlapped=overlapped)
        return None if found is None else step_time(found, on)

    slow = replace(machine, inter_node_bandwidth=machine.need("inter_node_bandwidth") / 2)
    for gpus in GPUS:
        row: dict[str, Any] = {"gpus": gpus}
        for name, time in {
            "overlap": timed(gpus, True, True),
            "none": timed(gpus, True, False),
            "half_the_network": timed(gpus, True, True, slow),
            "strong": timed(gpus, False, True),
            "strong_none": timed(gpus, False, False),
        }.items():
            if time is None:
                row[name] = None
                continue
            row[name] = {"rate": time.tokens_per_second / gpus, "seconds": time.total, "waits": time.parts[PART]}
        rows.append(row)
    for name in ("overlap", "none", "half_the_network", "strong", "strong_none"):
        found = [row[name] for row in rows if row[name]]
        for each in found:
            each["efficiency"] = each["rate"] / found[0]["rate"]
    return rows


def show(title: str, setting: Setting, rows: list[dict[str, Any]]) -> None:
    def cells(row: dict[str, Any], name: str) -> list[str]:
        found = row[name]
        return [f"{found['rate']:,.0f}", f"{found['efficiency']:.1%}"] if found else ["-", "-"]

    header: tuple[str, ...] = (
        "GPUs",
        "step",
        "waits",
        "tokens/s a GPU",
        "efficiency",
        "no overlap: step",
        "waits",
        "tokens/s a GPU",
    )
    header += ("efficiency", "half the network", "strong: tokens/s a GPU", "efficiency", "no overlap", "efficiency")
    lines = []
    for row in rows:
        line = [f"{row['gpus']:,}"]
        for name in ("overlap", "none"):
            line += [f"{row[name]['seconds']:.2f} s", f"{1000 * row[name]['waits']:.0f} ms", *cells(row, name)]
        line += [cells(row, "half_the_network")[1], *cells(row, "strong"), *cells(row, "strong_none")]
        lines.append(line)
    batch = setting.microbatches * setting.micro_batch_size
    print(f"\n{title}: {batch} sequences of {setting.sequence_length} tokens a data-parallel rank; strong: ", end="")
    print(f"{setting.global_batch_size} in all")
    print(table(lines, header, left=()))
    lowest = min(row["overlap"]["efficiency"] for row in rows)
    print(f"weak scaling with overlap: at least {lowest:.1%}, goal {GOAL:.0%}: {'met' if lowest >= GOAL else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=RECIPE)
    parser.add_argument("--teacher", default="configs/models/llama-3.1-8b", help="folder that says its shape")
    parser.add_argument("--device", default="H100")
    parser.add_argument("--gpus", type=int, default=256, help="those that the recipe's batch is for")
    parser.add_argument("keys", nargs="*", help="further keys of the recipe, as parallel.tensor=8")
    options = parser.parse_args()
    words = [f"teacher.checkpoint={options.teacher}", f"cluster.gpus={options.gpus}"]
    recipe = load_recipe(str(ROOT / options.config), [*words, f"cluster.device={options.device}", *options.keys])
    estimate = resolve(recipe, World()).estimate
    print(f"{estimate.name}: {options.device}, layout {estimate.trainings[0].setting.parallel}")
    results = {}
    for training in estimate.trainings:
        results[training.title] = rows = scaling(training.setting, estimate.machine)
        show(training.title, training.setting, rows)
    print(json.dumps({"benchmark": "scale", "device": options.device, "gpus": options.gpus, "trainings": results}))


if __name__ == "__main__":
    main()
