"""Estimated step times beside measured ones on this machine's CPUs: calibrated on one layout, held against others.

    python benchmarks/step_time.py                   eleven cases on one and two ranks, one thread each
    python benchmarks/step_time.py --rounds 9        more repeats, interleaved

The rates of the machine are measured alone: matrix products, attention, a copy in memory, the smallest operation, and
gloo's collectives. What products reach within a step (the efficiency) is calibrated on the first case alone. Every
other case is then estimated, and should be within 25% and in the right order. Times are medians over the rounds, in
which the cases take turns. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minitron_mcore.architecture import Architecture, build_architecture  # noqa: E402
from minitron_mcore.estimate.calibrate import calibrated  # noqa: E402
from minitron_mcore.estimate.model import Setting  # noqa: E402
from minitron_mcore.estimate.step_time import step_time  # noqa: E402
from minitron_mcore.model.recompute import Recompute  # noqa: E402
from minitron_mcore.runtime.config import ParallelConfig  # noqa: E402
from minitron_mcore.runtime.devices import Machine  # noqa: E402
from minitron_mcore.tables import table  # noqa: E402

SEQUENCE, BATCH = 128, 8
STUDENT = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 704,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 64,
    "vocab_size": 2048,
    "max_position_embeddings": SEQUENCE,
}
TEACHER = {**STUDENT, "hidden_size": 384, "ffn_hidden_size": 1024}
# name -> (ranks, parallel, what differs: micro_batch_size, whether a teacher teaches, recompute, the student's fields).
# The first is what the efficiency is calibrated on.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "distil": (1, {}, {"teacher": True}),
    "next token": (1, {}, {}),
    "next token, microbatch 4": (1, {}, {"micro_batch_size": 4}),
    "next token, recomputed": (1, {}, {"recompute": "full"}),
    "next token, 8 layers of 192": (1, {}, {"num_layers": 8, "hidden_size": 192, "ffn_hidden_size": 512}),
    "distil TP2": (2, {"tensor": 2}, {"teacher": True}),
    "distil TP2 SP": (2, {"tensor": 2, "sequence": True}, {"teacher": True}),
    "distil PP2": (2, {"pipeline": 2}, {"teacher": True}),
    "distil PP2 VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {"teacher": True}),
    "distil DP2": (2, {}, {"teacher": True}),
    "next token CP2": (2, {"context": 2}, {}),
}
WITHIN = 0.25
SMALLEST, TINY = "smallest", {"hidden_size": 16, "ffn_hidden_size": 16, "kv_channels": 4, "vocab_size": 16}


def setting_of(name: str) -> Setting:
    """The case `name` as the estimate takes it; SMALLEST: of next to no work, so that its time is its operations'."""
    ranks, parallel, differs = CASES.get(name, (1, {}, TINY))
    layout = ParallelConfig(**parallel)
    shape = {field: differs.get(field, value) for field, value in STUDENT.items()}
    return Setting(
        student=build_architecture(shape),
        parallel=layout,
        precision="fp32",
        data_parallel=ranks // layout.replica_ranks,
        sequence_length=SEQUENCE,
        global_batch_size=BATCH,
        micro_batch_size=differs.get("micro_batch_size", 2),
        loss_chunk_tokens=None,
        recompute=Recompute(differs.get("recompute", "")),
        on_cpu=True,
        teacher=build_architecture(TEACHER) if differs.get("teacher") else None,
    )


def go_first() -> None:
    """Let this process, and the threads that it starts, go before others of a busy machine, if it may."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        Path("/proc/self/autogroup").write_text("-20")


def seconds_of(run: Callable[[], Any], repeats: int) -> list[float]:
    """From when every rank is ready to when every rank is done; after one run that does not count."""
    run()
    found = []
    for _ in range(repeats):
        torch.distributed.barrier()
        started = time.perf_counter()
        run()
        torch.distributed.barrier()
        found.append(time.perf_counter() - started)
    return found


def steps_on_rank(name: str, repeats: int, first: bool = False) -> list[float]:
    """Seconds of training steps of a case, on the ranks that run this."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.training.budget import plan_timetable
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, train_step
    from tests.distributed.models import start_layout

    if first:
        go_first()
    setting = setting_of(name)
    layout = start_layout(asdict(setting.parallel), setting.world_size)
    torch.set_num_threads(1)

    def built(shape: Architecture, **how: Any) -> list[Any]:
        chunks = build_model(shape, layout, "fp32", **how)
        initialize(chunks, shape, seed=1)
        return chunks

    teacher = None if setting.teacher is None else Teacher(built(setting.teacher, trainable=False), setting.teacher)
    size = setting.micro_batch_size
    train = TrainConfig(tokens=1000 * BATCH * SEQUENCE, global_batch_size=BATCH, micro_batch_size=size)
    timetable = plan_timetable(train, SEQUENCE, "train")
    trained = Trained.of(built(setting.student, recompute=setting.recompute), train, timetable)
    settings = LossSettings(
        setting.student.vocab_size, kd_weight=float(teacher is not None), lm_weight=float(not teacher)
    )
    objective = Objective(settings, teacher=teacher)
    batch = draw_batch(setting)
    shape = timetable.at(0).shape
    return seconds_of(lambda: train_step(trained, objective, shape, [replace(each) for each in batch]), repeats)


def draw_batch(setting: Setting) -> list[Any]:
    """This rank's microbatches of random tokens."""
    from minitron_mcore.model.microbatch import Microbatch, on_this_context_rank

    shape = setting.micro_batch_size, SEQUENCE
    ids = torch.randint(0, setting.student.vocab_size, (setting.microbatches, shape[0], SEQUENCE + 1))
    places = torch.arange(SEQUENCE).expand(shape).contiguous()
    found = [Microbatch(i[:, :-1].contiguous(), i[:, 1:].contiguous(), torch.ones(shape), places) for i in ids]
    return [on_this_context_rank(each) for each in found] if setting.parallel.context > 1 else found


def rates_on_rank(repeats: int, first: bool = False) -> dict[str, float]:
    """What the machine can do while as many ranks work as run this; medians."""
    import torch.distributed as dist

    from tests.distributed.models import start_layout

    if first:
        go_first()
    world = int(os.environ["WORLD_SIZE"])
    start_layout({}, world)
    torch.set_num_threads(1)
    rows, h, f = 2 * SEQUENCE, STUDENT["hidden_size"], STUDENT["ffn_hidden_size"]
    x, weight = torch.randn(rows, h), torch.randn(f, h)
    heads, groups, width = (STUDENT[name] for name in ("num_attention_heads", "num_query_groups", "kv_channels"))
    query, key = torch.randn(2, heads, SEQUENCE, width), torch.randn(2, groups, SEQUENCE, width)
    source, target = torch.randn(rows, h), torch.empty(rows, h)
    attend = torch.nn.functional.scaled_dot_product_attention

    def many(run: Callable[[], Any], count: int) -> float:
        def all_of_them() -> None:
            for _ in range(count):
                run()

        return statistics.median(seconds_of(all_of_them, repeats)) / count

    product = many(lambda: torch.nn.functional.linear(x, weight), 200)
    causal = many(lambda: attend(query, key, key, is_causal=True, enable_gqa=True), 500)
    found = {
        "peak": 2 * rows * h * f / product,
        "attention": 2 * rows * SEQUENCE * heads * width / causal,
        "bandwidth": 8 * rows * h / many(lambda: target.copy_(source), 5000),
    }
    if world > 1:
        # Between products, as in a step: who waits has to be woken. Over two ranks as many bytes move as there are.
        small, large = torch.zeros(64), torch.zeros(1 << 18)

        def after_work(tensor: torch.Tensor) -> None:
            torch.nn.functional.linear(x, weight)
            dist.all_reduce(tensor)

        short, long = (many(partial(after_work, tensor), 50) for tensor in (small, large))
        found |= {"latency": max(short - product, 0.0), "link": 4 * large.numel() / max(long - short, 1e-9)}
    return found


def machine_of(rates: dict[str, float], smallest: float) -> Machine:
    """Of measured rates; nothing of it is a share any more. smallest: seconds of a step of SMALLEST, from which that of
    an operation follows, since it has a known number of them."""
    machine = Machine(
        peak_flops_fp32=rates["peak"],
        memory_bandwidth=rates["bandwidth"],
        memory_efficiency=1.0,
        attention_efficiency=rates["attention"] / rates["peak"],
        kernel_latency=0.0,
        host_bandwidth=rates["bandwidth"],
        intra_node_bandwidth=rates.get("link"),
        intra_node_latency=rates.get("latency", 0.0),
        efficiency=1.0,
    )
    setting = setting_of(SMALLEST)
    rest = step_time(setting, machine).total
    operations = step_time(setting, replace(machine, kernel_latency=1.0)).total - rest
    return replace(machine, kernel_latency=(smallest - rest) / operations)


def compare(rounds: int, repeats: int, first: bool = False, names: Sequence[str] = tuple(CASES)) -> dict[str, Any]:
    """Rates, the calibrated efficiency, and the measured and estimated seconds of the cases `names`; of the first of
    them the efficiency."""
    from tests.distributed.ranks import run_on_ranks

    measured: dict[str, list[float]] = {name: [] for name in (*names, SMALLEST)}
    rates: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for number in range(rounds):
        for world in rates:
            rates[world].append(run_on_ranks(rates_on_rank, world, 7, first)[0])
        for name in measured if number % 2 == 0 else reversed(measured):
            ranks = CASES[name][0] if name in CASES else 1
            measured[name] += run_on_ranks(steps_on_rank, ranks, name, repeats, first)[0]
    seconds = {name: statistics.median(values) for name, values in measured.items()}
    medians = {
        world: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for world, rows in rates.items()
    }
    machines = {world: machine_of(row, seconds[SMALLEST]) for world, row in medians.items()}
    one = names[0]
    own = calibrated(machines[CASES[one][0]], [(setting_of(one), seconds[one])])
    found = {}
    for name in names:
        machine = replace(machines[CASES[name][0]], efficiency=own.efficiency)
        found[name] = step_time(setting_of(name), machine)
    return {"rates": medians, "efficiency": own.efficiency, "measured": seconds, "estimated": found}


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """How far off the cases are that were not calibrated on, and how well they are ordered."""
    measured, estimated = result["measured"], {name: each.total for name, each in result["estimated"].items()}
    others = [name for name in list(measured)[1:] if name in estimated]
    off = {name: estimated[name] / measured[name] - 1 for name in others}
    pairs = [(a, b) for i, a in enumerate(others) for b in others[:i]]
    wrong = [
        pair
        for pair in pairs
        if (measured[pair[0]] - measured[pair[1]]) * (estimated[pair[0]] - estimated[pair[1]]) < 0
    ]
    # An order counts where the two are further apart than a tenth.
    apart = [pair for pair in wrong if abs(measured[pair[0]] / measured[pair[1]] - 1) > 0.1]
    return {
        "off": off,
        "worst": max(map(abs, off.values())),
        "pairs": len(pairs),
        "wrong": wrong,
        "wrong_and_apart": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the cases take turns (5)")
    parser.add_argument("--repeats", type=int, default=3, help="steps of a case in a round (3)")
    parser.add_argument("--first", action="store_true", help="before all other processes of a busy machine (as root)")
    parser.add_argument("--parts", action="store_true", help="show the estimate's parts")
    options = parser.parse_args()
    result = compare(options.rounds, options.repeats, options.first)
    found = judged(result)
    rows = []
    for name, estimate in result["estimated"].items():
        off = f"{found['off'][name]:+.0%}" if name in found["off"] else "calibrated"
        rows.append((name, f"{1000 * result['measured'][name]:.1f}", f"{1000 * estimate.total:.1f}", off))
    print(table(rows, ("case", "measured (ms)", "estimated (ms)", "off")))
    if options.parts:
        for name, estimate in result["estimated"].items():
            print(name, {part: round(1000 * value, 1) for part, value in estimate.parts.items() if value > 1e-5})
    apart = len(found["wrong_and_apart"])
    wrong = (
        f"{len(found['wrong'])} of {found['pairs']} pairs in the wrong order, {apart} of them further apart than 10%"
    )
    print(f"aim: within {WITHIN:.0%}; worst {found['worst']:.0%}; {wrong}")
    shown = {**result, "estimated": {name: each.total for name, each in result["estimated"].items()}}
    print(json.dumps({"benchmark": "step_time", **vars(options), **shown, **found}))


if __name__ == "__main__":
    importlib.import_module("benchmarks.step_time").main()  # ranks find functions by their module
