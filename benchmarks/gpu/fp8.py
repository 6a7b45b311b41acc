"""A student that trains in fp8 against the same one in bf16: losses, going on in the other type, time and memory.

    python benchmarks/gpu/fp8.py             every recipe that GPU and Transformer Engine have
    python benchmarks/gpu/fp8.py --small     tiny shapes; without Transformer Engine bf16 against fp32 stands in

numerics: the same weights and batches, ten distillation steps with the next-token loss beside. Against bf16's: both
losses of every step within 2%, the first gradient norm within 10%: fp8 has 3 bits of mantissa, and DeepSeek-V3's
training in it, of far more steps, stayed within 0.25% of bf16's loss (arXiv 2412.19437, section 3.3). Then a checkpoint
of the fp8 run goes on in bf16 and one of bf16's in fp8: the next loss within 2% of the run's own.
time: two microbatches of 4096 tokens of 8 layers of Llama-3.1's 4B-width student under its 8B teacher: the step over
bf16's, and the peak of memory over the forecast; medians, interleaved. No bound: it is what is to be known.

Exit code 77 where Transformer Engine is not installed or the GPU has no fp8, so that nothing of it was shown. Ends with
one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BOUNDS = {"losses": 0.02, "gradient norm": 0.10, "goes on": 0.02}
SKIPPED, STEPS = 77, 10
HEADS = {"num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128, "max_position_embeddings": 8192}
TIMED = {**HEADS, "num_layers": 8, "hidden_size": 3072, "ffn_hidden_size": 9216, "vocab_size": 128256}
NUMERICS = {**HEADS, "num_layers": 4, "hidden_size": 1024, "ffn_hidden_size": 2816, "vocab_size": 32000}
NUMERICS |= {"num_attention_heads": 8, "num_query_groups": 4}
SMALL = {**NUMERICS, "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": 1000}
SMALL |= {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16}
WIDER = {3072: (4096, 14336), 1024: (1536, 4096), 64: (96, 192)}  # the teacher's widths, by the student's
# Name -> keys of a training section.
VARIANTS: dict[str, dict[str, Any]] = {
    "tensorwise": {"fp8_format": "hybrid"},
    "tensorwise, ends in bf16": {"fp8_format": "hybrid", "first_last_layers_bf16": True},
    "delayed": {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
    "blockwise": {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
    "bf16, narrow Adam": {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
}


class Run:
    """A student and its teacher, of weights that are the same in every run of their shapes."""

    def __init__(self, fields: dict[str, Any], keys: dict[str, Any], precision: str, sequence: int) -> None:
        from minitron_mcore.architecture import build_architecture
        from minitron_mcore.distillation.logits.settings import LossSettings
        from minitron_mcore.distillation.objective import Objective
        from minitron_mcore.distillation.teacher.ahead import Teacher
        from minitron_mcore.model.fp8 import passes_of
        from minitron_mcore.model.gpt import build_model
        from minitron_mcore.runtime.config import ParallelConfig
        from minitron_mcore.training.budget import plan_timetable
        from minitron_mcore.training.config import TrainConfig
        from minitron_mcore.training.step import Trained

        wide, ffn = WIDER[fields["hidden_size"]]
        self.architecture = build_architecture({"family": "llama", **fields})
        self.teachers = self.architecture.replace(hidden_size=wide, ffn_hidden_size=ffn)
        self.train = TrainConfig(
            tokens=10**9, lr=1e-4, min_lr=1e-4, lr_decay_style="constant", global_batch_size=2, **keys
        )
        layout, self.sequence = ParallelConfig(), sequence
        teacher = build_model(self.teachers, layout, precision, trainable=False)
        models = build_model(self.architecture, layout, precision, **passes_of(self.train))
        for model in (*teacher, *models):
            draw_weights(model)
        timetable = plan_timetable(self.train, sequence, "train")
        self.shape = timetable.at(0).shape
        self.trained = Trained.of(models, self.train, timetable)
        settings = LossSettings(vocab_size=self.architecture.vocab_size, lm_weight=1.0, kd_weight=1.0)
        self.objective = Objective(settings, teacher=Teacher(teacher, self.teachers))

    def step(self, number: int) -> dict[str, float]:
        from minitron_mcore.model.microbatch import Microbatch
        from minitron_mcore.training.step import train_step

        generator, device = torch.Generator().manual_seed(number), torch.cuda.current_device()
        batch = []
        for _ in range(2):
            # Few ids of the vocabulary, so that ten steps learn something.
            ids = torch.randint(0, 300, (1, self.sequence + 1), generator=generator).to(device)
            places = torch.arange(self.sequence, device=device).unsqueeze(0)
            mask = torch.ones(1, self.sequence, device=device)
            batch.append(Microbatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask, places))
        return train_step(self.trained, self.objective, self.shape, batch)


def draw_weights(model: torch.nn.Module) -> None:
    generator = torch.Generator(torch.cuda.current_device()).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)


LOSSES = ("lm loss", "logits distillation loss")


def numerics(fields: dict[str, Any], variants: dict[str, dict[str, Any]], base: str, other: str) -> dict[str, Any]:
    """By variant, how far its figures are from those of a run in `base`; `other`: the precision of the variants."""
    from minitron_mcore.checkpoint.store import load_training_state, save_state, training_state
    from minitron_mcore.runtime.start import start

    sequence = 64 if fields is SMALL else 512
    found: dict[str, Any] = {}
    plain = Run(fields, {}, base, sequence)
    expected = [plain.step(number) for number in range(STEPS)]
    with tempfile.TemporaryDirectory() as place:

        def save(run: Run, name: str) -> None:
            state = training_state(*run.trained, {"iteration": STEPS}, is_loading=False)
            save_state(Path(place) / name, STEPS, state, start(), run.architecture)

        def next_loss(name: str, run: Run) -> float:
            load_training_state(Path(place) / name, STEPS, *run.trained)
            return run.step(STEPS)["lm loss"]

        save(plain, "plain")
        plain_next = plain.step(STEPS)["lm loss"]
        for name, keys in variants.items():
            run = Run(fields, keys, other, sequence)
            rows = [run.step(number) for number in range(STEPS)]
            errors = {
                "losses": max(
                    relative(row[loss], wanted[loss])
                    for row, wanted in zip(rows, expected, strict=True)
                    for loss in LOSSES
                ),
                "gradient norm": relative(rows[0]["grad-norm"], expected[0]["grad-norm"]),
            }
            folder = name.replace(" ", "-")
            save(run, folder)
            own_next = run.step(STEPS)["lm loss"]
            del run
            there = relative(next_loss(folder, Run(fields, {}, base, sequence)), own_next)
            back = relative(next_loss("plain", Run(fields, keys, other, sequence)), plain_next)
            errors["goes on"] = max(there, back)
            found[name] = {"errors": errors, "falls": rows[-1]["lm loss"] < rows[0]["lm loss"]}
            release()
    return found


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def timed(fields: dict[str, Any], variants: dict[str, dict[str, Any]], precision: str, repeats: int) -> dict[str, Any]:
    """By variant, and of bf16 beside: seconds of a step, and the peak of memory over the forecast."""
    sequence = 64 if fields is SMALL else 4096
    found: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    runs: dict[str, dict[str, Any]] = {"bf16": {}, **variants}
    for turn in range(repeats):
        for name, keys in runs.items():
            # One at a time: two such students do not lie beside each other on every device.
            release()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run = Run(fields, keys, precision, sequence)
            run.step(0)
            torch.cuda.synchronize()
            started = time.perf_counter()
            run.step(1)
            run.step(2)
            torch.cuda.synchronize()
            seconds.setdefault(name, []).append((time.perf_counter() - started) / 2)
            if turn == 0:
                peak, forecast = torch.cuda.max_memory_allocated() - before, forecast_bytes(run)
                found[name] = {"peak_gib": peak / 2**30, "forecast_gib": forecast / 2**30}
            del run
    plain = statistics.median(seconds["bf16"])
    for name, row in found.items():
        row |= {
            "milliseconds": 1000 * statistics.median(seconds[name]),
            "spread": max(seconds[name]) / min(seconds[name]),
        }
        row["of_bf16"] = statistics.median(seconds[name]) / plain
    return found


def forecast_bytes(run: Run) -> int:
    from minitron_mcore.estimate.forecast import forecast
    from minitron_mcore.estimate.model import Setting
    from minitron_mcore.model.fp8 import fp8_of
    from minitron_mcore.runtime.config import ParallelConfig
    from minitron_mcore.training.adam_state import AdamState

    setting = Setting(run.architecture, ParallelConfig(), "bf16", 1, run.sequence, 2, 1, None, teacher=run.teachers)
    setting = replace(setting, on_cpu=not torch.cuda.is_available())
    return forecast(replace(setting, fp8=fp8_of(run.train), adam=AdamState.of(run.train))).total


def possible(variants: dict[str, dict[str, Any]], runtime: Any) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Those of `variants` that can be had here; and why the others cannot."""
    from minitron_mcore.architecture import build_architecture
    from minitron_mcore.errors import InputError
    from minitron_mcore.jobs.narrow import check_narrow
    from minitron_mcore.recipe import Recipe
    from minitron_mcore.runtime.start import measured_world
    from minitron_mcore.training.budget import plan_timetable
    from minitron_mcore.training.config import TrainConfig

    world, why = measured_world(runtime), {}
    shape = build_architecture({"family": "llama", **NUMERICS})
    for name, keys in variants.items():
        recipe = Recipe(precision="bf16", train=TrainConfig(tokens=10**6, **keys))
        try:
            check_narrow(recipe, "train", shape, world, plan_timetable(recipe.train, 512, "train"))
        except InputError as error:
            why[name] = str(error)
    return {name: keys for name, keys in variants.items() if name not in why}, why


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a machine without a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    from minitron_mcore.runtime.config import ParallelConfig
    from minitron_mcore.runtime.parallel import seed_everything, use_layout
    from minitron_mcore.runtime.start import start

    runtime = start()
    use_layout(ParallelConfig(), runtime.world_size)
    seed_everything(1)
    small = options.small or not torch.cuda.is_available()
    variants, why = possible(VARIANTS, runtime)
    for reason in dict.fromkeys(why.values()):
        print(f"not shown: {reason}", flush=True)
    there = bool(variants)
    shown = variants or {"stand-in": {}}
    found = numerics(SMALL if small else NUMERICS, shown, "bf16" if there else "fp32", "bf16")
    times = timed(SMALL if small else TIMED, variants, "bf16", options.repeats) if there else {}
    bad = [
        f"{name}: {kind} off by {error:.1e}, bound {BOUNDS[kind]}"
        for name, row in found.items()
        for kind, error in row["errors"].items()
        if not error <= BOUNDS[kind]
    ]
    bad += [f"{name}: the loss does not fall" for name, row in found.items() if not row["falls"]]
    told = "; ".join(
        f"{name}: losses off by {row['errors']['losses']:.1e}"
        + (f", step {times[name]['of_bf16']:.2f}x bf16's" if name in times else "")
        for name, row in found.items()
    )
    summary = told if there else f"{next(iter(why.values()))}; bf16 against fp32 stands in: {told}"
    facts = {"summary": summary, "small": small, "numerics": found, "times": times, "not_shown": why, "bad": bad}
    print(json.dumps({"benchmark": "gpu_fp8", **facts}))
    return 1 if bad else 0 if there else SKIPPED


if __name__ == "__main__":
    sys.exit(main())
