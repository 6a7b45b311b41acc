"""Time of the scoring pass against a plain forward pass over the same batches: same model, same schedule.

    python benchmarks/score.py                                  fp32 on the CPU, bf16 on a GPU
    python benchmarks/score.py --hidden 4096 --ffn 14336 --heads 32 --groups 8 --sequence 4096      Llama-3.1-8B's width

default: the recipe's defaults (one aggregation; hidden channels, neurons, heads, KV groups, block influence).
menu: all nine aggregations at both neuron sites besides. The plain pass ends at the final norm, as scoring does: the
output head would only make the ratio look better. Repeats are interleaved; medians are compared. Ends with one JSON
line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY = 4096
LIMITS = {"default": 1.10, "menu": 1.25}


def build(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """(architecture, chunks) of a Llama with random weights, on one rank."""
    from minitron_mcore.architecture import build_architecture
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.config import ParallelConfig
    from minitron_mcore.runtime.parallel import seed_everything, use_layout
    from minitron_mcore.runtime.start import start

    runtime, layout = start(), ParallelConfig()
    use_layout(layout, runtime.world_size)
    seed_everything(1)
    architecture = build_architecture(
        {
            "family": options.family,
            "num_layers": options.layers,
            "hidden_size": options.hidden,
            "ffn_hidden_size": options.ffn,
            "num_attention_heads": options.heads,
            "num_query_groups": options.groups,
            "kv_channels": options.hidden // options.heads,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": options.sequence,
        }
    )
    chunks = build_model(architecture, layout, options.precision, trainable=False)
    initialize(chunks, architecture, seed=1)
    for chunk in chunks:
        chunk.eval()
    return architecture, chunks


def draw_batches(options: argparse.Namespace, device: torch.device) -> list[Any]:
    from minitron_mcore.model.microbatch import Microbatch

    generator = torch.Generator().manual_seed(1)
    shape = (options.micro_batch_size, options.sequence)
    positions = torch.arange(options.sequence).expand(shape).contiguous()
    return [
        Microbatch.unlabelled(torch.randint(0, VOCABULARY, shape, generator=generator), positions).to(device)
        for _ in range(options.batches)
    ]


def sides(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: each goes over all batches once."""
    from minitron_mcore.importance.config import AGGREGATIONS, NEURON_SITES, ImportanceConfig
    from minitron_mcore.importance.score import score_model
    from minitron_mcore.model.schedule import forward_only

    architecture, chunks = build(options)
    batches = draw_batches(options, next(chunks[0].parameters()).device)
    pairs = ["/".join(pair) for pair in itertools.product(AGGREGATIONS, AGGREGATIONS)]
    menu = ImportanceConfig(aggregations=pairs, neuron_sites=list(NEURON_SITES))
    return {
        "plain": lambda: forward_only(chunks, batches, lambda chunk, output, batch: None),
        "default": lambda: score_model(chunks, batches, architecture, ImportanceConfig()),
        "menu": lambda: score_model(chunks, batches, architecture, menu),
    }


def seconds_of(side: Callable[[], Any]) -> tuple[float, float]:
    """(seconds by the clock, seconds of processor time, which neighbours on a shared machine disturb less)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started, worked = time.perf_counter(), time.process_time()
    side()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - worked


def compare(options: argparse.Namespace) -> dict[str, Any]:
    measured = sides(options)
    for side in measured.values():
        side()
    times: dict[str, list[float]] = {name: [] for name in measured}
    worked: dict[str, list[float]] = {name: [] for name in measured}
    for repeat in range(options.repeats):
        names = list(measured)
        for name in names if repeat % 2 == 0 else reversed(names):
            clock, processor = seconds_of(measured[name])
            times[name].append(clock)
            worked[name].append(processor)
    medians = {name: statistics.median(values) for name, values in times.items()}
    tokens = options.batches * options.micro_batch_size * options.sequence
    return {
        "tokens_per_second": {name: round(tokens / value, 1) for name, value in medians.items()},
        "ratio": {name: round(medians[name] / medians["plain"], 4) for name in LIMITS},
        "ratio_of_pairs_median": {
            name: round(statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True)), 4)
            for name in LIMITS
        },
        "ratio_of_processor_time": {
            name: round(statistics.median(worked[name]) / statistics.median(worked["plain"]), 4) for name in LIMITS
        },
        "seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "layers": (4, "layers"),
        "hidden": (1024, "hidden_size"),
        "ffn": (4096, "ffn_hidden_size"),
        "heads": (16, "num_attention_heads"),
        "groups": (4, "num_query_groups"),
        "sequence": (512, "tokens of a sample"),
        "micro-batch-size": (2, "samples of a microbatch"),
        "batches": (6, "microbatches of a pass"),
        "repeats": (7, "repeats, interleaved"),
        "threads": (len(os.sched_getaffinity(0)), "threads"),
    }
    for name, (value, words) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words} ({value})")
    parser.add_argument("--family", default="llama")
    parser.add_argument("--precision", default="bf16" if torch.cuda.is_available() else "fp32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"benchmark": "score", **vars(options), **compare(options)}
    for name, limit in LIMITS.items():
        print(
            f"{name}: {result['ratio'][name]:.3f}x the time of a plain forward pass (aim: at most {limit:.2f}x), "
            f"{result['tokens_per_second'][name]:.0f} tokens/s"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
