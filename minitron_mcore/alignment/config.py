"""Recipe section `align`: everything of `train`, and what answers are trained for."""

import dataclasses
import math
from typing import Annotated, Any, Optional

from minitron_mcore.errors import InputError
from minitron_mcore.keys import OneOf, key, refuse_idle, section
from minitron_mcore.training.config import TrainConfig

# Reward-aware preference optimisation: pairs whose answers have rewards.
REWARDED = ("rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl")
# What compares the two answers of a pair with those of a reference; simpo does without.
REFERENCED = ("dpo", "ipo", *REWARDED)
PREFERENCES = (*REFERENCED, "simpo")
METHODS = ("sft", *PREFERENCES)
# Methods whose papers, or whose authors, average an answer's log-probabilities over its tokens.
AVERAGED = ("ipo", "simpo")
SMOOTHED = ("dpo", "simpo")
BUDGETS = ("tokens", "samples", "epochs")


def idle_with(method: str) -> list[str]:
    """The keys that have no effect with a method."""
    idle = ["beta", "sft_weight", "log_probs"] if method == "sft" else ["mean"]
    idle += [] if method in REWARDED else ["eta"]
    idle += [] if method == "simpo" else ["gamma"]
    idle += [] if method in SMOOTHED else ["label_smoothing"]
    return idle + ([] if method in REFERENCED else ["reference"])


@section
class AlignConfig(TrainConfig):
    """Supervised fine-tuning of a model on the answers of chats, or preference optimisation on pairs of answers.

    A sample is a chat, or a pair. The default learning rates suit `sft`; preferences take much less, as Zephyr's dpo
    5e-7 (arXiv 2310.16944).
    """

    method: Annotated[str, OneOf(*METHODS)] = key("sft", "sft: the answers' next tokens; else of pairs of answers")
    samples: int = key(0, "the budget in samples instead of tokens", at_least=0, budget=True)
    epochs: float = key(0.0, "the budget in passes over the samples", at_least=0, budget=True)
    lr: float = key(1e-5, "peak learning rate", at_least=0)
    min_lr: float = key(1e-6, "learning rate at the end", at_least=0)
    mean: Annotated[str, OneOf("tokens", "samples")] = key(
        "tokens", "with sft: every counted token of a global batch weighs the same, or every sample"
    )
    beta: float = key(0.1, "of preferences: how closely the reference is kept to; of simpo its scale", above=0)
    eta: float = key(1.0, "with rpo_*: what the gap between two rewards is multiplied by", above=0)
    gamma: float = key(0.5, "with simpo: the margin that is wanted, before beta", at_least=0)
    label_smoothing: float = key(
        0.0, "with dpo and simpo: the share of pairs that are taken to be the wrong way round", at_least=0, below=0.5
    )
    sft_weight: float = key(0.0, "of preferences: weight of the chosen answer's own loss", at_least=0)
    log_probs: Optional[Annotated[str, OneOf("sum", "mean")]] = key(
        None, "of an answer, over its tokens; null: mean with ipo and simpo, sum with the others"
    )
    reference: Annotated[str, OneOf("precomputed", "resident")] = key(
        "precomputed",
        "the model that training starts from: its log-probabilities are worked out before, or it stays beside",
        may_change=True,
    )
    stages: dict[str, dict[str, Any]] = key(
        {},
        "several rounds, by name: keys of `align` and `chat` in which each differs from the sections; each starts from "
        "the one before, which is its reference",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in BUDGETS if getattr(self, name)]
        if len(given) > 1:
            rule = f"and align.{given[1]}={getattr(self, given[1])} both give the budget"
            raise InputError(given[0], getattr(self, given[0]), rule, "leave one of them out")
        if not self.stages:  # which may differ in their method
            why = dict.fromkeys(idle_with(self.method), f"with align.method={self.method}")
            refuse_idle(self, why, "leave it out, or choose another align.method")

    @property
    def averages(self) -> bool:
        """Whether an answer's log-probabilities are averaged over its tokens."""
        return self.method in AVERAGED if self.log_probs is None else self.log_probs == "mean"


def in_tokens(config: AlignConfig, rows: int, units: int, row_length: int) -> AlignConfig:
    """The budget as one of tokens, rows times their length, where a pass has so many `rows`, which hold `units`
    samples."""
    tokens = config.tokens
    if not tokens:
        passes = config.epochs or config.samples / units
        # A product of rounded numbers, as of 0.1 epochs of 10 rows, is not to count a row too many.
        tokens = math.ceil(round(passes * rows, 6)) * row_length
    return dataclasses.replace(config, tokens=tokens, samples=0, epochs=0.0, stages={})
