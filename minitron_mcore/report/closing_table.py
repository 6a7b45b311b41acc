"""The closing table of a run."""

from __future__ import annotations

from typing import Any

from minitron_mcore.tables import table


def closing_table(results: dict[str, dict[str, Any]]) -> str:
    """Held-out losses by model, in the road's order; `results` maps a model's name to what `evaluate` gave."""
    sample = next(iter(results.values()))
    rows = [
        (name, f"{row['lm loss']:.4f}", f"{row['ppl']:.2f}", f"{row['parameters']:,}", f"{row['tokens']:,}")
        for name, row in results.items()
    ]
    head = f"held-out LM loss, {sample['samples']} sequences of {sample['sequence_length']} tokens"
    return f"{head}\n{table(rows, ('model', 'lm loss', 'ppl', 'parameters', 'trained tokens'))}"
