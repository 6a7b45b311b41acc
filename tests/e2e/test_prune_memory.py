"""Pruning in fresh processes, on a model whose largest parameter is a small part of it: the memory it takes.

benchmarks/prune.py measures (largest resident set) and compares with its bound; and here, more strictly, with what
streaming means: a few parameters above an empty process, whatever the size of the shards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
SLACK = 12 * MIB  # code and buffers that a model of a few kilobytes does not touch
# Blocks of this size go back to the system when they are freed; malloc would keep up to 64 MiB of them.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "OMP_NUM_THREADS": "1"}
SHAPE = {"hidden_size": 1024, "num_attention_heads": 16, "num_query_groups": 8, "vocab_size": 4096}


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "width"), [(10, 2560), (40, 4096)])
def test_in_fresh_processes(tmp_path: Path, layers: int, width: int) -> None:
    """225 MB and 1.3 GB, of which a rank at TP 2 prunes half."""
    shape = {**SHAPE, "layers": layers, "ffn_hidden_size": width}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in shape.items()]
    command = [sys.executable, str(ROOT / "benchmarks" / "prune.py"), "--repeats=1", f"--folder={tmp_path}", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["equal_bit_for_bit"] and result["bounds_hold"]
    rows = [row for rows in result["memory"].values() for row in rows]
    assert len(rows) == 3
    for row in rows:
        assert result["bytes"] > 12 * row["largest_parameter"]
        # A stored piece, the span that is read of it, and what is made of that.
        assert row["above_empty"] <= 3 * row["largest_parameter"] + SLACK, row
