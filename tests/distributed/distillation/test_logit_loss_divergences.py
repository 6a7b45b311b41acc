"""Every divergence of the logit loss, over the whole vocabulary and over few outcomes, against its definition in
float64 on the whole vocabulary, at TP 1, 2 and 4: values, reported sums and all gradients."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_mcore.distillation.logits.loss import Model
from minitron_mcore.distillation.logits.sparse_target import SparseTarget
from tests.distributed.distillation.test_logit_loss import BF16_TOLERANCE, TOLERANCE, equal_models, worst
from tests.distributed.logit_loss_problem import Case, Problem, part, run
from tests.distributed.ranks import run_on_ranks
from tests.unit.distillation.test_logit_loss_calls import call

DENSE = [
    ("forward_kl", 0.5),
    ("reverse_kl", 0.5),
    ("jensen_shannon", 0.5),
    ("jensen_shannon", 0.1),
    ("mse", 0.5),
    ("cosine", 0.5),
]
PROBABILISTIC = DENSE[:4]
# Vocabularies without padding, with some, and with whole shards of it (at TP 4, 24 of 48 rows).
SIZES = ((48, None), (37, 7), (33, 24), (24, 5))


def vary(cases: list[Case]) -> list[Case]:
    """The cases with everything else taken in turn, so that each setting meets each other one somewhere."""
    varied = []
    for number, case in enumerate(cases):
        vocab_size, chunk_size = SIZES[5 * number // 2 % 4]
        lm_weight, kd_weight = ((0.0, 1.0), (0.3, 0.7), (0.0, 0.4))[number % 3]
        case = replace(
            case,
            vocab_size=vocab_size,
            chunk_size=chunk_size,
            lm_weight=lm_weight,
            kd_weight=kd_weight,
            teacher=not case.target,
            sequence_parallel=number % 2 == 1,
            recompute=number % 5 in (1, 2),
            top_k=vocab_size + case.top_k if case.top_k < 0 else case.top_k,
            seed=number,
        )
        varied.append(case)
    return varied


def dense_cases() -> list[Case]:
    grid = itertools.product(DENSE, (1.0, 2.0), ("zeros", "fractions"))
    return vary([Case(divergence=name, mix=mix, temperature=t, mask=mask) for (name, mix), t, mask in grid])


def top_cases() -> list[Case]:
    """top_k of 1, 5, the vocabulary less one, and all of it (100 stands for that, -1 for the one before)."""
    cases = []
    for (name, mix), t, mask, top_k in itertools.product(
        PROBABILISTIC, (1.0, 2.0), ("zeros", "fractions"), (1, 5, -1, 100)
    ):
        cases.append(Case(divergence=name, mix=mix, temperature=t, mask=mask, top_k=top_k))
    return [replace(case, top_k=min(case.top_k, case.vocab_size)) for case in vary(cases)]


def target_cases() -> list[Case]:
    cases = []
    for (name, mix), mask, target in itertools.product(PROBABILISTIC, ("zeros", "fractions"), ("all", "top", "drawn")):
        if (name, target) != ("reverse_kl", "drawn"):
            cases.append(Case(divergence=name, mix=mix, mask=mask, target=target))
    return vary(cases)


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("make", [dense_cases, top_cases, target_cases])
def test_values_and_gradients_against_float64(tensor_parallel: int, make) -> None:  # type: ignore[no-untyped-def]
    for rank, result in enumerate(run_on_ranks(worst, tensor_parallel, make())):
        for name, (error, case) in result.items():
            assert error <= TOLERANCE, f"{name} on rank {rank}: {error} in {case}"


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_bf16_against_float64_of_the_same_bf16_inputs(tensor_parallel: int) -> None:
    cases = [
        replace(case, dtype=torch.bfloat16) for case in (*dense_cases()[::4], *top_cases()[::7], *target_cases()[::5])
    ]
    for rank, result in enumerate(run_on_ranks(worst, tensor_parallel, cases)):
        for name, (error, case) in result.items():
            bound = BF16_TOLERANCE if name in ("hidden", "weight") else TOLERANCE
            assert error <= bound, f"{name} on rank {rank}: {error} in {case}"


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_tail_less_probable_than_fp32_has_numbers_for(tensor_parallel: int) -> None:
    """At T = 0.1 logits are spread over 400 and more: with 20 ids selected the teacher's tail has e^-90 to e^-250. The
    rounding of such a logit is 1e-5, which is that of its exponential: a bound of 1e-4. (With tails held above 1e-37
    the reverse KL's gradient was off by half.)"""
    cases = [
        Case(teacher=True, lm_weight=0.0, kd_weight=1.0, temperature=0.1, top_k=20, divergence=name, mix=mix, seed=seed)
        for name, mix in PROBABILISTIC
        for seed in (1, 2)
    ]
    tails = torch.log_softmax(Problem(cases[0]).teacher_logits() / 0.1, -1).sort(-1).values[..., :-20].logsumexp(-1)
    assert tails.min() < -90 < tails.max()
    for rank, result in enumerate(run_on_ranks(worst, tensor_parallel, cases)):
        for name, (error, case) in result.items():
            assert error <= 1e-4, f"{name} on rank {rank}: {error} in {case}"


def same_results(first: Case, second: Case) -> float:
    """Largest difference of loss and gradients, relative to the first's."""
    found = []
    for case in (first, second):
        problem = Problem(case)
        hidden, weight = problem.hidden.clone().requires_grad_(), part(problem.weight).clone().requires_grad_()
        output = run(problem, weight, hidden)
        assert hidden.grad is not None and weight.grad is not None
        found.append((output.loss.detach(), output.sums["kd"], hidden.grad, weight.grad))
    return max(((a - b).norm() / a.norm().clamp_min(1e-30)).item() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_all_outcomes_are_the_whole_vocabulary(tensor_parallel: int) -> None:
    """top_k = V, and a sparse target of all ids, against the loss over the whole vocabulary."""
    for name, mix in PROBABILISTIC:
        whole = Case(divergence=name, mix=mix, kd_weight=0.7, lm_weight=0.3, teacher=True, mask="fractions")
        for other in (replace(whole, top_k=whole.vocab_size), replace(whole, teacher=False, target="all")):
            for difference in run_on_ranks(same_results, tensor_parallel, whole, other):
                assert difference <= TOLERANCE, other


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_equal_models_have_no_loss_and_no_gradient(tensor_parallel: int) -> None:
    """Exactly none, but for a cosine, whose two norms are rounded: 24 tokens, 1e-7 each, and norms of 4."""
    for (name, mix), temperature in itertools.product(DENSE, (1.0, 2.0)):
        case = Case(lm_weight=0.0, kd_weight=1.0, teacher=True, temperature=temperature, divergence=name, mix=mix)
        for results in run_on_ranks(equal_models, tensor_parallel, case):
            assert max(max(result) for result in results) <= (1e-5 if name == "cosine" else 0.0), case


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(cases: list[Case]) -> list[int]:
    counts = []
    for case in cases:
        problem = Problem(case)
        hidden, weight = problem.hidden.clone().requires_grad_(), part(problem.weight).clone().requires_grad_()
        with Operations() as seen:
            run(problem, weight, hidden)
        counts.append(seen.count)
    return counts


def test_outcomes_are_not_worked_on_one_by_one() -> None:
    """Eighteen outcomes more take no eighteen calls of torch more."""
    few, many = (Case(teacher=True, kd_weight=1.0, top_k=top_k) for top_k in (2, 20))
    for counts in run_on_ranks(operations, 2, [few, many]):
        assert abs(counts[1] - counts[0]) < 18


def ties(case: Case) -> tuple[float, list[float]]:
    """Agreement, and the weight gradient's norm by row, where rows 3, 4, 30 and 31 of the teacher's head are equal and
    the largest, and rows 4 and 30 of the student's."""
    problem = Problem(case)
    for weight, hidden, rows in (
        (problem.teacher_weight, problem.teacher_hidden, (3, 4, 30, 31)),
        (problem.weight, problem.hidden, (4, 30)),
    ):
        hidden.abs_()
        weight[list(rows)] = 3.0
    hidden, weight = problem.hidden.clone().requires_grad_(), part(problem.weight).clone().requires_grad_()
    output = run(problem, weight, hidden)
    assert weight.grad is not None and "agreement" in output.sums
    return output.sums["agreement"].item(), weight.grad.norm(dim=1).tolist()


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_ties_go_to_the_lower_id(tensor_parallel: int) -> None:
    """Of four equal largest logits two are taken, ids 3 and 4, on whatever shards they lie: the other two are in the
    tail, and the student's gradient at them has the tail's factor. And the models' top ids differ, 3 against 4."""
    gradients = {}
    for top_k in (2, 4):
        case = Case(vocab_size=48, teacher=True, lm_weight=0.0, kd_weight=1.0, top_k=top_k)
        results = run_on_ranks(ties, tensor_parallel, case)
        assert all(agreement == 0.0 for agreement, _ in results)
        gradients[top_k] = [norm for _, norms in results for norm in norms]
    norms = gradients[2]
    assert norms[4] > 1.5 * norms[30] or norms[4] < norms[30] / 1.5, "4 is an outcome of its own, 30 in the tail"
    norms = gradients[4]
    assert abs(norms[4] / norms[30] - 1) < 1e-5


def test_wrong_outcomes_and_divergences_are_named() -> None:
    hidden, weight = torch.zeros(2, 1, 4), torch.zeros(8, 4)
    labels, mask = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    sparse = SparseTarget(torch.zeros(2, 1, 1, dtype=torch.long), torch.zeros(2, 1, 1), tail=False)
    model = Model(hidden, weight)
    for changes, message in (
        ({"divergence": "chi"}, "divergence=chi must be one of forward_kl, "),
        ({"divergence": "jensen_shannon", "jensen_shannon_mix": 1.0}, "jensen_shannon_mix=1.0 must lie"),
        ({"top_k": 9, "teacher": model}, "top_k=9 must lie between 0 and the vocabulary size, 8"),
        ({"top_k": 2, "divergence": "mse", "teacher": model}, "top_k=2 does not go with mse, which compares all"),
        ({"divergence": "mse", "teacher": sparse}, "divergence=mse compares all logits"),
        ({"top_k": 1, "teacher": sparse}, "top_k=1 must be 0 with a sparse target, which has its own outcomes"),
        ({"divergence": "reverse_kl", "teacher": sparse}, "reverse_kl is infinite"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call(hidden, weight, labels, mask, **changes)
    with pytest.raises(ValueError, match="must be of one shape"):
        SparseTarget(torch.zeros(2, 1, 1, dtype=torch.long), torch.zeros(2, 1, 2), tail=True)
