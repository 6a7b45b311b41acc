"""The distillation engine on one GPU: Llama-3.1-8B teaches the 4B-width student, random weights, bf16.

    python benchmarks/kd_gpu.py                              32 layers if they fit, sequences of 4096 and 8192
    python benchmarks/kd_gpu.py --layers 8 --repeats 10 --only step
    python benchmarks/kd_gpu.py --small                      the same code at tiny shapes; without a GPU always so

step: tokens/s, MFU against the matrix rate that is measured first (aim: 50%) and against the maker's peak, the time by
parts, and peak memory against the forecast, which is of what is allocated for models and step alone.
loss: the logit loss alone, at 8192 tokens, over its four matrix products, two of each head (aim: at most 1.18 times
their time), and against Liger-Kernel's fused linear JSD (forward KL) where that is installed. Medians over repeats.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LLAMA = {
    "family": "llama",
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rotary_base": 500000.0,
}
TEACHER = {"hidden_size": 4096, "ffn_hidden_size": 14336}
STUDENT = {"hidden_size": 3072, "ffn_hidden_size": 9216}
SMALL: dict[str, dict[str, Any]] = {
    "shared": {**LLAMA, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16, "vocab_size": 1000},
    "teacher": {"hidden_size": 96, "ffn_hidden_size": 192},
    "student": {"hidden_size": 64, "ffn_hidden_size": 128},
}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Of `repeats` calls after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def matrix_rate(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    """FLOP/s of a square product."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, repeats)


class Step:
    """One distillation step over two microbatches, as the training loop makes it."""

    def __init__(self, options: argparse.Namespace, sequence: int, device: torch.device) -> None:
        from minitron_mcore.architecture import build_architecture
        from minitron_mcore.distillation.logits.settings import LossSettings
        from minitron_mcore.distillation.objective import Objective
        from minitron_mcore.distillation.teacher.ahead import Teacher
        from minitron_mcore.model.gpt import build_model
        from minitron_mcore.runtime.config import ParallelConfig
        from minitron_mcore.training.budget import plan_timetable
        from minitron_mcore.training.config import TrainConfig
        from minitron_mcore.training.step import build_optimizer, build_scheduler, wrap_model

        shared, wide, narrow = shapes(options)
        self.sequence, self.microbatches = sequence, 2
        self.teacher_architecture, self.architecture = (
            build_architecture({**shared, **widths, "num_layers": options.layers}) for widths in (wide, narrow)
        )
        layout = ParallelConfig()
        teacher = build_model(self.teacher_architecture, layout, options.precision, trainable=False)
        models = build_model(self.architecture, layout, options.precision)
        for model in (*teacher, *models):
            draw_weights(model)
        train = TrainConfig(
            tokens=10**9, lr=1e-5, min_lr=1e-5, lr_decay_style="constant", global_batch_size=self.microbatches
        )
        timetable = plan_timetable(train, sequence, "train")
        self.shape = timetable.at(0).shape
        self.chunks = wrap_model(models)
        self.optimizer = build_optimizer(self.chunks, train, options.precision)
        self.scheduler = build_scheduler(self.optimizer, train, timetable)
        self.objective = Objective(
            LossSettings(vocab_size=self.architecture.vocab_size, lm_weight=0.0, kd_weight=1.0),
            teacher=Teacher(teacher, self.teacher_architecture),
        )
        self.measure_parts(0)
        ids = torch.randint(0, self.architecture.vocab_size, (1, sequence + 1), device=device)
        from minitron_mcore.model.microbatch import Microbatch

        self.microbatch = Microbatch(
            ids[:, :-1].contiguous(),
            ids[:, 1:].contiguous(),
            torch.ones(1, sequence, device=device),
            torch.arange(sequence, device=device).unsqueeze(0),
        )

    def measure_parts(self, log_level: int) -> None:
        """From here on by the timers of that level; those of 2 wait for the device at every microbatch."""
        from minitron_mcore.training.accounting import StepTimers

        self.timers = StepTimers(log_level)
        self.timers.attach(self.chunks, self.optimizer, self.objective)

    def __call__(self) -> None:
        from minitron_mcore.training.step import Trained, train_step

        batch = [replace(self.microbatch) for _ in range(self.microbatches)]
        train_step(
            Trained(self.chunks, self.optimizer, self.scheduler), self.objective, self.shape, batch, self.timers.timers
        )

    @property
    def tokens(self) -> int:
        return self.microbatches * self.sequence

    @property
    def flops(self) -> float:
        """Of a step: the student's three passes and the teacher's one, heads and attention included."""
        student = self.architecture.training_flops_per_token(self.sequence)
        return self.tokens * (student + self.teacher_architecture.forward_flops_per_token(self.sequence))


def shapes(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(shared fields, the teacher's widths, the student's)."""
    return (SMALL["shared"], SMALL["teacher"], SMALL["student"]) if options.small else (LLAMA, TEACHER, STUDENT)


def draw_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)


def forecast_bytes(step: Step, precision: str, on_cpu: bool) -> dict[str, int]:
    """What the forecast says of this step on one rank, by part."""
    from minitron_mcore.estimate.forecast import forecast
    from minitron_mcore.estimate.model import Setting
    from minitron_mcore.runtime.config import ParallelConfig

    setting = Setting(
        student=step.architecture,
        parallel=ParallelConfig(),
        precision=precision,
        data_parallel=1,
        sequence_length=step.sequence,
        global_batch_size=step.microbatches,
        micro_batch_size=1,
        loss_chunk_tokens=None,
        on_cpu=on_cpu,
        teacher=step.teacher_architecture,
    )
    return forecast(setting).parts


def measure_step(options: argparse.Namespace, sequence: int, rate: float, device: torch.device) -> dict[str, Any]:
    """Tokens/s, MFU, memory and time by parts; too large for the device: says so."""
    from minitron_mcore.runtime.devices import peak_tflops
    from minitron_mcore.training.accounting import peak_memory, split

    is_cuda, before = torch.cuda.is_available(), 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        step = Step(options, sequence, device)
        seconds = median_seconds(step, options.repeats)
        peak = peak_memory() - before
        step.measure_parts(2)
        step()
        synchronize()
        step.timers.take()
        started = time.perf_counter()
        for _ in range(options.repeats):
            step()
        synchronize()
        whole = (time.perf_counter() - started) / options.repeats
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": " ".join(str(error).split())[:300]}
    spent = {name: value / options.repeats for name, value in step.timers.take().items()}
    parts = split(spent, whole, step.timers.log_level)
    expected = forecast_bytes(step, options.precision, not is_cuda)
    flops_per_second, maker = step.flops / seconds, peak_tflops(torch.cuda.get_device_name()) if is_cuda else None
    return {
        "tokens_per_second": round(step.tokens / seconds, 1),
        "mfu_of_measured_rate": round(flops_per_second / rate, 4),
        "mfu_of_makers_peak": round(flops_per_second / maker / 1e12, 4) if maker else None,
        "peak_memory_gib": round(peak / 2**30, 3),
        "forecast_gib": round(sum(expected.values()) / 2**30, 3),
        # A CPU process holds far more than tensors.
        "peak_over_forecast": round(peak / sum(expected.values()), 4) if is_cuda else None,
        "forecast_parts_gib": {name: round(value / 2**30, 3) for name, value in expected.items() if value},
        "milliseconds": round(1000 * seconds, 2),
        "milliseconds_timed_by_parts": round(1000 * whole, 2),
        "parts_milliseconds": {name: round(1000 * value, 2) for name, value in parts.items()},
        "parts_share": {name: round(value / whole, 4) for name, value in parts.items()},
    }


def measure_loss(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The loss with all its gradients against the four products it cannot do without, and against Liger-Kernel."""
    from minitron_mcore.distillation.logits.loss import Model, logit_loss
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.model.gpt import DTYPES

    shared, wide, _ = shapes(options)
    tokens, vocabulary, hidden = options.tokens, shared["vocab_size"], wide["hidden_size"]
    dtype = DTYPES[options.precision]
    student, teacher = (torch.randn(tokens, 1, hidden, device=device).to(dtype) for _ in range(2))
    heads = [(0.02 * torch.randn(vocabulary, hidden, device=device)).to(dtype) for _ in range(2)]
    student.requires_grad_()
    weight = torch.nn.Parameter(heads[0])
    weight.main_grad = torch.zeros(vocabulary, hidden, device=device)  # type: ignore[attr-defined]
    labels = torch.randint(0, vocabulary, (tokens, 1), device=device)
    mask = torch.ones(tokens, 1, device=device)

    def ours() -> None:
        output = logit_loss(
            student,
            weight,
            labels,
            mask,
            LossSettings(vocab_size=vocabulary, lm_weight=0.0, kd_weight=1.0),
            tp_group=None,
            teacher=Model(teacher, heads[1]),
        )
        output.loss.backward()
        student.grad = None

    rows = max(1, tokens // 8)

    def products() -> None:
        for start in range(0, tokens, rows):
            left = student.detach()[start : start + rows, 0]
            logits = left @ heads[0].t()
            teacher[start : start + rows, 0] @ heads[1].t()
            logits @ heads[0]
            logits.t() @ left

    result = {"ours": median_seconds(ours, options.repeats), "products": median_seconds(products, options.repeats)}
    if importlib.util.find_spec("liger_kernel") and torch.cuda.is_available():
        from liger_kernel.transformers import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=0.0)
        flat = student.detach().flatten(0, 1).requires_grad_()

        def liger() -> None:
            fused(flat, weight, teacher.flatten(0, 1), heads[1], labels.flatten()).backward()
            flat.grad = weight.grad = None

        result["liger"] = median_seconds(liger, options.repeats)
    return {
        "milliseconds": {name: round(1000 * value, 3) for name, value in result.items()},
        "over_the_products": round(result["ours"] / result["products"], 4),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="num_layers of both (32; 2 with --small)")
    parser.add_argument("--sequences", type=int, nargs="+", help="tokens of a sample (4096 8192; 64 with --small)")
    parser.add_argument("--tokens", type=int, help="tokens of the loss alone (8192; 256 with --small)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--only", choices=("loss", "step"), help="one of the two")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a machine without a GPU")
    options = parser.parse_args()
    options.small = options.small or not torch.cuda.is_available()
    options.layers = options.layers or (2 if options.small else 32)
    options.sequences = options.sequences or ([64] if options.small else [4096, 8192])
    options.tokens = options.tokens or (256 if options.small else 8192)
    return options


def main() -> None:
    from minitron_mcore.model.gpt import DTYPES
    from minitron_mcore.runtime.config import ParallelConfig
    from minitron_mcore.runtime.parallel import seed_everything, use_layout
    from minitron_mcore.runtime.start import start

    options = parse()
    runtime = start()
    use_layout(ParallelConfig(), runtime.world_size)
    seed_everything(1)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rate = matrix_rate(256 if options.small else 8192, DTYPES[options.precision], runtime.device, options.repeats)
    print(f"{name}: {rate / 1e12:.3f} TFLOP/s in {options.precision} products")
    told: list[str] = []
    facts: dict[str, Any] = {"device": name, "matrix_tflops": round(rate / 1e12, 3)}
    if options.only != "step":
        loss = facts["loss"] = measure_loss(options, runtime.device)
        told.append(f"loss {loss['over_the_products']:.2f}x its products (aim: 1.18x)")
        print(f"{told[-1]}, {loss['milliseconds']} ms", flush=True)
    steps = facts["steps"] = {}
    for sequence in options.sequences if options.only != "loss" else ():
        steps[sequence] = measure_step(options, sequence, rate, runtime.device)
        told.append(f"step at {sequence}: {words_of(steps[sequence])}")
        print(f"{told[-1]}\n{steps[sequence]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps({"benchmark": "kd_gpu", "summary": "; ".join(told), **vars(options), **facts}))


def words_of(step: dict[str, Any]) -> str:
    """A step's figures in a line."""
    if "out_of_memory" in step:
        return f"out of memory ({step['out_of_memory']})"
    ratio = step["peak_over_forecast"]
    memory = f"{ratio:.3f} of its forecast" if ratio else "not compared with a forecast on CPU"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in step["parts_share"].items() if share >= 0.005)
    return (
        f"{step['tokens_per_second']:,.0f} tokens/s, MFU {step['mfu_of_measured_rate']:.0%} of the measured rate (aim: "
        f"50%), peak memory {step['peak_memory_gib']} GiB, {memory}; {shares}"
    )


if __name__ == "__main__":
    main()
