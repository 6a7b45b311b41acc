"""Training in memory (minitron_mcore.api): against transformers in float64, at every layout, and what is refused;
Hugging Face in, Hugging Face out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.models import gather_named, tiny
from tests.distributed.ranks import run_on_ranks
from tests.distributed.test_api import check_said, said_of, some_batches

KEYS: dict[str, Any] = {"lr": 1e-3, "min_lr": 1e-4, "lr_decay_style": "linear", "weight_decay": 0.1}
FAMILY = "mistral"  # without biases, whose weights do not decay


def hugging_face(folder: Path, seed: int, **changes: int) -> Any:
    """A random Mistral, saved in `folder`, as transformers has it in float64."""
    import transformers

    shape: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 1003}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": None}
    torch.manual_seed(seed)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**{**shape, **heads, **changes}))
    model.save_pretrained(folder)
    return model.double().eval()


def two_models() -> tuple[Any, Any]:
    import minitron_mcore.api as minitron

    return minitron.build(tiny(FAMILY), seed=3), minitron.build(tiny(FAMILY, num_layers=2, ffn_hidden_size=64), seed=4)


def three_steps(folder: Path, kind: str) -> tuple[list[dict[str, float]], dict[str, bool]]:
    import minitron_mcore.api as minitron

    teacher = minitron.import_hf(folder / "wide", folder / "teacher")
    student = minitron.import_hf(folder / "narrow", folder / "student")
    before = weights(student)
    batches = some_batches((2, 2, 2))
    if kind == "distill":
        trained = minitron.distill(student, teacher, batches, temperature=2.0, lm_weight=0.5, **KEYS)
    else:
        trained = minitron.train(student, batches, micro_batch_size=1, **KEYS)
    minitron.export(trained, folder / "trained")
    facts = {
        "kept": all(torch.equal(before[name], tensor) for name, tensor in weights(student).items()),
        "frozen": not any(tensor.requires_grad for _, _, tensor in named(trained.chunks[0])),
        "tokens": trained.lineage["tokens"] == 3 * 2 * 16,
    }
    return trained.history, facts


def weights(model: Any) -> dict[Any, torch.Tensor]:
    return {(key, layer): tensor.detach().clone() for key, layer, tensor in named(model.chunks[0])}


@pytest.mark.parametrize("kind", ["distill", "train"])
def test_three_steps_are_those_of_transformers_in_float64(kind: str, tmp_path: Path) -> None:
    """Autograd and torch.optim.AdamW. fp32 against float64: losses and norms to 1e-5; weights, which move by 2e-3, to
    2e-5: where a gradient is all but 0, Adam's quotient turns its rounding into a part of a step."""
    from safetensors.torch import load_file

    wide, narrow = hugging_face(tmp_path / "wide", 3), hugging_face(tmp_path / "narrow", 4, num_hidden_layers=2)
    first = {name: tensor.detach().clone() for name, tensor in narrow.named_parameters()}
    history, facts = run_on_ranks(three_steps, 1, tmp_path, kind)[0]
    assert all(facts.values()), facts
    matrices = [tensor for tensor in narrow.parameters() if tensor.ndim > 1]
    norms = [tensor for tensor in narrow.parameters() if tensor.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for number, (tokens, found) in enumerate(zip(some_batches((2, 2, 2)), history, strict=True)):
        own = narrow(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(own.flatten(0, 1), tokens[:, 1:].flatten())
        expected = {"lm loss": float(loss.detach()), "learning-rate": 1e-3 - (1e-3 - 1e-4) * number / 3}
        if kind == "distill":
            with torch.no_grad():
                target = torch.log_softmax(wide(tokens).logits[:, :-1] / 2.0, -1)
            divergence = (target.exp() * (target - torch.log_softmax(own / 2.0, -1))).sum(-1).mean()
            expected["logits distillation loss"] = float(4.0 * divergence.detach())
            loss = 0.5 * loss + 4.0 * divergence
        adam.zero_grad()
        loss.backward()
        expected["grad-norm"] = float(torch.nn.utils.clip_grad_norm_(narrow.parameters(), 1.0))
        for group in adam.param_groups:
            group["lr"] = expected["learning-rate"]
        adam.step()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5), name
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    assert trained.keys() == first.keys()
    assert max(float((trained[name] - first[name]).abs().max()) for name in first) > 1e-3
    apart = {name: float((trained[name] - tensor.detach()).abs().max()) for name, tensor in narrow.named_parameters()}
    assert max(apart.values()) < 2e-5, apart


def named(chunk: Any) -> Any:
    from minitron_mcore.model.initialize import named_parameters

    return named_parameters(chunk)


def distilled(parallel: dict[str, Any], world_size: int, sites: bool) -> tuple[Any, Any]:
    import minitron_mcore.api as minitron

    runtime = minitron.start(**parallel)
    batches = some_batches((4, 4))
    replicas = world_size // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    if replicas > 1:
        batches = [tokens.chunk(replicas)[runtime.rank % replicas] for tokens in batches]
    teacher = minitron.build(tiny(FAMILY), seed=3)
    student = minitron.build(tiny(FAMILY, hidden_size=32), seed=4)
    how: dict[str, Any] = {"hidden_states": {"sites": ["block_output"]}} if sites else {}
    found = minitron.distill(student, teacher, batches, micro_batch_size=2, **how, **KEYS)
    again = minitron.distill(found, teacher, batches, micro_batch_size=2, **KEYS)
    told = minitron.evaluate(again, batches, teacher)
    return [found.history, again.history, told], gather_named([row for chunk in again.chunks for row in named(chunk)])


@pytest.mark.parametrize("sites", [False, True])
def test_layouts_agree(sites: bool) -> None:
    """A second training of what came out of the first, too. Sums in another order: 2e-5."""
    expected, _ = run_on_ranks(distilled, 1, {}, 1, sites)[0]
    names = {"lm loss", "logits distillation loss", "grad-norm", "learning-rate"}
    assert names < expected[0][0].keys()
    assert {"lm loss", "ppl", "logits distillation loss", "teacher lm loss", "top-1 agreement"} == expected[2].keys()
    assert any("hidden" in name for name in expected[0][0]) == sites, expected[0][0].keys()
    layouts = [{"tensor": 2, "sequence": True}, {"pipeline": 2, "virtual_pipeline": 2}, {}]
    for parallel in layouts:
        for found, _ in run_on_ranks(distilled, 2, parallel, 2, sites):
            for rows, wanted in zip(
                [*found[0], *found[1], found[2]], [*expected[0], *expected[1], expected[2]], strict=True
            ):
                assert rows == pytest.approx(wanted, rel=2e-5), parallel


def there_and_back(folder: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    import minitron_mcore.api as minitron

    minitron.start(**parallel)
    teacher = minitron.import_hf(folder / "hf", folder / "teacher", verify=True)
    scores = minitron.score(teacher, some_batches((2,)), method="random")
    student = minitron.prune(teacher, minitron.plan(scores, ffn_hidden_size=64, num_layers=2))
    tuned = minitron.distill(student, teacher, some_batches((2, 2)), lr=1e-3)
    out = minitron.export(tuned, folder / "out")
    same = minitron.import_hf(out, folder / "same")
    loss = minitron.lm_loss(tuned, some_batches((2,)))
    return {
        "loss": loss,
        "again": minitron.lm_loss(same, some_batches((2,))),
        "beside": sorted(p.name for p in folder.iterdir()),
    }


def test_from_hugging_face_to_hugging_face(tmp_path: Path) -> None:
    """What is exported after training has, for transformers, the loss that was seen in memory: 1e-5 in fp32."""
    import transformers

    hugging_face(tmp_path / "hf", 1)
    for found in run_on_ranks(there_and_back, 2, tmp_path, {"tensor": 2}):
        assert found["beside"] == ["hf", "out", "same", "teacher"]
        assert found["loss"] == found["again"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    (tokens,) = some_batches((2,))
    assert float(model(tokens, labels=tokens).loss.detach()) == pytest.approx(found["loss"], rel=1e-5)


def on_two(parallel: dict[str, Any], others: str) -> str:
    """What each of two ranks is told of batches, or of a model, that do not go with the other's."""
    import minitron_mcore.api as minitron

    runtime = minitron.start(**parallel)
    model = minitron.build(tiny(FAMILY))
    batches = some_batches((2, 2))
    if others == "rows" and runtime.rank:
        batches = [tokens[:1] for tokens in batches]
    elif others == "number" and runtime.rank:
        batches = batches[:1]
    elif others == "tokens" and runtime.rank:
        batches = batches[::-1]
    elif others == "bad" and runtime.rank:
        batches = []
    elif others == "layout":
        minitron.start(pipeline=2)
    return said_of({"": lambda: minitron.train(model, batches)})[""]


@pytest.mark.parametrize(
    ("parallel", "others", "words"),
    [
        ({}, "rows", "of (2, 16) on one rank and 2 of (1, 16) on another: give every data-parallel rank equally many"),
        ({}, "number", "batches are 2 of (2, 16) on one rank and 1 of (2, 16) on another"),
        (
            {"tensor": 2},
            "tokens",
            "batches differ between ranks that hold parts of one copy of the model",
        ),
        ({"pipeline": 2}, "bad", "batches is empty"),
        ({"tensor": 2}, "layout", "and the layout is"),
    ],
)
def test_ranks_that_do_not_agree(parallel: dict[str, Any], others: str, words: str) -> None:
    """Every rank is told, and none waits."""
    said = run_on_ranks(on_two, 2, parallel, others)
    assert words in said[0] and all("\n" not in each and each != "nothing" for each in said), said


def refusals(folder: Path) -> dict[str, str]:
    import minitron_mcore.api as minitron

    teacher, student = two_models()
    other = minitron.build(tiny(FAMILY, vocab_size=500))
    batches = some_batches((2, 2))
    broken = minitron.build(tiny(FAMILY))
    named(broken.chunks[0])[0][2].data.fill_(float("nan"))
    tries: dict[str, Any] = {
        "key": lambda: minitron.distill(student, teacher, batches, tokens=5),
        "range": lambda: minitron.distill(student, teacher, batches, temperature=0),
        "idle": lambda: minitron.train(student, batches, lr_wsd_decay_tokens=3),
        "sites": lambda: minitron.distill(student, teacher, batches, hidden_states={"sites": ["middle"]}),
        "none": lambda: minitron.distill(student, teacher, batches, hidden_states=None),
        "warm": lambda: minitron.train(student, batches, lr_warmup_iters=10),
        "layers": lambda: minitron.train(
            student, batches, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=99
        ),
        "model": lambda: minitron.evaluate("student", batches),  # type: ignore[arg-type]
        "one": lambda: minitron.evaluate(student, [torch.zeros(2, 1, dtype=torch.int64)]),
        "exists": lambda: minitron.export(student, folder),
        "typo": lambda: minitron.export(student, folder / "hf", max_shard_sise="1GB"),
        "vocabulary": lambda: minitron.distill(student, other, batches),
        "rows": lambda: minitron.train(student, batches, micro_batch_size=3),
        "alone": lambda: minitron.evaluate(student, batches, temperature=2.0),
        "empty": lambda: minitron.distill(student, teacher, []),
        "diverged": lambda: minitron.train(broken, batches, max_skipped_iterations=2),
        "hf": lambda: minitron.import_hf(folder / "none", folder / "new"),
        "nowhere": lambda: minitron.export(student, folder / "no" / "hf"),
    }
    return said_of(tries) | {"left": str(sorted(folder.iterdir()))}


def test_what_cannot_be_is_said_in_a_sentence(tmp_path: Path) -> None:
    said = run_on_ranks(refusals, 1, tmp_path)[0]
    expected = {
        "key": "tokens=5 is not a key here: choose of micro_batch_size, lr, ",
        "range": "temperature=0 must lie between 0.001 and 100",
        "idle": "lr_wsd_decay_tokens=3 has no effect with lr_decay_style=cosine",
        "sites": "hidden_states.sites[0]=middle must be one of embedding, block_output, mlp_input, attention_relation",
        "none": "hidden_states must be a dictionary: write it as",
        "warm": "train.lr_warmup_iters=10",
        "layers": "recompute_num_layers=99 does not divide",
        "model": "model=str is no model: give what load, build or import_hf returned",
        "one": "batches[0] has rows of one token",
        "exists": "exists already: name another folder",
        "typo": "max_shard_sise is not a key of a recipe: the nearest is max_shard_size",
        "vocabulary": "teacher has vocab_size=500, and the student 1003: compare models of one vocabulary",
        "rows": "micro_batch_size=3 does not divide the 2 rows of a batch: choose a divisor",
        "alone": "temperature=2.0 has no effect without a teacher: give one, or leave it out",
        "empty": "batches is empty",
        "diverged": "step 2: lm loss, grad-norm not finite; 2 steps in a row were skipped",
        "hf": "is not there",
        "nowhere": "lies in no folder",
        "left": "[]",
    }
    check_said(said, expected)
