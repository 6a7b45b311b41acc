"""The Python interface: the examples of docs/api.md as they stand there, what they give, and what is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.distributed.models import assemble, gather_named, tiny
from tests.distributed.ranks import REPOSITORY, run_on_ranks

EXAMPLES = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8"), re.S)


def some_batches(rows: tuple[int, ...] = (3, 3, 2)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, 1003, (count, 16), generator=generator) for count in rows]


def run_examples(folder: Path) -> dict[str, Any]:
    """All blocks of the page one after another, as in a notebook; and what the names then hold."""
    import minitron_mcore.api as minitron
    from minitron_mcore.model.initialize import named_parameters

    batches = some_batches()
    minitron.save(minitron.build(tiny("llama"), seed=3), folder / "teacher")
    names: dict[str, Any] = {"batches": batches}
    home = os.getcwd()
    os.chdir(folder)
    try:
        for example in EXAMPLES:
            exec(compile(example, "docs/api.md", "exec"), names)
    finally:
        os.chdir(home)
    teacher, student, plan = names["teacher"], names["student"], names["plan"]
    read = minitron.load(folder / "student")
    hidden: list[torch.Tensor] = []
    handles = [
        layer.mlp.linear_fc2.register_forward_pre_hook(lambda _, given: hidden.append(given[0].detach().double()))
        for layer in teacher.chunks[0].decoder.layers
    ]
    for tokens in batches:
        teacher.chunks[0](tokens, torch.arange(16).expand(tokens.shape).contiguous(), None)
    for handle in handles:
        handle.remove()
    weights = [layer.mlp.linear_fc2.weight.double() for layer in teacher.chunks[0].decoder.layers]
    return {
        "before": names["before"],
        "after": names["after"],
        "losses": names["losses"],
        "plan": plan,
        "without_two": names["without_two"].layers,
        "menu": names["menu"],
        "ffn": names["ffn"],
        "by_contribution": names["by_contribution"].ffn,
        "states": [torch.cat(hidden[layer::4], dim=1) for layer in range(4)],
        "weights": weights,
        "student": gather_named([row for chunk in student.chunks for row in named_parameters(chunk)]),
        "read": gather_named([row for chunk in read.chunks for row in named_parameters(chunk)]),
        "dense": dense_loss(teacher, batches),
    }


def dense_loss(model: Any, batches: list[torch.Tensor]) -> float:
    """Cross-entropy in float64 from the whole logits, next token by next token."""
    losses = []
    for tokens in batches:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()
        with torch.no_grad():
            hidden = model.chunks[0](tokens, positions, None)
            logits = model.chunks[0].logits(hidden)[..., : model.architecture.vocab_size].double().transpose(0, 1)
        logits, labels = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_on_ranks(run_examples, 1, tmp_path_factory.mktemp("api"))[0]


def test_the_examples_give_what_they_say(found: dict[str, Any]) -> None:
    plan = found["plan"]
    assert (plan.student.ffn_hidden_size, plan.student.num_layers) == (64, 3)
    assert set(found["losses"]) == {"l2/mean", "mean/mean", "var/var"}
    assert all(6.5 < loss < 7.5 for loss in [*found["losses"].values(), found["after"]]), "about log 1003"
    assert len(found["menu"].depth["lm_loss@1"]) == 4
    assert found["without_two"] == sorted(numpy.argsort(-found["menu"].depth["lm_loss@1"])[:2].tolist())


def test_loss_is_that_of_whole_logits(found: dict[str, Any]) -> None:
    """fp32 against float64: 1e-5 of a loss of 7."""
    assert found["before"] == pytest.approx(found["dense"], rel=1e-5)


def test_a_saved_student_is_read_back_to_the_bit(found: dict[str, Any]) -> None:
    architecture = found["plan"].student
    student, read = (assemble([found[name]], architecture) for name in ("student", "read"))
    assert student.keys() == read.keys()
    assert all(torch.equal(student[name], read[name]) for name in student)


def test_a_metric_of_ones_own_is_its_formula(found: dict[str, Any]) -> None:
    """sqrt over samples and tokens of (x ‖w‖)², in float64 from the recorded states; fp32 sums agree to 1e-5."""
    for layer, (states_SBF, weight) in enumerate(zip(found["states"], found["weights"], strict=True)):
        expected = (states_SBF * weight.norm(dim=0)).square().sum((0, 1)).sqrt().detach().numpy()
        numpy.testing.assert_allclose(found["ffn"][layer], expected, rtol=1e-5)
        if layer in found["by_contribution"]:
            assert found["by_contribution"][layer] == sorted(numpy.argsort(-expected)[:64].tolist())


def scored_on_ranks(parallel: dict[str, Any], world_size: int) -> tuple[list[float], Any]:
    import minitron_mcore.api as minitron

    runtime = minitron.start(**parallel)
    batches = some_batches((3, 3, 3, 2))
    if not parallel:  # data parallel: every rank gives its own, as many
        batches = batches[runtime.rank :: world_size]
    teacher = minitron.build(tiny("llama"), seed=3)
    scores = minitron.score(teacher, batches)
    student = minitron.prune(teacher, minitron.plan(scores, ffn_hidden_size=64, num_layers=2))
    return [minitron.lm_loss(teacher, batches), minitron.lm_loss(student, batches)], scores.ffn


def test_layouts_agree() -> None:
    """Losses and scores in fp32, to 1e-5: another order of sums."""
    losses, ffn = run_on_ranks(scored_on_ranks, 1, {}, 1)[0]
    for parallel in ({"tensor": 2, "sequence": True}, {"pipeline": 2}, {}):
        for found_losses, found_ffn in run_on_ranks(scored_on_ranks, 2, parallel, 2):
            assert found_losses == pytest.approx(losses, rel=1e-5), parallel
            numpy.testing.assert_allclose(found_ffn, ffn, rtol=1e-5, atol=1e-5 * ffn.max())


def refusals(folder: Path) -> dict[str, str]:
    import minitron_mcore.api as minitron

    teacher, other = minitron.build(tiny("llama")), minitron.build(tiny("llama", num_layers=2))
    batches = some_batches()
    scores = minitron.score(teacher, batches, method="random")
    plan = minitron.plan(scores, num_layers=2, residual_matrices=("query",))
    (folder / "taken").mkdir()
    (folder / "taken" / "file").touch()
    tries: dict[str, Any] = {
        "aggregation": lambda: minitron.score(teacher, batches, aggregation="max/mean"),
        "method": lambda: minitron.score(teacher, batches, method="guess"),
        "empty": lambda: minitron.score(teacher, []),
        "floats": lambda: minitron.lm_loss(teacher, [torch.zeros(2, 4)]),
        "shape": lambda: minitron.lm_loss(teacher, some_batches((2, 3))),
        "id": lambda: minitron.lm_loss(teacher, [torch.full((1, 4), 1003)]),
        "long": lambda: minitron.lm_loss(teacher, [torch.zeros(1, 65, dtype=torch.int64)]),
        "larger": lambda: minitron.plan(scores, hidden_size=99),
        "blocks": lambda: minitron.score(teacher, batches, depth_metrics=("lm_loss",), block_lengths=range(4, 5)),
        "other": lambda: minitron.prune(other, plan),
        "precision": lambda: minitron.load(folder, precision="fp8"),
        "folder": lambda: minitron.load(folder / "none"),
        "taken": lambda: minitron.save(teacher, folder / "taken"),
    }
    return said_of(tries)


def said_of(tries: dict[str, Any]) -> dict[str, str]:
    """What each of the calls is refused with, by name."""
    from minitron_mcore.errors import DivergedError, InputError

    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
            said[name] = "nothing"
        except (InputError, DivergedError) as error:
            said[name] = str(error)
    return said


def check_said(said: dict[str, str], expected: dict[str, str]) -> None:
    """Each in one line that holds the expected words."""
    assert said.keys() == expected.keys()
    for name, words in expected.items():
        assert words in said[name] and "\n" not in said[name], said[name]


def test_what_cannot_be_is_said_in_a_sentence(tmp_path: Path) -> None:
    said = run_on_ranks(refusals, 1, tmp_path)[0]
    expected = {
        "aggregation": "batch_aggregation=max must be one of mean, l2, var",
        "method": "method=guess must be one of activation, magnitude, random",
        "empty": "batches is empty",
        "floats": "batches[0] is torch.float32 (2, 4): give token ids as an int64 tensor [b, s]",
        "shape": "batches[1] has shape (3, 16) after batches of (2, 16)",
        "id": "batches[0] has the token id 1003, but the model's vocab_size is 1003",
        "long": "batches[0] has rows of 65 tokens, longer than the model's max_position_embeddings=64",
        "larger": "student.hidden_size=99 is larger than the teacher's 48",
        "blocks": "block_lengths=[4] holds 4, but the model has 4 layers",
        "other": "plan was made for another model than this teacher",
        "precision": "precision=fp8 is not allowed: choose one of fp32, bf16",
        "folder": "is not there",
        "taken": "exists already: name another folder",
    }
    check_said(said, expected)
