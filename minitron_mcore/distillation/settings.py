"""What sections of distillation have in common: temperatures that fp32 carries, keys that would do nothing. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_mcore.errors import InputError

# The loss is T^2 times a divergence that shrinks as 1 / T^2, so that its rounding in fp32 grows as T^2: some 1e-8 T^2
# in the mean of 64 tokens of 300 ids: at T = 100 a few percent of a loss of 0.001. Far below 1 the logits over T leave
# fp32's range.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 100.0


def check_temperature(value: float, key: str) -> None:
    """Raise InputError where the temperature `value`, which the recipe calls `key`, makes no loss in fp32."""
    if not LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE:
        raise InputError(
            f"{key}={value} must lie between {LEAST_TEMPERATURE:g} and {MOST_TEMPERATURE:g}: beyond, fp32 cannot tell "
            "the distributions apart"
        )


def refuse_idle(config: Any, section: str, idle: Mapping[str, str]) -> None:
    """Raise InputError where a key that would do nothing is given, so that nobody waits for its effect.

    config: a section's dataclass. idle: field -> why it does nothing and what to do instead, after the words `tells
    nothing`. A key that is written out as it is by default is as good as left out.
    """
    defaults = type(config)()
    for name, words in idle.items():
        if (value := getattr(config, name)) != getattr(defaults, name):
            raise InputError(f"{section}.{name}={value} tells nothing {words}")
