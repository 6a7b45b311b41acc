"""Whether stored targets serve the loss of a recipe. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_mcore.distillation.cache.file import has_tails
from minitron_mcore.distillation.config import DistillConfig
from minitron_mcore.errors import InputError

PREFIX = "cache:"
# Any other divergence of sampled targets would be biased.
DIVERGENCES = {"sampled": ("forward_kl",), "top_k": ("forward_kl", "reverse_kl", "jensen_shannon")}


def cache_folder(teacher: str | None) -> Path | None:
    """The folder that distill.teacher=cache:DIR names; None for a teacher in memory."""
    return None if teacher is None else Path(teacher.removeprefix(PREFIX))


def holds_all(settings: dict[str, Any]) -> bool:
    """Whether the teacher's whole distribution is kept."""
    return settings["method"] == "top_k" and not has_tails(settings)


def check_served(settings: dict[str, Any], distill: DistillConfig, key: str) -> None:
    """Raise InputError where the losses of `distill` cannot be had from targets made by `settings`.

    key: what the recipe calls them, with its value.
    """
    there, here = settings["temperature"], distill.temperature
    if here != there and not holds_all(settings):
        rule = f"differs from the temperature {there} of the targets in {key}"
        remedy = f"make them equal, or cache with cache.temperature={here}"
        raise InputError("distill.temperature", here, rule, remedy)
    allowed = DIVERGENCES[settings["method"]]
    if distill.logit_loss not in allowed:
        rule = f"needs more of the teacher than {key} holds, which serves {' and '.join(allowed)}"
        raise InputError(
            "distill.logit_loss", distill.logit_loss, rule, "choose of these, or leave distill.teacher out"
        )
    if distill.top_k:
        rule = f"is for a teacher in memory: what {key} holds was chosen when it was made"
        raise InputError("distill.top_k", distill.top_k, rule, "set distill.top_k=0")
    if distill.correct_teacher:
        rule = f"trains the teacher, and {key} holds none"
        raise InputError("distill.correct_teacher", True, rule, "leave one of the two out")
