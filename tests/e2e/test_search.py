"""`minitron search search.train=false`: files and table from a shape alone, without torch or a process group."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.verbs import run_well

ROOT = Path(__file__).parents[2]
TEACHER = ["model.num_layers=4", "model.hidden_size=48", "model.ffn_hidden_size=96", "model.num_attention_heads=6"]
TEACHER += ["model.vocab_size=100"]
GRID = ["search.train=false", "search.num_layers=[2-4]", "search.ffn_ratio=[1,2]"]


def test_the_table_and_both_files_agree(tmp_path: Path) -> None:
    """Counts from 2 x 100 x 48 embeddings, 4 x 48 x 48 attention, 3 x 48 x ffn MLP, norms."""
    shown = run_well("search", *TEACHER, *GRID, f"output={tmp_path}/new", "search.budget.memory=[null,800000]")
    counts = {(L, r): 9600 + 48 + L * (4 * 48 * 48 + 3 * 48 * 48 * r + 96) for L in (2, 3, 4) for r in (1, 2)}
    # In bf16, with the keys and values of 1,152 tokens.
    memory = {(L, r): 2 * count + 1152 * L * 2 * 48 * 2 for (L, r), count in counts.items()}
    within = [sizes for sizes, size in memory.items() if size <= 800000]
    assert 0 < len(within) < 5 and f"5 shapes that can be pruned and laid out, {len(within)} within" in shown
    assert "search: 1 left out: it is the teacher\n" in shown
    expected = [[L, 48, 48 * r, 6, 6, counts[L, r], counts[L, r] - 9600, memory[L, r]] for L, r in within]
    lines = shown.split("\n\n")[1].splitlines()[1:]
    assert [[int(cell.replace(",", "")) for cell in line.split()] for line in lines] == expected
    described = json.loads((tmp_path / "new" / "candidates.json").read_text())
    with (tmp_path / "new" / "candidates.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [{key: str(value) for key, value in each.items()} for each in described["candidates"]] == rows
    assert [int(row["total_parameters"]) for row in rows] == [row[5] for row in expected]
    assert described["budgets"] == {"tolerance": 0.05, "memory": [None, 800000]}
    assert (described["combinations"], described["shapes"]) == (6, 5)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["candidates.csv", "candidates.json"]


def test_no_torch_is_needed_and_any_device_says_its_latency(tmp_path: Path) -> None:
    words = ["search", *TEACHER, *GRID, f"output={tmp_path}/new", "search.budget.latency=[0,null]"]
    program = (
        f"import sys; from minitron_mcore.cli import main; code = main({[*words, 'cluster.device=H100']})\n"
        "print(code, [name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done
    rows = json.loads((tmp_path / "new" / "candidates.json").read_text())["candidates"]
    assert len(rows) == 5 and all(0 < row["prefill_latency"] < row["latency"] for row in rows)
    assert rows[0]["latency"] < rows[-1]["latency"], "two layers are quicker than four"
