"""What the tests of the logit loss share: problems small enough for every rank to hold whole, and their answer by plain
log_softmax and autograd in float64."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.distillation.logits.loss import LogitLossOutput, Model, logit_loss
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.logits.sparse_target import SparseTarget

SCALE = 0.37  # of the loss before backward, as a schedule's gradient scale would be


def place() -> int | str:
    """This rank's device; in the test itself the CPU."""
    return torch.cuda.current_device() if dist.is_initialized() else "cpu"


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
    chunk_size: int | None = 512
    sequence: int = 8
    batch: int = 3
    hidden_size: int = 16
    teacher_hidden_size: int = 24
    dtype: torch.dtype = torch.float32
    seed: int = 0
    divergence: str = "forward_kl"
    mix: float = 0.5
    top_k: int = 0
    # In place of the teacher's hidden states: "" (none), "all" (every id, some slots unused), "top" (5 ids and a tail),
    # "drawn" (7 ids with weights that sum to about 1, no tail).
    target: str = ""
    recompute: bool = False
    scale: float = SCALE


@dataclass
class Problem:
    """The whole problem of a case, the same on every rank, drawn on the CPU; fields in the case's dtype."""

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
        for name in ("hidden", "weight", "teacher_hidden", "teacher_weight", "labels", "mask"):
            setattr(self, name, getattr(self, name).to(place()))

    def teacher_logits(self) -> Tensor:
        """fp64, of the true vocabulary."""
        logits = self.teacher_hidden.double() @ self.teacher_weight.double().T
        return logits[..., : self.case.vocab_size]

    def sparse_target(self) -> SparseTarget | None:
        case = self.case
        if not case.target:
            return None
        log_probs = torch.log_softmax(self.teacher_logits(), -1)
        generator = torch.Generator().manual_seed(case.seed + 1)
        order = torch.argsort(torch.rand(log_probs.shape, generator=generator)).to(place())
        if case.target == "top":
            order = log_probs.topk(5).indices
        if case.target == "drawn":
            order = order[..., :7]
        ids, values = order, log_probs.gather(-1, order)
        if case.target == "drawn":
            shift = torch.randn(*log_probs.shape[:-1], 1, generator=generator).to(place())
            values = torch.log_softmax(values, -1) + 0.1 * shift
        unused = torch.zeros(*ids.shape[:-1], 2, device=place())
        ids = torch.cat((ids[..., :2], unused.long() - 1, ids[..., 2:]), -1)
        values = torch.cat((values[..., :2], unused.double(), values[..., 2:]), -1)
        return SparseTarget(ids, values.float(), tail=case.target != "drawn")

    def divergence(self, logits: Tensor) -> Tensor:
        """Of each token, [S, B], from the student's fp64 logits of the true vocabulary, by the definition."""
        case, teacher = self.case, self.teacher_logits()
        if case.divergence == "mse":
            return (logits - teacher).square().mean(-1)
        if case.divergence == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(logits, teacher, dim=-1)
        p, q = (torch.softmax(each / case.temperature, -1) for each in (teacher, logits))
        target = self.sparse_target()
        if target is not None:
            used = target.ids >= 0
            q = outcomes(q, target.ids.clamp(min=0), used)
            p = target.log_probs.double().exp() * used
            rest = 1 - p.sum(-1, keepdim=True) if case.target == "top" else torch.zeros_like(p[..., :1])
            p = torch.cat((p, rest), -1)
        elif case.top_k:
            ids = teacher.topk(case.top_k).indices
            p, q = outcomes(p, ids), outcomes(q, ids)
        if case.divergence == "reverse_kl":
            p, q = q, p
        if case.divergence == "jensen_shannon":
            m = case.mix * p + (1 - case.mix) * q
            divergence = case.mix * kl(p, m) + (1 - case.mix) * kl(q, m)
        else:
            divergence = kl(p, q)
        return case.temperature**2 * divergence

    def dense(self) -> dict[str, Tensor]:
        """Losses and gradients by float64 softmax and autograd over the true vocabulary."""
        case = self.case
        hidden, weight = self.hidden.double().requires_grad_(), self.weight.double().requires_grad_()
        logits = (hidden @ weight.T)[..., : case.vocab_size]
        labels = self.labels.clamp(min=0).unsqueeze(-1)
        token_loss = -torch.log_softmax(logits, -1).gather(-1, labels).squeeze(-1)
        lm_loss, kd_loss = (token_loss * self.mask).sum(), torch.zeros((), dtype=torch.float64)
        found = {}
        if case.teacher or case.target:
            kd_loss = (self.divergence(logits) * self.mask).sum()
            teacher = self.teacher_logits()
            teacher_loss = -torch.log_softmax(teacher, -1).gather(-1, labels).squeeze(-1)
            best = teacher.argmax(-1)
            target = self.sparse_target()
            if target is None:
                found["teacher_lm_loss"] = (teacher_loss * self.mask).sum()
            else:
                slot = target.log_probs.masked_fill(target.ids < 0, -1e30).argmax(-1, keepdim=True)
                best = target.ids.gather(-1, slot).squeeze(-1)
            found["top1_agreement"] = ((logits.argmax(-1) == best) * self.mask.double()).sum()
        loss = case.lm_weight * lm_loss + case.kd_weight * kd_loss
        (case.scale * loss).backward()
        assert hidden.grad is not None and weight.grad is not None
        return found | {
            "loss": loss.detach(),
            "lm_loss": lm_loss.detach(),
            "kd_loss": kd_loss.detach(),
            "num_tokens": self.mask.double().sum(),
            "token_loss": token_loss.detach() * (self.mask > 0),
            "hidden": hidden.grad,
            "weight": weight.grad,
        }


def outcomes(probabilities: Tensor, ids: Tensor, used: Tensor | None = None) -> Tensor:
    """The probabilities of `ids` (0 in slots not used), and of all other ids together."""
    used = torch.ones_like(ids, dtype=torch.bool) if used is None else used
    rest = torch.ones_like(probabilities)
    for slot in range(ids.shape[-1]):
        rest = rest - torch.zeros_like(rest).scatter(-1, ids[..., slot : slot + 1], used[..., slot : slot + 1].double())
    chosen = probabilities.gather(-1, ids) * used
    return torch.cat((chosen, (probabilities * rest).sum(-1, keepdim=True)), -1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q) over the outcomes of which p is not zero."""
    some = p > 0
    return (p * (p.where(some, 1.0) / q.where(some, 1.0)).log()).sum(-1)


def part(tensor: Tensor) -> Tensor:
    """This rank's contiguous part along the first axis, contiguous or not in memory as it comes."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def run(problem: Problem, weight: Tensor, hidden: Tensor, **changes: object) -> LogitLossOutput:
    case = problem.case
    teacher: Model | SparseTarget | None = problem.sparse_target()
    if case.teacher:
        teacher_hidden = problem.teacher_hidden.detach()
        teacher_hidden = (part(teacher_hidden) if case.sequence_parallel else teacher_hidden).requires_grad_()
        teacher = Model(teacher_hidden, part(problem.teacher_weight).detach().requires_grad_())
    settings: dict = {
        "vocab_size": case.vocab_size,
        "temperature": case.temperature,
        "lm_weight": case.lm_weight,
        "kd_weight": case.kd_weight,
        "chunk_tokens": case.chunk_size,
        "divergence": case.divergence,
        "jensen_shannon_mix": case.mix,
        "top_k": case.top_k,
        "recompute": case.recompute,
    }
    output = logit_loss(
        hidden,
        weight,
        problem.labels,
        problem.mask,
        LossSettings(**(settings | changes)),
        tp_group=dist.group.WORLD,
        sequence_parallel=case.sequence_parallel,
        teacher=teacher,
    )
    if output.loss.requires_grad:
        (case.scale * output.loss).backward()
    if isinstance(teacher, Model):
        assert teacher.hidden.grad is None and teacher.weight.grad is None, "the teacher got a gradient"
    return output


def relative(value: Tensor, reference: Tensor) -> float:
    """Relative Frobenius error; against a reference of zeros (a shard of padding) any other value is infinitely far."""
    distance, size = (value.double() - reference).norm().item(), reference.norm().item()
    return distance / size if size else (0.0 if distance == 0.0 else float("inf"))
