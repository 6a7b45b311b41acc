"""Published runs, estimated, beside what was published: tokens a second of pretraining, GPU-hours of distillations, one
loss, and the speed of the papers' students.

    python benchmarks/published.py

Everything is worked out with the defaults of estimate/ and the table of devices; nothing is fitted to a line. What a
source does not say is marked in its row. Ends with one JSON line.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minitron_mcore.architecture import Architecture, build_architecture  # noqa: E402
from minitron_mcore.estimate.config import ServingConfig  # noqa: E402
from minitron_mcore.estimate.model import Setting  # noqa: E402
from minitron_mcore.estimate.operations import Pass, loss_seconds  # noqa: E402
from minitron_mcore.estimate.roofline import serving_figures  # noqa: E402
from minitron_mcore.estimate.step_time import StepTime, step_time  # noqa: E402
from minitron_mcore.model.fp8 import Fp8  # noqa: E402
from minitron_mcore.model.recompute import Recompute  # noqa: E402
from minitron_mcore.runtime.config import ClusterConfig, ParallelConfig  # noqa: E402
from minitron_mcore.runtime.devices import machine_of  # noqa: E402
from minitron_mcore.tables import table  # noqa: E402

_LLAMA = {"num_query_groups": 8, "kv_channels": 128, "vocab_size": 128256}
_QWEN: dict[str, Any] = {"family": "qwen3", "num_query_groups": 8, "kv_channels": 128, "vocab_size": 151936}


def shape(layers: int, hidden: int, ffn: int, heads: int, **fields: Any) -> Architecture:
    sizes = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads}
    return build_architecture({**_LLAMA, **sizes, **fields})


LLAMA_8B = shape(32, 4096, 14336, 32)
LLAMA_70B, LLAMA_405B = shape(80, 8192, 28672, 64), shape(126, 16384, 53248, 128)
WIDTH, DEPTH = LLAMA_8B.replace(hidden_size=3072, ffn_hidden_size=9216), LLAMA_8B.replace(num_layers=16)
QWEN_8B, QWEN_6B = shape(36, 4096, 12288, 32, **_QWEN), shape(30, 3584, 11776, 32, **_QWEN)
# Hybrids of Mamba, attention and MLP, as dense models of their hidden size, depth, vocabulary and parameters.
NANO: dict[str, Any] = {"family": "nemotron", "num_query_groups": 8, "kv_channels": 128, "vocab_size": 131072}
NANO_9B, NANO_7B = shape(28, 4480, 23552, 40, **NANO), shape(25, 4096, 21504, 40, **NANO)


@dataclass(frozen=True)
class Run:
    """A published training. tokens: a second on each GPU. why: what explains the difference."""

    name: str
    source: str
    tokens: float
    device: str
    gpus: int
    student: Architecture
    precision: str
    batch: int
    why: str
    micro: int = 1
    length: int = 8192
    parallel: tuple[Any, ...] = ()  # fields of ParallelConfig, in order
    recompute: str = ""
    teacher: Architecture | None = None
    cluster: dict[str, Any] = field(default_factory=dict)

    def time(self) -> StepTime:
        parallel = ParallelConfig(*self.parallel)
        setting = Setting(
            student=self.student,
            parallel=parallel,
            precision="bf16" if self.precision == "fp8" else self.precision,
            fp8=Fp8() if self.precision == "fp8" else None,
            data_parallel=self.gpus // parallel.replica_ranks,
            sequence_length=self.length,
            global_batch_size=self.batch,
            micro_batch_size=self.micro,
            loss_chunk_tokens=None,
            recompute=Recompute(self.recompute),
            teacher=self.teacher,
        )
        return step_time(setting, machine_of(ClusterConfig(device=self.device, **self.cluster)))


_BRIDGE, _TITAN, _OPTIMIZER = "Megatron-Bridge 25.11", "torchtitan 2024-12", "Model-Optimizer"
_500W = {"memory_bandwidth": 2400.0}
_KEPT = "weights are gathered and parts of layers run again otherwise than here"
_PEER = (
    "the peer holds whole fp32 logits of both models, runs the teacher inside each microbatch, and its hours include"
)
RUNS = (
    Run("Llama-3 8B, FP8, 8 H100", _BRIDGE, 14451, "H100", 8, LLAMA_8B, "fp8", 128, "nothing to explain"),
    Run(
        *("Llama-3 8B, FP8, 8 B200", _BRIDGE, 30624, "B200", 8, LLAMA_8B, "fp8", 128),
        "nobody's measured products are in the table: 0.7 of the peak is assumed",
        micro=2,
    ),
    Run(
        *("Llama-3 8B, FP8, 8 GB200", _BRIDGE, 31508, "GB200", 8, LLAMA_8B, "fp8", 128),
        "as B200; what was published grows by 3% where the peak grows by 11%",
        micro=2,
    ),
    Run(
        *("Llama-3 70B, FP8, 64 H100", _BRIDGE, 1602, "H100", 64, LLAMA_70B, "fp8", 128),
        "nothing to explain",
        parallel=(4, 8, 5, 1, True),
    ),
    Run(
        *("Llama-3.1 405B, FP8, 1,024 H100", _BRIDGE, 292, "H100", 1024, LLAMA_405B, "fp8", 512),
        "stragglers among 1,024 GPUs are not counted",
        parallel=(8, 8, 8, 2, True),
    ),
    Run(
        *("Qwen3 8B, BF16, 16 H200", "awsome-distributed-ai#1138", 10125, "H200", 16, QWEN_8B, "bf16", 128),
        "little is said of the settings, and the network is not the one of DGX systems",
        micro=2,
        length=4096,
    ),
    Run(
        *("Llama-3.1 8B, BF16, 8 H100", _TITAN, 6667, "H100", 8, LLAMA_8B, "bf16", 16),
        f"GPUs at 500 of 700 W, which is 0.71 of the power; {_KEPT}",
        micro=2,
        recompute="selective",
        cluster=_500W,
    ),
    Run(
        *("Llama-3.1 8B, FP8, 8 H100", _TITAN, 8532, "H100", 8, LLAMA_8B, "fp8", 16),
        "as above; the head and attention stay bf16 in both",
        micro=2,
        recompute="selective",
        cluster=_500W,
    ),
    Run(
        *("Llama-3.1 8B, FP8, 32 H200", "torchtitan 2025-06", 10938, "H200", 32, LLAMA_8B, "fp8", 64),
        f"{_KEPT}; one microbatch a step hides nothing of the optimizer",
        micro=2,
        recompute="selective",
    ),
    Run(
        *(
            "distil Qwen3 8B -> 6B, BF16, 96 H100",
            f"{_OPTIMIZER}#861",
            50.3e9 / 3000 / 3600,
            "H100",
            96,
            QWEN_6B,
            "bf16",
        ),
        *(768, f"{_PEER} validation and saving; the number of GPUs is not said"),
        micro=8,
        length=4096,
        parallel=(8, 1, None, 1, True),
        teacher=QWEN_8B,
    ),
    Run(
        *(
            "distil Nano 9B -> 7B, BF16, 768 H100",
            f"{_OPTIMIZER}#1325",
            6.3e9 / 600 / 3600,
            "H100",
            768,
            NANO_7B,
            "bf16",
        ),
        *(768, "hybrids of Mamba, whose scans are slower than products, estimated as dense models; as above"),
        micro=4,
        parallel=(8, 1, None, 1, True),
        teacher=NANO_9B,
    ),
)
# (student, batch, published speed against Llama-3.1-8B at a batch of 32, arXiv 2408.11796, section 5.2)
SPEEDS = (("depth", DEPTH, 64, 2.7), ("width", WIDTH, 64, 1.8))
LENGTHS = ((2048, 128), (128, 2048), (1024, 1024))


def trainings() -> list[dict[str, Any]]:
    """Each run's tokens a second on a GPU, published and estimated."""
    found = []
    for run in RUNS:
        time = run.time()
        parts = sorted(time.parts.items(), key=lambda row: -row[1])[:3]
        found.append(
            {
                "run": run.name,
                "source": run.source,
                "published": run.tokens,
                "estimated": time.tokens_per_second / time.gpus,
                "utilization": time.utilization,
                "mostly": {name: seconds / time.total for name, seconds in parts},
                "why": run.why,
            }
        )
    return found


def one_loss() -> dict[str, float]:
    """Milliseconds of a fused KL from hidden states, the teacher's probabilities given, forward and backward, of 8192
    tokens of 4096 channels on an A100 (Liger-Kernel#1423). Three products of the head, no teacher's."""
    student = Pass(machine_of(ClusterConfig(device="A100")), LLAMA_8B, ParallelConfig(), "bf16", 8192, 8192, False)
    return {"published": 129.0, "estimated": 1000 * loss_seconds(student, None, None).total}


def speeds() -> list[dict[str, Any]]:
    """Tokens a second that a student makes against its teacher, fp8 on one H100, prefill included."""
    machine = machine_of(ClusterConfig(device="H100"))

    def made(model: Architecture, batch: int, prompt: int, output: int) -> float:
        serving = ServingConfig(
            batch_size=batch, prompt_tokens=prompt, output_tokens=output, weights="fp8", kv_cache="fp8"
        )
        return batch * output / serving_figures(model, serving, machine)["latency"]

    found = []
    for name, model, batch, published in SPEEDS:
        ratios = [made(model, batch, *lengths) / made(LLAMA_8B, 32, *lengths) for lengths in LENGTHS]
        found.append({"student": name, "published": published, "estimated": ratios})
    return found


def main() -> None:
    runs, loss, students = trainings(), one_loss(), speeds()
    rows = [
        (
            row["run"],
            f"{row['published']:,.0f}",
            f"{row['estimated']:,.0f}",
            f"{row['estimated'] / row['published']:.2f}",
            f"{row['utilization']:.0%}",
            ", ".join(f"{name} {share:.0%}" for name, share in row["mostly"].items()),
        )
        for row in runs
    ]
    header = ("tokens a second on a GPU", "published", "estimated", "ratio", "MFU", "estimated parts")
    print(table(rows, header, left=(0, 5)))
    print("\nwhat explains the difference:")
    for row in runs:
        print(f"  {row['run']} ({row['source']}): {row['why']}")
    print("  distil 31.6B/A3.6B -> A3.0B: a mixture of experts, which no dense model stands for; left out")
    print(f"\nfused KL, A100, 8192 x 4096 x 128256: published 129 ms, estimated {loss['estimated']:.0f} ms")
    lengths = ", ".join(f"{prompt} + {output}" for prompt, output in LENGTHS)
    for student in students:
        ratios = ", ".join(f"{ratio:.2f}" for ratio in student["estimated"])
        print(
            f"{student['student']} student's speed, fp8 on one H100, batch 64 against its teacher's 32: published "
            f"{student['published']}x, estimated {ratios} (prompt + output tokens {lengths})"
        )
    print(json.dumps({"benchmark": "published", "trainings": runs, "loss": loss, "speeds": students}))


if __name__ == "__main__":
    main()
