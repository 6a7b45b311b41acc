"""Import and export of a Hugging Face folder, in time and memory, against a plain copy of the same bytes.

    python benchmarks/convert.py                     Llama-3.1-8B's width, 2 layers: 3 GB
    python benchmarks/convert.py --layers 32         the whole model: 16 GB, four times that on the disk

Timed, in interleaved repeats, medians compared: copying the files; `import` on one rank and on two (TP = 2); `export`
on one rank. Each runs in a process that has just started, the copy too: what the memory was used for before must not
tell them apart. All of them write new files and fsync them; what was written before is flushed first; the source is in
the page cache as far as memory allows. Start-up of the processes is not counted. Beside it the processor's time, of all
ranks together, which says more where the machine is shared.

Memory: the largest resident set (VmHWM, mapped files included) of each rank, a fresh process, against an empty process
+ for each thread a block and what it is picked from + 64 MiB that malloc may not give back. The empty process did the
same job on a model of a few kilobytes. The exported tensors are compared with the source's bit for bit. Ends with one
JSON line.
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
from math import prod
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPE = {
    "family": "llama",
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
TINY = {
    **SHAPE,
    "num_layers": 1,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
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
MIB = 1 << 20
KEPT = 64 * MIB  # glibc's malloc keeps as much of freed blocks below 32 MiB before it gives them back


def make_source(folder: Path, shape: dict[str, Any], max_shard_bytes: int) -> dict[str, Any]:
    """Write a folder of that shape, bf16, every tensor different, one in memory at a time; returns its sizes."""
    from minitron_mcore.architecture import build_architecture
    from minitron_mcore.checkpoint.blocks import Rows
    from minitron_mcore.checkpoint.conversion import units
    from minitron_mcore.checkpoint.safetensors_file import Entry, split_files, write_safetensors
    from minitron_mcore.families.find import find_family
    from minitron_mcore.families.table import config_of

    architecture = build_architecture(shape)
    family = find_family("llama", "benchmark")
    rows = units(architecture)
    entries = [
        Entry(name, size, torch.bfloat16)
        for unit in rows
        for name, size in zip(unit.names, unit.shapes(architecture), strict=True)
    ]
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).repeat(2)

    def content(number: int, entry: Entry) -> Rows:
        width = prod(entry.shape[1:])

        def fill(target: torch.Tensor, start: int) -> None:
            first = (start * width - 7919 * number) % (len(noise) // 2)
            target.view(-1).copy_(noise[first : first + target.numel()])

        return Rows(entry.shape, torch.bfloat16, fill)

    folder.mkdir(parents=True)
    stream = (content(number, entry) for number, entry in enumerate(entries))
    files = split_files(entries, max_shard_bytes)
    places: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / name, file, [next(stream) for _ in file])
        places |= dict.fromkeys((entry.name for entry in file), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config_of(family, architecture, "benchmark")))
    return {
        "parameters": architecture.num_parameters,
        "bytes": sum(entry.num_bytes for entry in entries),
        "largest_tensor": max(entry.num_bytes for entry in entries),
        "largest_parameter": max(
            2
            * unit.parameter.count(architecture, architecture.padded_vocab_size)
            // (architecture.num_layers if unit.parameter.per_layer else 1)
            for unit in rows
        ),
    }


def copy(source: Path, target: Path) -> None:
    """Copy the files and see them on the disk."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb+") as stream:
            os.fsync(stream.fileno())


def convert_on_rank(job: str, source: Path, target: Path) -> tuple[float, float]:
    """One rank of one job, copy, import or export; seconds from when all ranks have started until all are done, and the
    processor's in this one."""
    from transformers import AutoConfig

    from minitron_mcore.checkpoint.export import export_checkpoint
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.hf_config import read_config
    from minitron_mcore.checkpoint.import_hf import import_checkpoint
    from minitron_mcore.runtime.config import ParallelConfig
    from minitron_mcore.runtime.parallel import use_layout
    from minitron_mcore.runtime.start import start

    runtime = start()
    parallel = ParallelConfig(tensor=runtime.world_size)
    use_layout(parallel, runtime.world_size)
    architecture = read_config(source) if job == "import" else None
    AutoConfig.for_model("llama")  # which has transformers imported
    runtime.barrier()
    started, worked = time.perf_counter(), time.process_time()
    if job == "copy":
        copy(source, target)
    elif architecture is not None:
        import_checkpoint(source, target, architecture, parallel, runtime)
        if runtime.is_main:
            write_description(target, architecture, lineage={}, recipe="", save_tokenizer=None)
    else:
        export_checkpoint(source, 0, target, runtime)
    worked = time.process_time() - worked  # a rank that waits for others may do so busily
    runtime.barrier()
    return time.perf_counter() - started, worked


def rank_main(job: str, source: Path, target: Path, report: Path) -> None:
    """What each process of a job does."""
    from minitron_mcore.runtime.start import stop

    seconds, worked = convert_on_rank(job, source, target)
    path = report / f"rank_{os.environ['RANK']}.json"
    path.write_text(json.dumps({"seconds": seconds, "worked": worked, "peak": peak_bytes()}))
    stop()


def peak_bytes() -> int:
    """The largest resident set since this program started; not ru_maxrss, which remembers the parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def launch(job: str, ranks: int, source: Path, target: Path, root: Path) -> list[dict[str, float]]:
    """Run a job in fresh processes; what each rank measured."""
    report = root / "report"
    shutil.rmtree(report, ignore_errors=True)
    report.mkdir()
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, "--job", job, "--paths", str(source), str(target), str(report)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise SystemExit(f"{job} on {ranks} rank(s) failed:\n{done.stderr[-4000:]}")
    return [json.loads((report / f"rank_{rank}.json").read_text()) for rank in range(ranks)]


def same_tensors(before: Path, after: Path) -> bool:
    """Whether both folders hold the same names and the same bits; read by safetensors' own reader."""
    from safetensors import safe_open

    def opened(folder: Path) -> dict[str, Any]:
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118

    left, right = opened(before), opened(after)
    return left.keys() == right.keys() and all(
        torch.equal(left[name].get_tensor(name).view(torch.int16), right[name].get_tensor(name).view(torch.int16))
        for name in left
    )


def empty_peaks(root: Path, job: str, ranks: int) -> list[float]:
    """What each rank of a job takes when there is next to nothing to convert."""
    if not root.exists():
        make_source(root / "source", TINY, MIB)
        launch("import", 1, root / "source", root / "checkpoint", root)
    given = root / ("source" if job == "import" else "checkpoint")
    rows = launch(job, ranks, given, root / f"{job}_{ranks}", root)
    return [row["peak"] for row in rows]


def memory_rows(job: str, peaks: list[float], empty: list[float], extra: float) -> list[dict[str, Any]]:
    rows = []
    for rank, (peak, base) in enumerate(zip(peaks, empty, strict=True)):
        row = {"rank": rank, "peak": peak, "empty": base, "above_empty": peak - base, "allowed_above_empty": extra}
        rows.append({**row, "holds": peak <= base + extra})
        print(
            f"{job} rank {rank}: peak {peak / MIB:,.0f} MiB, {(peak - base) / MIB:,.0f} above an empty process; "
            f"bound {extra / MIB:,.0f}: {'holds' if peak <= base + extra else 'BROKEN'}"
        )
    return rows


def measure(root: Path, shape: dict[str, Any], repeats: int, max_shard_bytes: int) -> dict[str, Any]:
    from minitron_mcore.checkpoint.blocks import THREADS
    from minitron_mcore.files import BLOCK

    source, checkpoint, pair, exported = (root / name for name in ("source", "checkpoint", "pair", "exported"))
    sizes = make_source(source, shape, max_shard_bytes)
    print(
        f"{sizes['parameters']:,} parameters, {sizes['bytes'] / 1e9:.2f} GB, the largest tensor "
        f"{sizes['largest_tensor'] / MIB:,.0f} MiB",
        flush=True,
    )
    seconds: dict[str, list[float]] = {"copy": [], "import_1": [], "import_tp2": [], "export_1": []}
    worked: dict[str, list[float]] = {name: [] for name in seconds}
    peaks: dict[str, list[list[float]]] = {"import_1": [], "import_tp2": [], "export_1": []}
    jobs = {
        "copy": ("copy", 1, source, root / "copy"),
        "import_1": ("import", 1, source, checkpoint),
        "import_tp2": ("import", 2, source, pair),
        "export_1": ("export", 1, checkpoint, exported),
    }
    equal = True
    for repeat in range(repeats):
        order = list(jobs) if repeat % 2 == 0 else ["import_tp2", "import_1", "export_1", "copy"]
        for name in order:
            job, ranks, given, target = jobs[name]
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            rows = launch(job, ranks, given, target, root)
            seconds[name].append(max(row["seconds"] for row in rows))
            worked[name].append(sum(row["worked"] for row in rows))
            if job == "copy":
                shutil.rmtree(target)
            else:
                peaks[name].append([row["peak"] for row in rows])
        equal = equal and same_tensors(source, exported)
        print(
            f"repeat {repeat + 1}: " + ", ".join(f"{name} {times[-1]:.1f} s" for name, times in seconds.items()),
            flush=True,
        )
    memory: dict[str, Any] = {}
    for name, (job, ranks, *_) in jobs.items():
        if job == "copy":
            continue
        worst = [max(values) for values in zip(*peaks[name], strict=True)]
        allowed = 2 * THREADS * BLOCK + KEPT
        memory[name] = memory_rows(name, worst, empty_peaks(root / "tiny", job, ranks), allowed)
    ratios = []
    for times in (seconds, worked):
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios.append({name: round(value / medians["copy"], 3) for name, value in medians.items() if name != "copy"})
    return {
        "benchmark": "convert",
        "shape": shape,
        **sizes,
        "seconds": {name: [round(value, 2) for value in times] for name, times in seconds.items()},
        "processor_seconds": {name: [round(value, 2) for value in times] for name, times in worked.items()},
        "ratio_to_copy": ratios[0],
        "ratio_of_processor_time": ratios[1],
        "memory": memory,
        "bounds_hold": all(row["holds"] for rows in memory.values() for row in rows),
        "equal_bit_for_bit": equal,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", "--num-layers", dest="num_layers", type=int, default=2)
    for name in SHAPE_OPTIONS[1:]:
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=SHAPE[name])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-shard-bytes", type=int, default=5_000_000_000)
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    parser.add_argument("--job", choices=("copy", "import", "export"), help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        rank_main(options.job, *options.paths)
        return
    shape = {**SHAPE, **{name: getattr(options, name) for name in SHAPE_OPTIONS}}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), shape, options.repeats, options.max_shard_bytes)
    for name, ratio in result["ratio_to_copy"].items():
        print(f"{name}: {ratio:.2f}x the copy, {result['ratio_of_processor_time'][name]:.2f}x its processor time")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
