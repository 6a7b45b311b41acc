"""What the papers report of their models on their tasks (arXiv 2408.11796, table 1), in percent. Pure."""

from __future__ import annotations

from minitron_mcore.architecture import Architecture

# task -> (shots, the harness's metric)
TASKS = {
    "winogrande": (5, "acc"),
    "arc_challenge": (25, "acc_norm"),
    "mmlu": (5, "acc"),
    "hellaswag": (10, "acc_norm"),
    "gsm8k": (5, "exact_match,strict-match"),
    "truthfulqa_mc2": (0, "acc"),
}
# name -> (family, layers, hidden_size, ffn_hidden_size, heads, query groups, vocabulary), percent by task
MODELS = {
    "Llama-3.1-8B": (("llama", 32, 4096, 14336, 32, 8, 128256), (77.3, 57.9, 65.3, 81.8, 48.6, 45.0)),
    "Llama-3.1-Minitron-4B-Depth": (("llama", 16, 4096, 14336, 32, 8, 128256), (72.1, 52.6, 58.7, 73.2, 16.8, 38.2)),
    "Llama-3.1-Minitron-4B-Width": (("llama", 32, 3072, 9216, 32, 8, 128256), (73.5, 55.6, 60.5, 76.1, 41.2, 42.9)),
    "Minitron-4B": (("nemotron", 32, 3072, 9216, 24, 8, 256000), (74.0, 50.9, 58.6, 75.0, 24.1, 42.9)),
    "Mistral-NeMo-12B": (("mistral", 40, 5120, 14336, 32, 8, 131072), (82.2, 65.1, 69.0, 85.2, 56.4, 49.8)),
    "Mistral-NeMo-Minitron-8B": (("mistral", 40, 4096, 11520, 32, 8, 131072), (80.4, 64.4, 69.5, 83.0, 58.5, 47.6)),
}


def published(architecture: Architecture | None) -> str | None:
    """The papers' model of this shape; None where it is none of theirs."""
    if architecture is None:
        return None
    names = ("family", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    shape = tuple(getattr(architecture, name) for name in (*names, "vocab_size"))
    return next((name for name, (theirs, _) in MODELS.items() if theirs == shape), None)


def published_score(model: str, task: str, metric: str, shots: int | None) -> float | None:
    """What the papers report, as the harness gives it, from 0 to 1; None where they measured otherwise."""
    if TASKS.get(task) != (shots, metric):
        return None
    return MODELS[model][1][list(TASKS).index(task)] / 100
