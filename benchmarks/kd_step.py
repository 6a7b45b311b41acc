"""Time of a distillation step against its parts, each alone, at several layouts.

    python benchmarks/kd_step.py                            one rank, then TP2, PP2 and PP2·VPP2 on two
    python benchmarks/kd_step.py --layouts tp2 --hidden 2048 --teacher-hidden 4096
    python benchmarks/kd_step.py --quickstart               the shapes of configs/quickstart.yaml

distil: one training step, with the teacher ahead of the student, its head and the divergence from hidden states.
teacher: its forward pass with its output head, alone. next_token: the student's training step on the next token, alone.
The ratio is distil / (teacher + next_token), of medians over interleaved repeats: same shapes, layout and batches.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2-vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}
LIMIT = 1.05
QUICKSTART = {
    "layers": 6,
    "hidden": 120,
    "ffn": 320,
    "teacher_hidden": 192,
    "teacher_ffn": 512,
    "heads": 6,
    "groups": 2,
    "kv_channels": 32,
    "vocabulary": 2048,
    "sequence": 256,
    "micro_batch_size": 4,
}


def architecture_of(options: argparse.Namespace, hidden: int, ffn: int) -> Any:
    from minitron_mcore.architecture import build_architecture

    return build_architecture(
        {
            "family": "llama",
            "num_layers": options.layers,
            "hidden_size": hidden,
            "ffn_hidden_size": ffn,
            "num_attention_heads": options.heads,
            "num_query_groups": options.groups,
            "kv_channels": options.kv_channels,
            "vocab_size": options.vocabulary,
            "max_position_embeddings": options.sequence,
        }
    )


def draw_batch(options: argparse.Namespace, device: torch.device) -> list[Any]:
    from minitron_mcore.model.microbatch import Microbatch

    generator = torch.Generator().manual_seed(1)
    shape = (options.micro_batch_size, options.sequence)
    ids = [torch.randint(0, options.vocabulary, (shape[0], shape[1] + 1), generator=generator) for _ in range(4)]
    positions = torch.arange(options.sequence).expand(shape).contiguous()
    return [
        Microbatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), torch.ones(shape), positions).to(device)
        for part in ids
    ]


def sides(options: argparse.Namespace, parallel: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name, on this rank."""
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.distillation.teacher.ahead import Teacher
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.model.schedule import visit_final_states
    from minitron_mcore.runtime.config import ParallelConfig
    from minitron_mcore.runtime.parallel import seed_everything, use_layout
    from minitron_mcore.runtime.start import start
    from minitron_mcore.training.budget import plan_timetable
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, build_optimizer, build_scheduler, train_step, wrap_model

    runtime, layout = start(), ParallelConfig(**parallel)
    use_layout(layout, runtime.world_size)
    seed_everything(1)
    wide = architecture_of(options, options.teacher_hidden, options.teacher_ffn)
    teacher_chunks = build_model(wide, layout, options.precision, trainable=False)
    initialize(teacher_chunks, wide, seed=2)
    architecture = architecture_of(options, options.hidden, options.ffn)
    models = build_model(architecture, layout, options.precision)
    initialize(models, architecture, seed=1)
    batch = draw_batch(options, runtime.device)
    train = TrainConfig(
        lr=1e-4,
        min_lr=1e-4,
        lr_decay_style="constant",
        global_batch_size=len(batch) * options.micro_batch_size,
        micro_batch_size=options.micro_batch_size,
        tokens=1000 * sum(part.tokens.numel() for part in batch),
    )
    timetable = plan_timetable(train, batch[0].tokens.shape[1], "train")
    chunks = wrap_model(models)
    optimizer = build_optimizer(chunks, train, options.precision)
    scheduler = build_scheduler(optimizer, train, timetable)
    plain = Objective(LossSettings(vocab_size=architecture.vocab_size))
    distilling = Objective(
        LossSettings(vocab_size=architecture.vocab_size, lm_weight=0.0, kd_weight=1.0),
        teacher=Teacher(teacher_chunks, wide),
    )

    def make_logits(chunk: Any, hidden: torch.Tensor, microbatch: Any) -> None:
        chunk.logits(hidden)

    def step(objective: Objective) -> Any:
        return train_step(
            Trained(chunks, optimizer, scheduler), objective, timetable.at(0).shape, [replace(part) for part in batch]
        )

    return {
        "distil": lambda: step(distilling),
        "teacher": lambda: visit_final_states(teacher_chunks, batch, make_logits),
        "next_token": lambda: step(plain),
    }


def seconds_of(side: Callable[[], Any]) -> float:
    """From when every rank is ready to when every rank is done."""
    torch.distributed.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    side()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    torch.distributed.barrier()
    return time.perf_counter() - started


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One layout, on the ranks that run this; the same on each but for their clocks."""
    torch.set_num_threads(options.threads)
    measured = sides(options, LAYOUTS[options.layouts[0]][1])
    for side in measured.values():
        side()
    times: dict[str, list[float]] = {name: [] for name in measured}
    for repeat in range(options.repeats):
        names = list(measured)
        for name in names if repeat % 2 == 0 else reversed(names):
            times[name].append(seconds_of(measured[name]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = zip(times["distil"], times["teacher"], times["next_token"], strict=True)
    return {
        "ratio": round(medians["distil"] / (medians["teacher"] + medians["next_token"]), 4),
        "ratio_of_rows_median": round(statistics.median(a / (b + c) for a, b, c in rows), 4),
        "seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
        "threads_a_rank": options.threads,
    }


def run_layout(name: str, options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Start the layout's ranks, each on its share of the threads; what the first printed."""
    world_size = LAYOUTS[name][0]
    threads = max(1, options.threads // world_size)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command = [sys.executable, *launcher, __file__, *words, "--layouts", name, "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"layout {name}: {done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "layers": (4, "num_layers of both"),
        "hidden": (1024, "hidden_size of the student"),
        "ffn": (2816, "ffn_hidden_size of the student"),
        "teacher-hidden": (1536, "hidden_size of the teacher"),
        "teacher-ffn": (4096, "ffn_hidden_size of the teacher"),
        "heads": (16, "num_attention_heads of both"),
        "groups": (4, "num_query_groups of both"),
        "kv-channels": (64, "head dimension of both"),
        "vocabulary": (32000, "vocab_size"),
        "sequence": (256, "tokens of a sample"),
        "micro-batch-size": (1, "samples of a microbatch, of which there are 4"),
        "repeats": (5, "repeats, interleaved"),
        "threads": (len(os.sched_getaffinity(0)), "threads, shared by the ranks"),
    }
    for name, (value, words) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words} ({value})")
    parser.add_argument("--layouts", nargs="+", default=["1", "tp2", "pp2", "pp2-vpp2"], choices=list(LAYOUTS))
    parser.add_argument("--precision", default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--quickstart", action="store_true", help="the shapes of configs/quickstart.yaml")
    options = parser.parse_args()
    if options.quickstart:
        vars(options).update(QUICKSTART)
    return options


def main() -> None:
    options = parse()
    if "WORLD_SIZE" in os.environ:
        result = measure(options)
        if os.environ["RANK"] == "0":
            print(json.dumps(result))
        return
    result = {"benchmark": "kd_step", **vars(options), "results": {}}
    for name in options.layouts:
        row = run_layout(name, options, sys.argv[1:])
        result["results"][name] = row
        aim = "reported" if options.quickstart else f"aim: {LIMIT:.2f}x"
        print(
            f"{name}: {row['ratio']:.3f}x the teacher's forward and a next-token step, each alone ({aim})", flush=True
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
