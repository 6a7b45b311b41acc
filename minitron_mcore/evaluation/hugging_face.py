"""A Hugging Face folder's model on the first rank, through transformers: its loss on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minitron_mcore.data.dataset import Dataset, batches_once
from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.held_out import perplexity
from minitron_mcore.files import first_line
from minitron_mcore.runtime.libraries import MODEL_AS_DATA

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_hugging_face(folder: Path, precision: str, device: torch.device) -> Any:
    """The model in evaluation mode, whole, on `device`. Raises InputError where transformers cannot load it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision], **MODEL_AS_DATA)
    except Exception as error:  # transformers raises whatever the files broke in
        rule = f"cannot be loaded by transformers ({first_line(error)})"
        raise InputError("", folder, rule, "mend it, or name another") from error
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    return model.to(device).eval()


@torch.no_grad()
def mean_loss_of(model: Any, dataset: Dataset, samples: int, micro_batch_size: int) -> dict[str, float]:
    """`lm loss` in nats over all counted tokens of the first `samples` sequences, and `ppl`, as held_out.mean_loss."""
    place = {"data_parallel_rank": 0, "data_parallel_size": 1}
    total = count = 0.0
    for batch in batches_once(dataset, range(samples), micro_batch_size=micro_batch_size, **place):
        batch = {name: batch[name].to(model.device) for name in ("tokens", "labels", "loss_mask")}
        logits_BSV = model(batch["tokens"]).logits.float()
        loss_BS = torch.nn.functional.cross_entropy(logits_BSV.transpose(1, 2), batch["labels"], reduction="none")
        mask_BS = batch["loss_mask"].double()
        total, count = total + float((loss_BS.double() * mask_BS).sum()), count + float(mask_BS.sum())
    loss = total / (count or 1.0)
    return {"lm loss": loss, "ppl": perplexity(loss)}
