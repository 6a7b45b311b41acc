"""The model card of an exported model: what it is and where it comes from, as far as its checkpoint says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import read_lineage

SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


def model_card(name: str, architecture: Architecture, folder: Path, iteration: int) -> str:
    """Markdown, with the front matter that model hubs read; lineage and results are read from beside the weights."""
    a = architecture
    rows = {
        "parameters": f"{a.num_parameters:,}",
        "non-embedding parameters": f"{a.num_non_embedding_parameters:,}",
        **{field: str(getattr(a, field)) for field in SHAPE},
        "vocab_size": str(a.vocab_size),
    }
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {name}",
        f"A decoder-only language model of the {a.family} family, exported from iteration {iteration} of a Megatron "
        "checkpoint by minitron_mcore.",
        "| | |\n|---|---|\n" + "\n".join(f"| {field} | {value} |" for field, value in rows.items()),
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```',
    ]
    if lineage := read_lineage(folder):
        sections += ["## Lineage", f"```yaml\n{yaml.safe_dump(lineage, sort_keys=False).strip()}\n```"]
    if results := _results(folder, iteration):
        sections += ["## Evaluation", "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in results.items())]
    return "\n\n".join(sections) + "\n"


def _results(folder: Path, iteration: int) -> dict[str, Any]:
    """Numbers that `evaluate` left beside the weights, if they are this iteration's."""
    path = folder / "results.json"
    if not path.is_file():
        return {}
    results = json.loads(path.read_text())
    if results.pop("iteration", None) != iteration:
        return {}
    results.pop("checkpoint", None)
    return results
