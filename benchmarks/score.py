"""Time of the scoring pass against a plain forward pass over the same batches: same model, same schedule.

    python benchmarks/score.py                                  fp32 and bf16 on the CPU, bf16 on a GPU
    python benchmarks/score.py --hidden 4096 --ffn 14336 --heads 32 --groups 8 --sequence 4096      Llama-3.1-8B's width

default: the recipe's defaults (one aggregation; hidden channels, neurons, heads, KV groups, block influence).
menu: all nine aggregations at both neuron sites besides. The plain pass ends at the final norm, as scoring does: the
output head would only make the ratio look better. Repeats are interleaved; medians are compared. The menu's scores are
also worked out from the definitions, in float64 from the whole activations of one pass (--check 0 leaves that out).
Exit code 1 where these differ. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY = 4096
LIMITS = {"default": 1.05, "menu": 1.15}
IN_BF16 = 1.15  # on a CPU, whose bf16 products may be faster than what scoring does in fp32
# Of the largest score of an axis. Both have the same activations, so that bf16 costs nothing but in a layer's change,
# which is formed in bf16.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-5}
OF_LAYERS = {"fp32": 1e-5, "bf16": 5e-3}


def build(options: argparse.Namespace, precision: str) -> tuple[Any, list[Any]]:
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
    chunks = build_model(architecture, layout, precision, trainable=False)
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


@dataclass
class Case:
    """A model in one precision, what it runs on, and what is timed, by name: each goes over all batches once."""

    options: argparse.Namespace
    precision: str

    def __post_init__(self) -> None:
        from minitron_mcore.importance.config import AGGREGATIONS, NEURON_SITES, ImportanceConfig
        from minitron_mcore.importance.score import score_model
        from minitron_mcore.model.schedule import forward_only

        self.architecture, self.chunks = build(self.options, self.precision)
        batches = draw_batches(self.options, next(self.chunks[0].parameters()).device)
        pairs = ["/".join(pair) for pair in itertools.product(AGGREGATIONS, AGGREGATIONS)]
        menu = ImportanceConfig(aggregations=pairs, neuron_sites=list(NEURON_SITES))
        given = self.chunks, batches, self.architecture
        self.sides: dict[str, Callable[[], Any]] = {
            "plain": lambda: forward_only(self.chunks, batches, lambda chunk, output, batch: None),
            "default": lambda: score_model(*given, ImportanceConfig()),
            "menu": lambda: score_model(*given, menu),
        }


SITES = ("pre_activation", "down_projection_input")
# Aggregations by their definitions (arXiv 2407.14679, section 2.2), over the first axis, float64.
DEFINITIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda values: values.abs().mean(0),
    "l2": lambda values: values.square().sum(0).sqrt(),
    "var": lambda values: (values - values.mean(0)).square().mean(0),
}


def by_definition(case: Case) -> dict[str, torch.Tensor]:
    """Scores by their names in a scores file, from whole activations, read by hooks of this file's own."""
    a, (chunk,) = case.architecture, case.chunks
    seen: dict[tuple[str, int, str], list[torch.Tensor]] = defaultdict(list)

    def see(axis: str, row: int, values_SBC: torch.Tensor) -> None:
        for name, aggregate in DEFINITIONS.items():
            seen[axis, row, name].append(aggregate(values_SBC.double()))

    def see_heads(row: int, x: torch.Tensor) -> None:
        heads = x.double().unflatten(-1, (a.num_query_groups, -1, a.kv_channels)).square().sum(-1)
        see("heads", row, heads.sqrt().flatten(2))
        see("groups", row, heads.sum(-1).sqrt())

    def see_layer(row: int, x: torch.Tensor, y: torch.Tensor) -> None:
        seen["layers", row, "mean"].append(1 - torch.cosine_similarity(x.double(), y.double(), dim=-1).mean(0))

    with ExitStack() as hooks:

        def after(module: Any, do: Callable[[Any, Any], None]) -> None:
            def hook(module: Any, args: Any, named: Any, output: Any) -> None:
                given = (*args, *named.values())[0]
                do(given, output[0] if isinstance(output, tuple) else output)

            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

        def read(row: int, layer: Any) -> None:
            after(layer.input_layernorm, lambda x, y: see("hidden", 2 * row, y))
            after(layer.pre_mlp_layernorm, lambda x, y: see("hidden", 2 * row + 1, y))
            after(layer.self_attention.linear_proj, lambda x, y: see_heads(row, x))
            after(layer.mlp.linear_fc1, lambda x, y: see("pre_activation", row, y[..., -a.ffn_hidden_size :]))
            after(layer.mlp.linear_fc2, lambda x, y: see("down_projection_input", row, x))
            after(layer, lambda x, y: see_layer(row, x, y))

        for row, layer in enumerate(chunk.decoder.layers):
            read(row, layer)
        after(chunk.decoder.final_layernorm, lambda x, y: see("hidden", 2 * a.num_layers, y))
        case.sides["plain"]()

    def over_batch(axis: str, batch: str, sequence: str) -> torch.Tensor:
        rows = [values for (name, _, how), values in seen.items() if (name, how) == (axis, sequence)]
        return torch.stack([DEFINITIONS[batch](torch.cat(values)) for values in rows])

    found = {"layers": torch.stack([torch.cat(seen["layers", row, "mean"]).mean() for row in range(a.num_layers)])}
    for batch, sequence, site in itertools.product(DEFINITIONS, DEFINITIONS, SITES):
        name = f"variants/{batch}/{sequence}/{site}"
        found[f"{name}/hidden"] = over_batch("hidden", batch, sequence).sum(0)
        found |= {f"{name}/{axis}": over_batch(axis, batch, sequence) for axis in ("heads", "groups")}
        found[f"{name}/ffn"] = over_batch(site, batch, sequence)
    return found


def worst_difference(case: Case) -> dict[str, float]:
    """Largest difference of the menu's scores from those by definition, relative to an axis' largest: of all that has
    aggregations, and of the layers."""
    expected, scores = by_definition(case), case.sides["menu"]()
    worst, axes = {"width": 0.0, "layers": 0.0}, ("hidden", "ffn", "heads", "groups")
    each = {name: scores.variant(name) for name in (scores.primary, *scores.variants)}
    found = {f"variants/{name}/{axis}": getattr(of, axis) for name, of in each.items() for axis in axes}
    found["layers"] = scores.layers
    assert found.keys() == expected.keys(), "every score of the menu"
    for name, values in found.items():
        exact = expected[name].cpu().numpy()
        kind = "layers" if name == "layers" else "width"
        worst[kind] = max(worst[kind], float(abs(values - exact).max() / abs(exact).max()))
    return worst


def seconds_of(side: Callable[[], Any]) -> tuple[float, float]:
    """(seconds by the clock, seconds of processor time, which neighbours on a shared machine disturb less)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started, worked = time.perf_counter(), time.process_time()
    side()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - worked


def compare(case: Case) -> dict[str, Any]:
    """Times of one precision, each side's with those of the plain pass, and the scores' difference."""
    options = case.options
    different = worst_difference(case) if options.check else {}
    for side in case.sides.values():
        side()
    times: dict[str, list[float]] = {name: [] for name in case.sides}
    worked: dict[str, list[float]] = {name: [] for name in case.sides}
    for repeat in range(options.repeats):
        names = list(case.sides)
        for name in names if repeat % 2 == 0 else reversed(names):
            clock, processor = seconds_of(case.sides[name])
            times[name].append(clock)
            worked[name].append(processor)
    tokens = options.batches * options.micro_batch_size * options.sequence
    pairs = {name: sorted(a / b for a, b in zip(times[name], times["plain"], strict=True)) for name in LIMITS}
    return {
        "precision": case.precision,
        "tokens_per_second": {name: round(tokens / statistics.median(row), 1) for name, row in times.items()},
        "ratio": {
            name: round(statistics.median(times[name]) / statistics.median(times["plain"]), 4) for name in LIMITS
        },
        "ratio_of_pairs_median": {name: round(statistics.median(row), 4) for name, row in pairs.items()},
        "ratio_of_pairs_spread": {name: [round(row[0], 4), round(row[-1], 4)] for name, row in pairs.items()},
        "ratio_of_processor_time": {
            name: round(statistics.median(worked[name]) / statistics.median(worked["plain"]), 4) for name in LIMITS
        },
        "difference": different,
        "seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
    }


def tell(result: dict[str, Any]) -> bool:
    """Print a precision's lines; whether the scores are those by definition."""
    precision = result["precision"]
    for name, limit in LIMITS.items():
        limit = limit if precision == "fp32" or torch.cuda.is_available() else IN_BF16
        low, high = result["ratio_of_pairs_spread"][name]
        print(
            f"{precision} {name}: {result['ratio'][name]:.3f}x the time of a plain forward pass (pairs {low:.3f} to "
            f"{high:.3f}; aim: at most {limit:.2f}x), {result['tokens_per_second'][name]:.0f} tokens/s"
        )
    if not result["difference"]:
        return True
    width, layers = result["difference"]["width"], result["difference"]["layers"]
    print(f"{precision}: scores from those by definition: {width:.1e} of an axis' largest, of layers {layers:.1e}")
    return bool(width <= TOLERANCE[precision] and layers <= OF_LAYERS[precision])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "layers": (4, "layers"),
        "hidden": (1024, "hidden_size"),
        "ffn": (4096, "ffn_hidden_size"),
        "heads": (16, "num_attention_heads"),
        "groups": (4, "num_query_groups"),
        "sequence": (512, "tokens of a sample"),
        "micro-batch-size": (2, "samples of a microbatch"),
        "batches": (4, "microbatches of a pass"),
        "repeats": (5, "repeats, interleaved"),
        "threads": (len(os.sched_getaffinity(0)), "threads"),
        "check": (1, "1: compare the scores with those by definition"),
    }
    for name, (value, words) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words} ({value})")
    parser.add_argument("--family", default="llama")
    precisions = ["bf16"] if torch.cuda.is_available() else ["fp32", "bf16"]
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=precisions)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results, equal = {}, True
    for precision in options.precision:
        results[precision] = compare(Case(options, precision))
        equal = tell(results[precision]) and equal
    print(
        json.dumps(
            {"benchmark": "score", **vars(options), "limits": {**LIMITS, "bf16 on a CPU": IN_BF16}, "results": results}
        )
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
