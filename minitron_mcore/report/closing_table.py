"""The closing table of a run."""

from __future__ import annotations

from typing import Any


def closing_table(results: dict[str, dict[str, Any]]) -> str:
    """Held-out losses by model, in the road's order; `results` maps a model's name to what `evaluate` gave."""
    width = max(len(name) for name in results)
    sample = next(iter(results.values()))
    head = (
        f"held-out LM loss, {sample['samples']} sequences of {sample['sequence_length']} tokens\n"
        f"{'model':<{width}}  {'lm loss':>8}  {'ppl':>9}  {'parameters':>11}  {'trained tokens':>14}"
    )
    rows = [
        f"{name:<{width}}  {row['lm loss']:>8.4f}  {row['ppl']:>9.2f}  {row['parameters']:>11,}  {row['tokens']:>14,}"
        for name, row in results.items()
    ]
    return "\n".join([head, *rows])
