"""A teacher that is corrected while it teaches: trained on the next token, on the very batches it is distilled from.

arXiv 2408.11796, section 4.1: the pruned student is distilled from the original teacher as that one is being fine-tuned
on the distillation data, which ends on par with correcting it first. For each global batch the teacher makes a training
pass instead of a forward pass; the student learns from the states of that pass, which are those of the weights before
the teacher's step; then the student takes its step, and the teacher its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from minitron_mcore.checkpoint.store import SaveUnderWay, load_training_state
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.distillation.teacher.ahead import Teacher
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import LossSums, run_schedule
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.training.budget import Timetable
from minitron_mcore.training.config import CorrectConfig
from minitron_mcore.training.step import Trained, not_finite, set_schedule


class TrainedTeacher(Teacher):
    """A resident teacher in the student's layout with DDP buffers and an optimizer of its own.

    folder: where its checkpoints go, at the student's iterations; `tell` writes what lies beside the weights.
    """

    def __init__(
        self, teacher: Teacher, correct: CorrectConfig, timetable: Timetable, folder: Path, tell: Callable[[int], None]
    ) -> None:
        super().__init__(teacher.chunks, teacher.architecture)
        self.folder, self.tell = folder, tell
        for chunk in self.chunks:
            chunk.requires_grad_(True).train()
        self.trained = Trained.of(self.chunks, correct, timetable)
        self.objective = Objective(LossSettings(self.architecture.vocab_size, chunk_tokens=correct.loss_chunk_tokens))
        self._means: dict[str, float] = {}

    def _forward(self, run: list[Microbatch], train: bool) -> list[torch.Tensor]:
        """As the frozen teacher's, or if `train` with the gradients of the teacher's next step. Every rank calls."""
        if not train:
            return super()._forward(run, train)
        self.trained.zero_gradients()
        final: dict[Microbatch, torch.Tensor] = {}

        def loss(model: LanguageModel, hidden: torch.Tensor, microbatch: Microbatch) -> LossSums:
            final[microbatch] = hidden.detach()
            return self.objective.loss(model, hidden, microbatch)

        begin = self._capture.begin if self._capture is not None else None
        self._means = run_schedule(self.trained.chunks, run, loss, begin=begin)
        return [final[microbatch] for microbatch in run if microbatch in final]

    def step(self, tokens: int) -> dict[str, float]:
        """The teacher's own step after a student's of `tokens` tokens; skipped if a loss or gradient is NaN or Inf.

        Returns its mean next-token loss, learning rate and gradient norm, by name. Every rank calls.
        """
        _, optimizer, scheduler = self.trained
        learning_rate = optimizer.param_groups[0]["lr"]
        grad_norm = self.trained.apply_gradients(losses_finite=not not_finite(self._means))
        scheduler.step(increment=tokens)
        row = {"lm loss": self._means["lm loss"], "learning-rate": learning_rate, "grad-norm": grad_norm}
        return {f"teacher {name}": value for name, value in row.items()}

    def save(self, iteration: int, tokens: int, runtime: Runtime) -> None:
        """A checkpoint of the teacher, written before the student's of this iteration. All ranks call."""
        progress = {"iteration": iteration}
        self.trained.save(self.folder, progress, runtime, self.architecture, lambda: self.tell(tokens))

    def begin_save(self, iteration: int, tokens: int, runtime: Runtime) -> SaveUnderWay:
        """`save`, which another process goes on with; to be finished before the student's. All ranks call."""
        progress = {"iteration": iteration}
        return self.trained.begin_save(self.folder, progress, runtime, self.architecture, lambda: self.tell(tokens))

    def resume(self, iteration: int, tokens: int) -> None:
        """Resume from the checkpoint of `iteration`, after `tokens` tokens. All ranks call. Raises InputError."""
        load_training_state(self.folder, iteration, *self.trained)
        set_schedule(self.trained.scheduler, tokens)
