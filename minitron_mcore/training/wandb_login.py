"""Whether there are credentials for Weights & Biases. Pure."""

from __future__ import annotations

import inspect
import os

from minitron_mcore.errors import InputError
from minitron_mcore.training.config import LogConfig


def check_wandb(log: LogConfig, rank: int) -> None:
    """Raise InputError where uploading is asked for without an API key; it is looked up on the first rank alone."""
    if log.wandb == "online" and rank == 0 and not is_logged_in():
        remedy = "log in with `wandb login`, or set log.wandb=offline"
        raise InputError("log.wandb", "online", "needs an API key", remedy)


def is_logged_in() -> bool:
    """Whether there is a key; whether the server takes it is not asked."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        return wandb.login(prompt=False, verify=False)
    return bool(wandb.api.api_key)  # older versions; newer ones warn at every use
