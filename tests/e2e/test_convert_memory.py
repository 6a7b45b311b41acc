"""Import and export in fresh processes, on a model whose largest tensor is a small part of it: the memory they take.

benchmarks/convert.py measures (largest resident set, mapped files included) and compares with its bounds; and here,
more strictly, with what streaming means: a few blocks above an empty process, whatever the size of shard and tensors.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.checkpoint.blocks import THREADS
from minitron_mcore.estimate.stages import export_bytes
from minitron_mcore.files import BLOCK
from tests.distributed.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
SLACK = 12 * MIB  # code and buffers that a model of a few kilobytes does not touch; seen: 1 to 8 MiB
PIECES = 2 * THREADS * BLOCK  # each thread's block, and what is read to make it
# Blocks of this size go back to the system when they are freed; malloc would keep up to 64 MiB of them.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "OMP_NUM_THREADS": "1"}


def convert(folder: Path, **shape: int) -> dict:  # type: ignore[type-arg]
    words = [f"--{name.replace('_', '-')}={value}" for name, value in shape.items()]
    command = [sys.executable, str(ROOT / "benchmarks" / "convert.py"), "--repeats=1", f"--folder={folder}", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(result: dict) -> None:  # type: ignore[type-arg]
    assert result["equal_bit_for_bit"]
    assert result["largest_tensor"] > 2 * (PIECES + SLACK) and result["bytes"] > 3 * result["largest_tensor"]
    rows = [(job, row) for job, rows in result["memory"].items() for row in rows]
    assert [job for job, _ in rows] == ["import_1", "import_tp2", "import_tp2", "export_1"]
    for job, row in rows:
        assert row["above_empty"] <= PIECES + SLACK, (job, row)
    assert result["bounds_hold"]


SHAPE = {"hidden_size": 1024, "num_attention_heads": 8, "num_query_groups": 2, "vocab_size": 32768}


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "width"), [(10, 2560), (40, 4096)])
def test_in_fresh_processes(tmp_path: Path, layers: int, width: int) -> None:
    """350 MB and 1.3 GB, of which a rank at TP 2 stores half, and 67 MB in one tensor."""
    check(convert(tmp_path, layers=layers, ffn_hidden_size=width, **SHAPE))


def memory(line: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(line + ":")[1].split()[0])


def above_on_rank(root: str, ranks: int) -> dict[str, int]:
    """Peak above what a worker held that had converted a small model before, in bytes, by job."""
    convert_on_rank = importlib.import_module("benchmarks.convert").convert_on_rank

    found = {}
    for size in ("tiny", "large"):
        for job, given in (("import", "source"), ("export", f"import-{ranks}")):
            Path("/proc/self/clear_refs").write_text("5")
            before = memory("VmRSS")
            convert_on_rank(job, Path(root, size, given), Path(root, size, f"{job}-{ranks}"))
            found[job] = memory("VmHWM") - before
    return found


def test_memory(tmp_path: Path) -> None:
    """In workers that live on: malloc may keep 64 MiB of freed blocks, the model has three times as much."""
    benchmark = importlib.import_module("benchmarks.convert")
    benchmark.make_source(tmp_path / "tiny" / "source", benchmark.TINY, MIB)
    shape = {**benchmark.SHAPE, **SHAPE, "vocab_size": 65536, "num_layers": 1, "ffn_hidden_size": 2560}
    sizes = benchmark.make_source(tmp_path / "large" / "source", shape, 160 * MIB)
    allowed = export_bytes(build_architecture(shape), "bf16") + SLACK
    assert sizes["largest_tensor"] > 4 * allowed and sizes["bytes"] > 8 * allowed
    for ranks in (1, 2):
        for found in run_on_ranks(above_on_rank, ranks, str(tmp_path), ranks):
            assert all(above <= allowed for above in found.values()), (ranks, found)
