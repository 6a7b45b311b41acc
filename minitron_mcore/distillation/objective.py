"""What a run trains on, from the final hidden states: the next token, the teacher's distribution, or both.

One object serves training, evaluation and distillation; without a teacher it is plain next-token training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from minitron_mcore.distillation.logit_loss import logit_loss
from minitron_mcore.distillation.teacher import Teacher
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.schedule import LossSums, Microbatch, run_schedule


@dataclass
class Objective:
    """Weights of the two losses; `teacher` None means next-token loss alone. Both are reported at every step."""

    vocab_size: int
    lm_weight: float = 1.0
    kd_weight: float = 0.0
    temperature: float = 1.0
    chunk_tokens: int = 512
    teacher: Teacher | None = None
    window: int = 0  # microbatches the teacher runs ahead; 0: the whole global batch

    def run(
        self, chunks: list[torch.nn.Module], batch: list[Microbatch], *, forward_only: bool = False
    ) -> dict[str, float]:
        """Megatron's schedule over a global batch with the teacher ahead of it; mean losses and `num_tokens`."""
        return run_schedule(
            chunks, batch, self.loss, forward_only=forward_only, prepare=self.prepare, window=self.window
        )

    def prepare(self, batch: list[Microbatch]) -> None:
        """Run the teacher ahead of the student over the whole batch; every rank calls, before the schedule."""
        if self.teacher is not None:
            self.teacher.run_ahead(batch)

    def loss(self, model: LanguageModel, hidden_SBH: torch.Tensor, microbatch: Microbatch) -> LossSums:
        """Sums over the microbatch's counted tokens; last stage only (see model/schedule.py)."""
        teacher = self.teacher
        output = logit_loss(
            hidden_SBH,
            model.head_weight(),
            microbatch["labels"].transpose(0, 1).contiguous(),
            microbatch["loss_mask"].transpose(0, 1).contiguous(),
            vocab_size=self.vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            sequence_parallel=model.config.sequence_parallel,
            teacher_hidden_SBH=microbatch.pop("teacher_hidden") if teacher is not None else None,
            teacher_weight_VH=teacher.head_weight() if teacher is not None else None,
            temperature=self.temperature,
            lm_weight=self.lm_weight,
            kd_weight=self.kd_weight,
            chunk_size=self.chunk_tokens,
        )
        sums = {"lm loss": output.lm_loss}
        if teacher is not None:
            sums["logits distillation loss"] = output.kd_loss
        return output.loss, output.num_tokens, sums
