"""What the tests of the logit loss share: problems small enough for every rank to hold whole, and their answer by plain
log_softmax and autograd in float64."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.distillation.logit_loss import LogitLossOutput, logit_loss

SCALE = 0.37  # of the loss before backward, as a schedule's gradient scale would be


@dataclass(frozen=True)
class Case:
    vocab_size: int = 37
    rows: int = 48  # of the whole head, padding included
    temperature: float = 1.0
    lm_weight: float = 1.0
    kd_weight: float = 0.0
    teacher: bool = False
    mask: str = "ones"
    sequence_parallel: bool = False
    chunk_size: int = 512
    sequence: int = 8
    batch: int = 3
    hidden_size: int = 16
    teacher_hidden_size: int = 24
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass
class Problem:
    """The whole problem of a case, the same on every rank; fields in the case's dtype."""

    case: Case
    hidden: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    teacher_hidden: Tensor = field(init=False)
    teacher_weight: Tensor = field(init=False)
    labels: Tensor = field(init=False)
    mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        generator = torch.Generator().manual_seed(case.seed)
        shape = (case.sequence, case.batch)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(case.dtype)

        self.hidden, self.weight = normal(*shape, case.hidden_size), normal(case.rows, case.hidden_size)
        self.teacher_hidden = normal(*shape, case.teacher_hidden_size)
        self.teacher_weight = normal(case.rows, case.teacher_hidden_size)
        self.labels = torch.randint(case.vocab_size, shape, generator=generator)
        self.mask = torch.ones(shape)
        if case.mask != "ones":
            self.mask = (torch.rand(shape, generator=generator) > 0.4).float()
            self.labels[self.mask == 0] = -100
        if case.mask == "fractions":
            self.mask *= torch.rand(shape, generator=generator)

    def dense(self) -> dict[str, Tensor]:
        """Losses and gradients by float64 log_softmax over the true vocabulary."""
        case = self.case
        hidden, weight = self.hidden.double().requires_grad_(), self.weight.double().requires_grad_()
        logits = (hidden @ weight.T)[..., : case.vocab_size]
        labels = self.labels.clamp(min=0).unsqueeze(-1)
        token_loss = -torch.log_softmax(logits, -1).gather(-1, labels).squeeze(-1)
        lm_loss, kd_loss = (token_loss * self.mask).sum(), torch.zeros((), dtype=torch.float64)
        if case.teacher:
            teacher = (self.teacher_hidden.double() @ self.teacher_weight.double().T)[..., : case.vocab_size]
            log_p = torch.log_softmax(teacher / case.temperature, -1)
            log_q = torch.log_softmax(logits / case.temperature, -1)
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
            kd_loss = case.temperature**2 * (divergence * self.mask).sum()
        loss = case.lm_weight * lm_loss + case.kd_weight * kd_loss
        (SCALE * loss).backward()
        assert hidden.grad is not None and weight.grad is not None
        return {
            "loss": loss.detach(),
            "lm_loss": lm_loss.detach(),
            "kd_loss": kd_loss.detach(),
            "num_tokens": self.mask.double().sum(),
            "token_loss": token_loss.detach() * (self.mask > 0),
            "hidden": hidden.grad,
            "weight": weight.grad,
        }


def part(tensor: Tensor) -> Tensor:
    """This rank's contiguous part along the first axis, contiguous or not in memory as it comes."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def run(problem: Problem, weight: Tensor, hidden: Tensor, **changes: object) -> LogitLossOutput:
    case = problem.case
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None
    if case.teacher:
        teacher_hidden = problem.teacher_hidden.detach()
        teacher_hidden = (part(teacher_hidden) if case.sequence_parallel else teacher_hidden).requires_grad_()
        teacher_weight = part(problem.teacher_weight).detach().requires_grad_()
    arguments: dict = {
        "vocab_size": case.vocab_size,
        "tp_group": dist.group.WORLD,
        "sequence_parallel": case.sequence_parallel,
        "teacher_hidden_SBH": teacher_hidden,
        "teacher_weight_VH": teacher_weight,
        "temperature": case.temperature,
        "lm_weight": case.lm_weight,
        "kd_weight": case.kd_weight,
        "chunk_size": case.chunk_size,
    }
    output = logit_loss(hidden, weight, problem.labels, problem.mask, **(arguments | changes))
    if output.loss.requires_grad:
        (SCALE * output.loss).backward()
    for tensor in (teacher_hidden, teacher_weight):
        assert tensor is None or tensor.grad is None, "the teacher got a gradient"
    return output


def relative(value: Tensor, reference: Tensor) -> float:
    """Relative Frobenius error; against a reference of zeros (a shard of padding) any other value is infinitely far."""
    distance, size = (value.double() - reference).norm().item(), reference.norm().item()
    return distance / size if size else (0.0 if distance == 0.0 else float("inf"))
