"""Pruning a checkpoint, in time and memory, against the same store just loading the teacher and saving a student.

    python benchmarks/prune.py                      Llama-3.1-8B's width, 2 layers, 32,000 words: 1.4 GB
    python benchmarks/prune.py --layers 8           four times the layers

The plan is of random scores, so that what stays is scattered: hidden 4096 -> 3072, MLP 14336 -> 9216, KV groups 8 -> 6.
Timed on one rank and on two (TP = 2), in interleaved repeats within the same processes, after one of each on a model of
a few kilobytes; medians compared:
    prune: `prune_checkpoint`
    plain: `read_part` of the rank's shard of the teacher, then `save_stream` of tensors of the student's shapes,
           which lie in memory
Both write new files and fsync them; what was written before is flushed first; the teacher is in the page cache as far
as memory allows.

Memory: the largest resident set (VmHWM) of each rank, a fresh process, against an empty process + the rank's shard of
the teacher + its shard of the student + the largest parameter, where the empty process pruned a model of a few
kilobytes. The student is compared with plain slicing, bit for bit. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPE = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}
TINY = {
    **SHAPE,
    "num_layers": 1,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 16,
    "vocab_size": 64,
}
SHAPE_OPTIONS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "vocab_size",
)
RATIOS = {"hidden_size": 0.75, "ffn_hidden_size": 9 / 14, "num_query_groups": 0.75}
MIB = 1 << 20


def plan_of(shape: dict[str, Any]) -> Any:
    """A plan of random scores; sizes that two tensor-parallel ranks share."""
    from minitron_mcore.architecture import build_architecture
    from minitron_mcore.importance.scores import Scores
    from minitron_mcore.pruning.config import PruneConfig, StudentConfig
    from minitron_mcore.pruning.plan import make_plan
    from minitron_mcore.runtime.config import ParallelConfig

    a, draw = build_architecture(shape), numpy.random.default_rng(5)
    sizes: dict[str, tuple[int, ...]] = {
        "hidden": (a.hidden_size,),
        "ffn": (a.num_layers, a.ffn_hidden_size),
        "heads": (a.num_layers, a.num_attention_heads),
        "groups": (a.num_layers, a.num_query_groups),
        "layers": (a.num_layers,),
    }
    arrays: dict[str, Any] = {axis: draw.random(size) + 1 for axis, size in sizes.items()}
    return make_plan(
        Scores(a, **arrays), StudentConfig(ratios=RATIOS), PruneConfig(divisible_by=8), ParallelConfig(tensor=2)
    )


def layers_of(parameter: Any, architecture: Any) -> Any:
    return range(architecture.num_layers) if parameter.per_layer else [None]


def make_teacher(folder: Path, shape: dict[str, Any]) -> None:
    """One process: a checkpoint of that shape, bf16, every tensor different, one in memory at a time."""
    from minitron_mcore.architecture import build_architecture
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.writer import Piece, Source, save_stream
    from minitron_mcore.layout import parameter_table
    from minitron_mcore.runtime.start import start

    a, runtime = build_architecture(shape), start()
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)

    def tensor(number: int, size: tuple[int, ...]) -> torch.Tensor:
        count = prod(size)
        return noise.roll(7919 * number).repeat(-(-count // len(noise)))[:count].view(size)

    sources: list[Source] = []
    for parameter in parameter_table(a):
        for layer in layers_of(parameter, a):
            size = parameter.shape(a)
            whole = size if layer is None else (a.num_layers, *size)
            offsets = (0,) * len(size) if layer is None else (layer, *(0,) * len(size))
            part = Piece(parameter.key, whole, offsets, size if layer is None else (1, *size), torch.bfloat16)
            sources.append(Source(part, partial(tensor, len(sources), size)))
    save_stream(folder, 0, sources, runtime)
    write_description(folder, a, lineage={}, recipe="", save_tokenizer=None)


def shard(architecture: Any, rank: int, size: int) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """(parameter, layer, pieces) of what tensor-parallel `rank` of `size` stores."""
    from minitron_mcore.checkpoint.writer import shard_pieces
    from minitron_mcore.layout import parameter_table

    for parameter in parameter_table(architecture):
        for layer in layers_of(parameter, architecture):
            yield parameter, layer, shard_pieces(parameter, architecture, torch.bfloat16, layer, rank, size)


def plain(teacher: Path, target: Path, plan: Any, runtime: Any) -> float:
    """Seconds to load the teacher's shard, then save a shard of the student's shapes."""
    from minitron_mcore.checkpoint.reader import TensorReader
    from minitron_mcore.checkpoint.writer import Source, save_stream

    rank, size = runtime.rank, runtime.world_size
    sources = [
        Source(piece, partial(torch.full, piece.shape, 0.5, dtype=piece.dtype))
        for _, _, pieces in shard(plan.student, rank, size)
        for piece in pieces
    ]
    wanted = [(parameter, layer) for parameter, layer, _ in shard(plan.teacher, rank, size)]
    runtime.barrier()
    started = time.perf_counter()
    reader = TensorReader(teacher, 0)
    held = [reader.read_part(parameter, plan.teacher, layer, rank, size) for parameter, layer in wanted]
    del held
    save_stream(target, 0, sources, runtime)
    runtime.barrier()
    return time.perf_counter() - started


def prune(teacher: Path, target: Path, plan: Any, runtime: Any) -> float:
    from minitron_mcore.pruning.apply import prune_checkpoint

    runtime.barrier()
    started = time.perf_counter()
    prune_checkpoint((teacher, 0), plan, target, runtime)
    runtime.barrier()
    return time.perf_counter() - started


def rank_main(job: str, root: Path, shape: dict[str, Any], repeats: int, report: Path) -> None:
    """What each process of a job does: "time", "memory", or "empty", which is "memory" of the tiny model."""
    from minitron_mcore.runtime.config import ParallelConfig
    from minitron_mcore.runtime.parallel import use_layout
    from minitron_mcore.runtime.start import start, stop

    runtime = start()
    use_layout(ParallelConfig(tensor=runtime.world_size), runtime.world_size)
    result: dict[str, Any] = {}
    if job == "time":
        ways = {"prune": prune, "plain": plain}
        for way in ways.values():
            way(root / "tiny", root / f"warm_{way.__name__}", plan_of(TINY), runtime)
        plan = plan_of(shape)
        for repeat in range(repeats):
            for name in list(ways) if repeat % 2 == 0 else list(reversed(ways)):
                target = root / f"{name}_{runtime.world_size}"
                if runtime.is_main:
                    shutil.rmtree(target, ignore_errors=True)
                    os.sync()
                runtime.barrier()
                result.setdefault(name, []).append(ways[name](root / "teacher", target, plan, runtime))
    else:
        name, given = ("tiny", TINY) if job == "empty" else ("teacher", shape)
        prune(root / name, root / f"{job}_{runtime.world_size}", plan_of(given), runtime)
        result["peak"] = peak_bytes()
    (report / f"rank_{runtime.rank}.json").write_text(json.dumps(result))
    stop()


def peak_bytes() -> int:
    """The largest resident set since this program started; not ru_maxrss, which remembers the parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def launch(job: str, ranks: int, root: Path, shape: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Run a job in fresh processes; what each rank measured."""
    report = root / "report"
    shutil.rmtree(report, ignore_errors=True)
    report.mkdir()
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    command += ["--job", job, "--root", str(root), "--repeats", str(repeats)]
    command += [f"--{name.replace('_', '-')}={shape[name]}" for name in SHAPE_OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise SystemExit(f"{job} on {ranks} rank(s) failed:\n{done.stderr[-4000:]}")
    return [json.loads((report / f"rank_{rank}.json").read_text()) for rank in range(ranks)]


def equals_plain_slicing(teacher: Path, student: Path, plan: Any) -> bool:
    """Whether every tensor of the student is what index_select of the teacher's rows gives."""
    from minitron_mcore.checkpoint.reader import TensorReader
    from minitron_mcore.layout import parameter_table
    from minitron_mcore.pruning.axes import kept_rows

    before, after = TensorReader(teacher, 0), TensorReader(student, 0)
    for parameter in parameter_table(plan.teacher):
        for place, layer in enumerate(plan.layers) if parameter.per_layer else [(None, None)]:
            tensor = before.read(parameter.key, layer, parameter.shape(plan.teacher))
            for axis, rows in enumerate(kept_rows(parameter, plan, layer)):
                tensor = tensor.index_select(axis, torch.from_numpy(rows))
            if not torch.equal(tensor, after.read(parameter.key, place, parameter.shape(plan.student))):
                return False
    return True


def memory_rows(ranks: int, root: Path, shape: dict[str, Any], plan: Any) -> list[dict[str, Any]]:
    from minitron_mcore.layout import parameter_table

    peaks, empty = ([row["peak"] for row in launch(job, ranks, root, shape, 1)] for job in ("memory", "empty"))
    largest = max(2 * prod(parameter.shape(plan.teacher)) for parameter in parameter_table(plan.teacher))
    rows = []
    for rank, (peak, base) in enumerate(zip(peaks, empty, strict=True)):
        teacher, student = (
            sum(2 * prod(part.shape) for _, _, parts in shard(model, rank, ranks) for part in parts)
            for model in (plan.teacher, plan.student)
        )
        allowed = teacher + student + largest
        row = {"rank": rank, "peak": peak, "empty": base, "above_empty": peak - base, "allowed_above_empty": allowed}
        row |= {"teacher_shard": teacher, "student_shard": student, "largest_parameter": largest}
        rows.append({**row, "holds": peak - base <= allowed})
        print(
            f"{ranks} rank(s), rank {rank}: peak {peak / MIB:,.0f} MiB, {(peak - base) / MIB:,.0f} above an empty "
            f"process; bound {allowed / MIB:,.0f}, largest parameter {largest / MIB:,.0f}: "
            f"{'holds' if peak - base <= allowed else 'BROKEN'}",
            flush=True,
        )
    return rows


def measure(root: Path, shape: dict[str, Any], repeats: int) -> dict[str, Any]:
    make_teacher(root / "teacher", shape)
    make_teacher(root / "tiny", TINY)
    plan = plan_of(shape)
    stored = sum(path.stat().st_size for path in (root / "teacher").rglob("*.distcp"))
    print(
        f"{plan.teacher.num_parameters:,} -> {plan.student.num_parameters:,} parameters, {stored / 1e9:.2f} GB stored",
        flush=True,
    )
    seconds: dict[str, dict[str, list[float]]] = {}
    for ranks in (1, 2):
        rows = launch("time", ranks, root, shape, repeats)
        name = "rank_1" if ranks == 1 else "tp2"
        seconds[name] = {
            way: [round(max(times), 3) for times in zip(*(row[way] for row in rows), strict=True)] for way in rows[0]
        }
        print(f"{name}: {seconds[name]}", flush=True)
    equal = all(equals_plain_slicing(root / "teacher", root / f"prune_{ranks}", plan) for ranks in (1, 2))
    memory = {f"{ranks}": memory_rows(ranks, root, shape, plan) for ranks in (1, 2)}
    medians = {
        name: {way: statistics.median(times) for way, times in by_way.items()} for name, by_way in seconds.items()
    }
    return {
        "benchmark": "prune",
        "shape": shape,
        "student": {name: getattr(plan.student, name) for name in SHAPE_OPTIONS},
        "bytes": stored,
        "seconds": seconds,
        "ratio_to_plain": {name: round(ways["prune"] / ways["plain"], 3) for name, ways in medians.items()},
        "memory": memory,
        "bounds_hold": all(row["holds"] for rows in memory.values() for row in rows),
        "equal_bit_for_bit": equal,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", "--num-layers", dest="num_layers", type=int, default=SHAPE["num_layers"])
    for name in SHAPE_OPTIONS[1:]:
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=SHAPE[name])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    parser.add_argument("--job", choices=("time", "memory", "empty"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = {**SHAPE, **{name: getattr(options, name) for name in SHAPE_OPTIONS}}
    if options.job:
        rank_main(options.job, options.root, shape, options.repeats, options.root / "report")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), shape, options.repeats)
    for name, ratio in result["ratio_to_plain"].items():
        print(f"{name}: {ratio:.2f}x loading the teacher and saving the student's shapes")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
