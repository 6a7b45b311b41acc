"""What a run trains on, from the final hidden states: the next token, the teacher's distribution, or both.

One object serves training, evaluation and distillation; without a teacher it is plain next-token training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from minitron_mcore.distillation.cache.teacher import CachedTeacher
from minitron_mcore.distillation.logits.loss import Model, logit_loss
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.states.loss import StateLosses
from minitron_mcore.distillation.teacher.ahead import Teacher
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import LossSums, run_schedule
from minitron_mcore.runtime.groups import tensor_group
from minitron_mcore.runtime.pace import timed

# Of the loss between logits -> the metric's name.
METRICS = {"lm": "lm loss", "kd": "logits distillation loss"}
METRICS |= {"teacher_lm": "teacher lm loss", "agreement": "top-1 agreement"}


@dataclass
class Objective:
    """The loss between logits, and what runs with it. All losses are reported at every step, whatever their weight."""

    settings: LossSettings
    teacher: Teacher | CachedTeacher | None = None  # None: the next-token loss alone
    states: StateLosses | None = None  # losses between inner states; the teacher leaves what they need (`want_states`)
    window: int = 0  # microbatches the teacher runs ahead; 0: the whole global batch
    timers: Any = None  # megatron.core.timers.Timers; None: nothing is timed

    @property
    def running_teacher(self) -> Teacher | None:
        """The teacher that runs beside the student; None without one, and where its targets are cached."""
        return None if isinstance(self.teacher, CachedTeacher) else self.teacher

    def held_out(self) -> Objective:
        """The objective on other samples than those of training, of which a cache holds nothing."""
        if not isinstance(self.teacher, CachedTeacher):
            return self
        return replace(self, settings=self.settings.without_teacher(), teacher=None)

    def run(
        self, chunks: list[torch.nn.Module], batch: list[Microbatch], *, forward_only: bool = False
    ) -> dict[str, float]:
        """One global batch: the teacher ahead, Megatron's schedule, the losses; their means, and `num_tokens`."""
        states = self.states
        if states is not None and states.alpha is None and not forward_only:
            # No step before this one to work the weight out from: what the batch itself would have given.
            with torch.no_grad():
                states.update(self._pass(chunks, batch, True), trains=True)
        means = self._pass(chunks, batch, forward_only)
        if states is not None:
            states.update(means, trains=not forward_only)
        return means

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of the means that `run` gives, of one batch, or of several together."""
        return means

    def _pass(self, chunks: list[torch.nn.Module], batch: list[Microbatch], forward_only: bool) -> dict[str, float]:
        def run_ahead(window: list[Microbatch]) -> None:
            if self.teacher is not None:
                with timed(self.timers, "teacher-forward", 0):
                    self.teacher.run_ahead(window, train=not forward_only)

        how: dict[str, Any] = {"forward_only": forward_only, "prepare": run_ahead, "window": self.window}
        if self.states is not None:
            how |= {"begin": self.states.begin, "stage_sums": self.states.take_sums}
        return run_schedule(chunks, batch, self.loss, **how)

    def loss(self, model: LanguageModel, hidden_SBH: torch.Tensor, microbatch: Microbatch) -> LossSums:
        """Sums over the microbatch's counted tokens; last stage only (see model/schedule.py)."""
        teacher, microbatch.teacher.final = microbatch.teacher.final, None  # used once
        if isinstance(self.teacher, Teacher):
            teacher = Model(teacher, self.teacher.head_weight())
        labels_SB, mask_SB = microbatch.labels.transpose(0, 1), microbatch.loss_mask.transpose(0, 1)
        how: Any = {"tp_group": tensor_group(), "sequence_parallel": model.config.sequence_parallel, "teacher": teacher}
        with timed(self.timers, "logits-loss"):
            output = logit_loss(hidden_SBH, model.head_weight(), labels_SB, mask_SB, self.settings, **how)
        return output.loss, output.num_tokens, {METRICS[name]: value for name, value in output.sums.items()}
