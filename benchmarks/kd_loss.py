"""The distillation loss against NVIDIA ModelOpt's on the same tensors: extra memory, time, gradients.

    python benchmarks/kd_loss.py                             forward KL, TP 1 and 2, vocabulary 128256, fp32 on the CPU
    python benchmarks/kd_loss.py --tp 2 --vocabulary 128256 256000 --reverse
    python benchmarks/kd_loss.py --tp 1 2 4 --memory         the memory of ours alone

Three things are compared, each side in processes of its own where it matters, and ours always at one chunk size:

memory      peak above inputs, outputs and their gradients (the heads' main_grad among them), in bytes for each (token x
            local vocabulary entry). All of these are allocated and touched before, but for the hidden states' gradient,
            which is subtracted. Both sides start from hidden states and both heads. A fresh process for each side; the
            kernel's own high-water mark of resident memory. Ours also for the other direction of the divergence, and
            with what is reported besides.
divergence  time of the divergence and its gradient in the logits alone, from logits that are there already.
whole       time from hidden states and heads to the loss and the gradients of student hidden states and head: the
            output-head products count on both sides.

Repeats are interleaved, each side as often first as second, and medians are compared; the lowest and highest ratio of a
repeat are told too. Gradients of hidden states and head are compared in the same run; the figures do not count where
they differ by more than 1e-4. Needs nvidia-modelopt (a development requirement). Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LIMITS = {"extra bytes": 0.55, "divergence": 0.07, "whole": 0.33, "gradient": 1e-4}


class Problem:
    """Hidden states and heads of both models, the gradients' memory, all touched; one rank's shard of the heads."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        generator = torch.Generator().manual_seed(1)
        tokens, rows = options.tokens, options.vocabulary // options.tp

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=generator) * scale

        self.hidden = normal(tokens, 1, options.hidden).requires_grad_()
        self.teacher_hidden = normal(tokens, 1, options.teacher_hidden)
        self.labels = torch.randint(options.vocabulary, (tokens, 1), generator=generator)
        self.mask = torch.ones(tokens, 1)
        generator.manual_seed(2 + rank)
        # Logits of standard deviation 2, as of trained models.
        self.weight = normal(rows, options.hidden, scale=2 * options.hidden**-0.5).requires_grad_()
        self.teacher_weight = normal(rows, options.teacher_hidden, scale=2 * options.teacher_hidden**-0.5)
        self.hidden.grad = torch.zeros_like(self.hidden)
        self.vocabulary, self.tp, self.reverse = options.vocabulary, options.tp, options.reverse
        self.chunk = options.chunk or None


def ours(problem: Problem, options: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    from megatron.core import parallel_state

    from minitron_mcore.distillation.config import default_chunk_tokens
    from minitron_mcore.distillation.logits.chunk import losses_and_gradient
    from minitron_mcore.distillation.logits.loss import Model, logit_loss
    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.model.vocab_parallel import VocabularyShard

    group = parallel_state.get_tensor_model_parallel_group()
    problem.weight.main_grad = torch.zeros_like(problem.weight, requires_grad=False)  # type: ignore[attr-defined]
    settings = LossSettings(
        problem.vocabulary,
        lm_weight=0.0,
        kd_weight=1.0,
        divergence="reverse_kl" if problem.reverse else "forward_kl",
        report=options.report,
        chunk_tokens=problem.chunk,
    )
    shard = VocabularyShard.of(problem.weight.shape[0], problem.vocabulary, group)

    def whole() -> Tensor:
        teacher = Model(problem.teacher_hidden, problem.teacher_weight)
        output = logit_loss(
            problem.hidden, problem.weight, problem.labels, problem.mask, settings, tp_group=group, teacher=teacher
        )
        output.loss.backward()
        return output.sums["kd"]

    def divergence(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        """Logits of one chunk, overwritten."""
        losses_and_gradient(student, teacher, labels, settings, shard, True)

    return {
        "whole": whole,
        "divergence": divergence,
        "chunk": lambda: problem.chunk or default_chunk_tokens(problem.mask.numel()),
    }


def theirs(problem: Problem, options: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
    from megatron.core.transformer import TransformerConfig
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=8, tensor_model_parallel_size=problem.tp
    )
    loss = LogitsKLLoss(config, reverse=problem.reverse)

    def whole() -> Tensor:
        hidden = problem.hidden
        if problem.tp > 1:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        student = torch.nn.functional.linear(hidden, problem.weight)
        with torch.no_grad():
            teacher = torch.nn.functional.linear(problem.teacher_hidden, problem.teacher_weight)
        total = loss(student, teacher)[0].sum()
        total.backward()
        total = total.detach()
        if problem.tp > 1:  # its values are this shard's part: their training loop adds them up
            torch.distributed.all_reduce(total)
        return total

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        student.requires_grad_()
        loss(student, teacher)[0].sum().backward()
        assert student.grad is not None
        return student.grad

    return {"whole": whole, "divergence": divergence}


def high_water() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak_above(run: Callable[[], Any]) -> int:
    """Bytes of resident memory that `run` takes at its height above what is resident before it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = high_water()
    run()
    return high_water() - before


def warm_up(side: str, options: argparse.Namespace) -> None:
    """One run at a tiny size: libraries loaded, threads started, so that these are not taken for the loss's memory."""
    small = argparse.Namespace(**vars(options) | {"tokens": 8, "vocabulary": 64 * options.tp, "chunk": 0})
    problem = Problem(small, 0)
    problem.weight.grad = torch.zeros_like(problem.weight)
    (ours if side == "ours" else theirs)(problem, small)["whole"]()


def measure_memory(side: str, options: argparse.Namespace, rank: int) -> dict[str, Any]:
    warm_up(side, options)
    problem = Problem(options, rank)
    if side == "theirs":
        problem.weight.grad = torch.zeros_like(problem.weight)
    problem.hidden.grad = None
    run = (ours if side == "ours" else theirs)(problem, options)["whole"]
    torch.distributed.barrier()
    extra = peak_above(run) - problem.hidden.nbytes
    return {"extra_bytes": extra / (options.tokens * options.vocabulary / options.tp)}


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds until the last rank is done, and what `run` gave."""
    torch.distributed.barrier()
    started = time.perf_counter()
    result = run(*arguments)
    torch.distributed.barrier()
    return time.perf_counter() - started, result


def divergence_seconds(
    mine: dict[str, Callable[..., Any]], other: dict[str, Callable[..., Any]], problem: Problem, repeat: int
) -> dict[str, float]:
    """Both sides once from the same logits. Ours gets them by chunks, as the sweep hands them over."""
    with torch.no_grad():
        student = torch.nn.functional.linear(problem.hidden.detach(), problem.weight.detach())
        teacher = torch.nn.functional.linear(problem.teacher_hidden, problem.teacher_weight)
    chunk, spent = mine["chunk"](), {"ours": 0.0, "theirs": 0.0}

    def measure_theirs() -> None:
        spent["theirs"], _ = timed(other["divergence"], student.detach(), teacher)

    def measure_ours() -> None:
        buffers = torch.empty(2, chunk, student.shape[-1])
        buffers.zero_()  # the sweep allocates them once, for all chunks
        for start in range(0, student.shape[0], chunk):
            rows = slice(start, start + chunk)
            x, y = (buffer[: student[rows].shape[0]] for buffer in buffers)
            x.copy_(student[rows, 0])
            y.copy_(teacher[rows, 0])
            seconds, _ = timed(mine["divergence"], x, y, problem.labels[rows, 0])
            spent["ours"] += seconds

    for measure in (measure_ours, measure_theirs) if repeat % 2 == 0 else (measure_theirs, measure_ours):
        measure()
    return spent


def measure_time(options: argparse.Namespace, rank: int) -> dict[str, Any]:
    warm_up("ours", options)
    warm_up("theirs", options)
    problem = Problem(options, rank)
    mine, other = ours(problem, options), theirs(problem, options)
    spent: dict[str, dict[str, list[float]]] = {}
    found: dict[str, tuple[Tensor, list[Tensor]]] = {}
    main_grad = problem.weight.main_grad  # type: ignore[attr-defined]
    for repeat in range(options.repeats):
        for name in ("ours", "theirs") if repeat % 2 == 0 else ("theirs", "ours"):
            problem.hidden.grad.zero_()  # type: ignore[union-attr]
            main_grad.zero_()
            # One memory for both sides' gradient of the head.
            problem.weight.grad = main_grad if name == "theirs" else None
            if name == "ours":
                problem.weight.main_grad = main_grad  # type: ignore[attr-defined]
            seconds, value = timed((mine if name == "ours" else other)["whole"])
            spent.setdefault("whole", {}).setdefault(name, []).append(seconds)
            if repeat == 0:
                found[name] = (value.detach(), [problem.hidden.grad.clone(), main_grad.clone()])  # type: ignore
        problem.weight.grad = None
    for repeat in range(options.repeats):
        for name, seconds in divergence_seconds(mine, other, problem, repeat).items():
            spent.setdefault("divergence", {}).setdefault(name, []).append(seconds)
    (value, gradients), (their_value, their_gradients) = found["ours"], found["theirs"]
    # A gradient off by a whole factor everywhere is reported as that factor besides.
    factor = [((a * b).sum() / (b * b).sum()).item() for a, b in zip(gradients, their_gradients, strict=True)]
    error = [((a - b).norm() / a.norm()).item() for a, b in zip(gradients, their_gradients, strict=True)]
    return {
        "seconds": spent,
        "gradient_difference": error,
        "gradient_factor": factor,
        "values": [value.item(), their_value.item()],
        "chunk_tokens": mine["chunk"](),
    }


def worker(options: argparse.Namespace) -> None:
    from megatron.core import parallel_state

    torch.set_num_threads(options.threads)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=options.tp)
    rank = torch.distributed.get_rank()
    kind, _, side = options.worker.partition(":")
    result = measure_time(options, rank) if kind == "time" else measure_memory(side, options, rank)
    gathered: list[Any] = [None] * options.tp
    torch.distributed.all_gather_object(gathered, result)
    if rank == 0:
        print("RESULT " + json.dumps(gathered), flush=True)
    torch.distributed.destroy_process_group()


def launch(work: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Each rank's result of `work` in fresh processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--worker", work]
    for name, value in settings.items():
        command += (
            [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]) if value is not False else []
        )
    processes = []
    for rank in range(settings["tp"]):
        distributed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(settings["tp"])}
        environment = os.environ | distributed | {"RANK": str(rank), "OMP_NUM_THREADS": str(settings["threads"])}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    lines = [line for line in outputs[0].splitlines() if line.startswith("RESULT ")]
    if not lines or any(process.returncode for process in processes):
        raise SystemExit(f"kd_loss: {work} with {settings} ended with {[p.returncode for p in processes]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def compare(settings: dict[str, Any]) -> dict[str, Any]:
    """One layout and vocabulary: the worst rank's memory, the slowest rank's medians."""

    def extra(side: str, **changes: bool) -> float:
        return round(max(rank["extra_bytes"] for rank in launch(f"memory:{side}", settings | changes)), 3)

    menu = {
        f"{'reverse' if reverse else 'forward'} KL{', reported' if report else ''}": {
            "reverse": reverse,
            "report": report,
        }
        for reverse in (False, True)
        for report in (False, True)
    }
    ours_of = {name: extra("ours", **changes) for name, changes in menu.items()}
    told = f"TP {settings['tp']}, vocabulary {settings['vocabulary']}: extra bytes "
    told += ", ".join(f"{name} {value}" for name, value in ours_of.items())
    if settings["memory"]:
        print(f"{told} (at most {LIMITS['extra bytes']})", flush=True)
        extra_bytes = {"ours": max(ours_of.values()), "menu": ours_of}
        return {"tp": settings["tp"], "vocabulary": settings["vocabulary"], "extra_bytes": extra_bytes}
    theirs_extra = extra("theirs")
    print(f"{told} against {theirs_extra}", flush=True)
    ranks = launch("time", settings)
    seconds: dict[str, dict[str, list[float]]] = {}
    for what in ("divergence", "whole"):
        for side in ("ours", "theirs"):
            slowest = max((rank["seconds"][what][side] for rank in ranks), key=statistics.median)
            seconds.setdefault(what, {})[side] = [round(value, 4) for value in slowest]
    return {
        "tp": settings["tp"],
        "vocabulary": settings["vocabulary"],
        "chunk_tokens": ranks[0]["chunk_tokens"],
        "extra_bytes": {"ours": max(ours_of.values()), "theirs": theirs_extra, "menu": ours_of},
        "ratio": {
            what: round(statistics.median(of["ours"]) / statistics.median(of["theirs"]), 4)
            for what, of in seconds.items()
        },
        "spread": {
            what: [round(end(a / b for a, b in zip(of["ours"], of["theirs"], strict=True)), 4) for end in (min, max)]
            for what, of in seconds.items()
        },
        "gradient_difference": max(max(rank["gradient_difference"]) for rank in ranks),
        "gradient_factor": ranks[0]["gradient_factor"],
        "values": ranks[0]["values"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512, help="of the student (512)")
    parser.add_argument("--teacher-hidden", type=int, default=512, help="of the teacher (512)")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[128256])
    parser.add_argument(
        "--tp", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes, one process a rank (1 and 2)"
    )
    parser.add_argument("--chunk", type=int, default=0, help="tokens whose logits exist at a time; 0: the default")
    parser.add_argument("--repeats", type=int, default=6, help="interleaved (6)")
    parser.add_argument("--reverse", action="store_true", help="reverse KL in place of forward")
    parser.add_argument("--report", action="store_true", help="ours with teacher's loss and agreement besides")
    parser.add_argument("--memory", action="store_true", help="only ours, and only its memory")
    parser.add_argument("--threads", type=int, default=0, help="of a process; 0: all processors over the ranks")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        options.tp, options.vocabulary = options.tp[0], options.vocabulary[0]
        worker(options)
        return
    results = []
    for tp in options.tp:
        for vocabulary in options.vocabulary:
            threads = options.threads or max(1, len(os.sched_getaffinity(0)) // tp)
            settings = vars(options) | {"tp": tp, "vocabulary": vocabulary, "threads": threads}
            settings.pop("worker")
            results.append(compare(settings))
            if not options.memory:
                show(results[-1])
    print(json.dumps({"benchmark": "kd_loss", **vars(options), "limits": LIMITS, "results": results}))


def show(result: dict[str, Any]) -> None:
    extra, ratio, spread = result["extra_bytes"], result["ratio"], result["spread"]
    times = {of: f"{ratio[of]:.3f}x, {spread[of][0]:.3f} to {spread[of][1]:.3f} (at most {LIMITS[of]})" for of in ratio}
    print(
        f"TP {result['tp']}, vocabulary {result['vocabulary']}, chunks of {result['chunk_tokens']}: extra bytes "
        f"{extra['ours']:.3f} against {extra['theirs']:.2f} (at most {LIMITS['extra bytes']}); time of the divergence "
        f"{times['divergence']}, with the heads' products {times['whole']}; gradients differ by "
        f"{result['gradient_difference']:.1e} (at most {LIMITS['gradient']})",
        flush=True,
    )


if __name__ == "__main__":
    main()
