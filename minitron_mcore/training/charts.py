"""The charts that a training is watched by, of the names that it logs: what dashboards are made of. Pure."""

from __future__ import annotations

from dataclasses import dataclass

VALID = " validation"
TFLOPS = "throughput per GPU (TFLOP/s/GPU)"


@dataclass(frozen=True)
class Chart:
    """names: in metrics.jsonl, in one picture over the iterations. is_logarithmic: its vertical axis."""

    title: str
    names: tuple[str, ...]
    is_logarithmic: bool = False


# By section, the first things to look at first. What a training does not log leaves its chart empty.
CHARTS: dict[str, tuple[Chart, ...]] = {
    "Losses": (
        Chart("Distillation loss", ("logits distillation loss", f"logits distillation loss{VALID}")),
        Chart("Next-token loss", ("lm loss", f"lm loss{VALID}", "teacher lm loss")),
        Chart("Held-out perplexity", (f"ppl{VALID}",), is_logarithmic=True),
        Chart("Share of tokens whose likeliest id is the teacher's", ("top-1 agreement", f"top-1 agreement{VALID}")),
    ),
    "Health": (
        Chart("Norm of the gradient", ("grad-norm",), is_logarithmic=True),
        Chart("Learning rate", ("learning-rate",)),
        Chart("Skipped iterations", ("number of skipped iterations", "number of nan iterations")),
        Chart("Samples", ("consumed samples",)),
    ),
    "Speed": (
        Chart("Milliseconds an iteration", ("elapsed time per iteration (ms)",)),
        Chart("Tokens a second on a GPU", ("tokens per second per GPU",)),
        Chart("TFLOP/s a GPU", (TFLOPS, f"student {TFLOPS}", f"teacher {TFLOPS}")),
        Chart("Model FLOPs utilization (%)", ("model FLOPs utilization (%)",)),
        Chart(
            "Milliseconds of the parts of an iteration",
            tuple(f"{part}-time" for part in ("batch-generator", "teacher-forward", "forward-backward", "optimizer")),
        ),
        Chart("Most memory of a rank (GiB)", ("peak memory (GiB)",)),
    ),
    "Alignment": (
        Chart("Loss", ("loss", f"loss{VALID}")),
        Chart("Rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
        Chart("Share of pairs whose better answer has the higher reward", ("rewards/accuracies",)),
        Chart("Log-probabilities of the answers", ("logps/chosen", "logps/rejected")),
    ),
}


def charted(*sections: str) -> set[str]:
    """The names in the charts of these sections; without any, in all."""
    return {name for section in sections or CHARTS for chart in CHARTS[section] for name in chart.names}
