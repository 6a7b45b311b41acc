"""The forecast of what is held for a whole run, against Megatron's own tensors at the papers' sizes and at 8 to 1,024
ranks, without a cluster.

    python benchmarks/memory_at_scale.py            all of CASES
    python benchmarks/memory_at_scale.py --only 3 7

For chosen ranks of every layout (the first and the last one of the first, a middle and the last pipeline stage) the
project's model, Megatron's gradient buffers and its distributed optimizer are laid out as that rank's, on the `meta`
device under a fake process group (tests/distributed/fake_world.py); beside the student the frozen teacher, in its own
layout and placement where the case says so. A line is a stage: what the rank holds that differs most from the forecast,
and the forecast as a multiple of it. Weights, the student's and the teacher's, must be equal to the byte, the rest to
1%. Ends with one JSON line; exit code 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_LLAMA = {"family": "llama", "num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128, "vocab_size": 128256}
_NEMOTRON = {"family": "nemotron", "num_layers": 32, "num_query_groups": 8, "kv_channels": 128, "vocab_size": 256000}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {**_LLAMA, "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336},
    "4B width": {**_LLAMA, "num_layers": 32, "hidden_size": 3072, "ffn_hidden_size": 9216},
    "4B depth": {**_LLAMA, "num_layers": 16, "hidden_size": 4096, "ffn_hidden_size": 14336},
    "Nemotron-4 15B": {**_NEMOTRON, "hidden_size": 6144, "ffn_hidden_size": 24576, "num_attention_heads": 48},
    "Minitron-8B": {**_NEMOTRON, "hidden_size": 4096, "ffn_hidden_size": 16384, "num_attention_heads": 48},
}
# Of the width-pruned 4B, with the head tied to the embedding.
SHAPES["4B tied"] = {**SHAPES["4B width"], "untie_embeddings_and_output_weights": False}
LIMIT = 0.01  # of gradients and optimizer state


@dataclass(frozen=True)
class Case:
    """A student, or a model that is trained alone, in a layout; perhaps a teacher beside it."""

    student: str
    ranks: int
    parallel: dict[str, Any]
    precision: str = "bf16"
    teacher: str | None = None
    own: dict[str, Any] | None = None  # the teacher's layout; None: the student's
    placement: str = "resident"

    def __str__(self) -> str:
        words = f"{self.student}, {self.ranks} ranks, {layout_words(self.parallel)}, {self.precision}"
        if self.teacher is None:
            return words
        own = f" at {layout_words(self.own)}" if self.own is not None else ""
        return f"{words}; {self.teacher}{own}, {self.placement}"


def layout_words(parallel: dict[str, Any]) -> str:
    names = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "context": "CP"}
    words = [f"{short}{parallel[name]}" for name, short in names.items() if name in parallel]
    return "·".join([*words, *(["SP"] if parallel.get("sequence") else [])]) or "DP"


_TP8 = {"tensor": 8, "sequence": True}
CASES = [
    Case("Llama-3.1-8B", 8, {}),
    Case("Llama-3.1-8B", 8, {"tensor": 8}, "fp32"),
    Case("4B width", 8, {"tensor": 4, "sequence": True}, teacher="Llama-3.1-8B"),
    Case("4B width", 16, {"pipeline": 8}, teacher="Llama-3.1-8B", placement="sharded"),
    Case("4B depth", 16, {"pipeline": 4, "virtual_pipeline": 2}, teacher="Llama-3.1-8B"),
    Case("4B tied", 32, {"tensor": 2, "pipeline": 4}, teacher="Llama-3.1-8B", own={"tensor": 8}),
    Case("4B tied", 64, {"tensor": 2, "context": 2, "sequence": True}, "fp32"),
    Case("4B width", 48, {"pipeline": 6, "tensor": 2}, teacher="Llama-3.1-8B", own={"pipeline": 3, "tensor": 2}),
    Case("4B depth", 64, {"tensor": 4, "context": 4, "sequence": True}, teacher="Llama-3.1-8B"),
    Case("Nemotron-4 15B", 64, {**_TP8, "pipeline": 4, "virtual_pipeline": 4}),
    Case("Minitron-8B", 128, {**_TP8, "pipeline": 2, "context": 2}, teacher="Nemotron-4 15B"),
    Case("Minitron-8B", 128, {"tensor": 4}, teacher="Nemotron-4 15B", own={"pipeline": 4}, placement="sharded"),
    Case("4B width", 256, {"pipeline": 2}, teacher="Llama-3.1-8B", own={"pipeline": 4, "tensor": 2}),
    Case("4B width", 512, {}, teacher="Llama-3.1-8B", placement="sharded"),
    Case("Nemotron-4 15B", 1024, {**_TP8, "pipeline": 8, "virtual_pipeline": 4}),
    Case("Minitron-8B", 1024, {"tensor": 8, "pipeline": 4, "context": 4}, teacher="Nemotron-4 15B"),
]


def compare(case: Case) -> list[dict[str, Any]]:
    """By stage and part: bytes that are forecast and bytes that the chosen rank holds which differs most from them.

    A teacher's own layout may have several stages on the ranks of the student's one: there the most counts that any of
    the chosen ranks holds.
    """
    from minitron_mcore.architecture import build_architecture
    from minitron_mcore.estimate.forecast import stage_parts
    from minitron_mcore.estimate.model import Setting
    from minitron_mcore.runtime.config import ParallelConfig
    from tests.distributed.fake_world import fake_rank, frozen_bytes, trained_bytes

    parallel = ParallelConfig(**case.parallel)
    own = ParallelConfig(**case.own) if case.own is not None else parallel
    student = build_architecture(SHAPES[case.student])
    teacher = build_architecture(SHAPES[case.teacher]) if case.teacher is not None else None
    data = case.ranks // parallel.replica_ranks
    setting = Setting(
        student=student,
        parallel=parallel,
        precision=case.precision,
        data_parallel=data,
        sequence_length=4096,
        global_batch_size=data,
        micro_batch_size=1,
        loss_chunk_tokens=None,
        teacher=teacher,
        teacher_parallel=own,
        teacher_placement=case.placement,
    )
    rows = []
    each, each_own = case.ranks // parallel.pipeline, case.ranks // own.pipeline  # Megatron orders ranks by stage
    for stage in sorted({0, parallel.pipeline // 2, parallel.pipeline - 1}):
        expected = stage_parts(setting, stage)
        found: dict[str, list[int]] = {}
        mine = range(stage * each, stage * each + each)
        # One with every stage of the teacher's that shares ranks with this one.
        for rank in sorted({mine[0], mine[-1], *(rank for rank in mine if rank % each_own == 0)}):
            with fake_rank(parallel, case.ranks, rank):
                held = trained_bytes(student, parallel, case.precision)
                if teacher is not None:
                    held["teacher weights"] = frozen_bytes(teacher, parallel, own, case.precision, case.placement)
            for name, count in held.items():
                found.setdefault(name, []).append(count)
        for name, counts in found.items():
            forecast = expected[name.replace("weight buffers", "weights")]
            furthest = max(counts, key=lambda count: abs(count - forecast))
            measured = max(counts) if name == "teacher weights" else furthest
            rows.append({"stage": stage, "part": name, "forecast": forecast, "measured": measured})
    return rows


def holds(row: dict[str, Any]) -> bool:
    """Weights to the byte, all else to LIMIT."""
    difference = abs(row["forecast"] - row["measured"])
    return bool(difference <= (0 if row["part"] in ("weights", "teacher weights") else LIMIT * row["measured"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, from 0")
    chosen = parser.parse_args().only
    from minitron_mcore.runtime.libraries import quiet_libraries

    quiet_libraries()
    failed, report = 0, []
    for number, case in enumerate(CASES):
        if chosen and number not in chosen:
            continue
        start = time.perf_counter()
        rows = compare(case)
        print(f"{number:2} {case} ({time.perf_counter() - start:.1f} s)")
        for stage in dict.fromkeys(row["stage"] for row in rows):
            words = [
                f"{row['part']} {row['measured'] / 2**20:,.1f} MiB x {row['forecast'] / row['measured']:.5f}"
                + ("" if holds(row) else " DIFFERS")
                for row in rows
                if row["stage"] == stage
            ]
            print(f"     stage {stage}: {'; '.join(words)}", flush=True)
        failed += sum(not holds(row) for row in rows)
        worst = {
            name: max(abs(row["forecast"] / row["measured"] - 1) for row in rows if row["part"] == name)
            for name in dict.fromkeys(row["part"] for row in rows)
        }
        report.append({"case": str(case), "off": {name: round(value, 6) for name, value in worst.items()}})
    print(json.dumps({"benchmark": "memory_at_scale", "holds": not failed, "cases": report}))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
