"""`minitron reproduce`: arms below one teacher, their losses as `transformers` has them of the exported models, the
same at every layout, and going on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
import yaml

from minitron_mcore.data.index import read_index
from tests.distributed.ranks import run_on_ranks
from tests.e2e.verbs import all_typed, run_well

KL, SCRATCH = "{keys: {distill.kd_weight: 1}, paper: 2.1}", "{model: random, paper: 3.9}"
TAUGHT = "{keys: {distill.random_weights: true, run.cache: true, cache.draws: 4}}"
COMMON = [
    "output=@/claims",
    "name=tiny",
    "teacher.checkpoint=@/teacher",
    "tokenizer.model=@/tokenizer.model",
    "data.train=@/json_text_document",
    "data.valid=@/json_text_document",
    "data.sequence_length=32",
    "data.num_workers=0",
    "importance.num_samples=6",
    "student.hidden_size=36",
    "student.ffn_hidden_size=64",
    "distill.tokens=512",
    "distill.global_batch_size=4",
    "distill.micro_batch_size=2",
    "distill.lr=1e-3",
    "evaluate.micro_batch_size=2",
    "log.wandb=disabled",
    "log.tensorboard=false",
    f"reproduce.arms={{kl: {KL}, scratch: {SCRATCH}, taught: {TAUGHT}}}",
    "reproduce.orders=[kl < scratch]",
    "reproduce.seeds=[1,2]",
    "reproduce.document_tokens=50",
]
MODELS = {"kl": "students/student/distilled", "scratch": "baselines/random"}
REFUSED = [
    (
        ["reproduce.arms={}", "reproduce.orders=[]"],
        "reproduce.arms is not given: name what is compared, or a recipe of",
    ),
    (["reproduce.orders=[]"], "reproduce.orders is not given: name what the claim says of the arms"),
    (
        ["reproduce.orders=[kl < klm]"],
        "reproduce.orders[0]=kl < klm names klm, which is no arm: its arms are kl, scratch, taught",
    ),
    (["reproduce.arms.kl.keys={distil.tokens: 1}"], "reproduce.arms.kl.keys.distil is not a key of a recipe"),
    (
        ["name=other", "reproduce.arms.kl.keys={student.hidden_size: 99}"],
        "student.hidden_size=99 is larger than the teacher's",
    ),
    (["reproduce.arms.kl.model=best"], "reproduce.arms.kl.model=best must be one of distilled, pruned, next_token"),
    (["name=data"], "name=data is to be a folder's name in output, beside what claims share"),
    (["distill.lr=2e-3"], "output=@/claims/tiny/kl/seed-1 holds another run: distill.lr is 0.001 there and 0.002 here"),
    (["data.sequence_length=16"], "output=@/claims holds another run: data.sequence_length is 32 there and 16 here"),
    (["output=@"], "output=@ holds something other than reproduced claims: name another folder"),
]


def commanded(root: Path, *overrides: str) -> list[str]:
    return ["reproduce", *(text.replace("@", str(root)) for text in [*COMMON, *overrides])]


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    return corpus_with_teacher("reproduce")


@pytest.fixture(scope="module")
def shown(root: Path) -> str:
    return run_well(*commanded(root), world_size=2)


def nats_of(root: Path, folder: Path, hf: Path) -> Iterator[float]:
    """What each document's first 50 tokens lose, read in windows of 32, by transformers in float64."""
    from transformers import AutoModelForCausalLM

    run_well("export", f"checkpoint={folder}", f"hf={hf}", f"tokenizer.model={root}/tokenizer.model")
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float64).requires_grad_(False)
    index = read_index(str(root / "json_text_document"))
    assert index is not None
    tokens, end = numpy.fromfile(root / "json_text_document.bin", index.dtype), 0
    for length in index.lengths():
        ids = torch.from_numpy(tokens[end : end + length][:50].astype(numpy.int64))
        end += int(length)
        windows = [ids[start : start + 33] for start in range(0, len(ids) - 1, 32)]
        losses = [
            torch.nn.functional.cross_entropy(model(each[None, :-1]).logits[0], each[1:], reduction="sum")
            for each in windows
        ]
        yield float(torch.stack(losses).sum())


def test_losses_are_those_of_transformers(root: Path, shown: str, tmp_path: Path) -> None:
    result = json.loads((root / "claims" / "tiny" / "reproduction.json").read_text())
    sums: dict[str, list[float]] = {}
    for arm, model in MODELS.items():
        for seed in (1, 2):
            own = root / "claims" / "tiny" / arm / f"seed-{seed}"
            measured = json.loads((own / "losses.json").read_text())
            expected = list(nats_of(root, own / model, tmp_path / f"{arm}-{seed}"))
            # fp32 against float64: sums of 49 losses of 6 or so, each within 1e-6 of itself.
            assert measured["nats"] == pytest.approx(expected, rel=2e-6)
            assert sum(measured["tokens"]) == result["tokens"] and len(expected) == result["documents"]
            sums.setdefault(arm, []).append(sum(expected) / result["tokens"])
    assert result["arms"]["kl"]["seeds"] == pytest.approx(sums["kl"]) and sums["kl"][0] != sums["kl"][1]
    (order,) = result["orders"]
    apart = numpy.subtract(sums["kl"], sums["scratch"])
    assert order["difference"] == pytest.approx(apart.mean(), abs=1e-5)
    assert order["seeds"] == pytest.approx(apart.tolist(), abs=1e-5) and order["paper"] == pytest.approx(-1.8)
    assert f"tiny: {result['verdict']}" in shown
    assert f"## tiny: {result['verdict']}" in (root / "claims" / "reproduction.md").read_text()
    assert (root / "claims" / "tiny" / "reproduction.png").stat().st_size > 1000


def test_only_what_the_measured_model_needs_is_done(root: Path, shown: str) -> None:
    done = {arm: root / "claims" / "tiny" / arm / "seed-1" / "done" for arm in (*MODELS, "taught")}
    assert {path.stem for path in done["kl"].glob("*.json")} == {"score", "prune-student", "distill-student"}
    assert {path.stem for path in done["scratch"].glob("*.json")} == {"baseline-random"}
    steps = {"cache", "score", "prune-student", "distill-student"}
    assert {path.stem for path in done["taught"].glob("*.json")} == steps


def test_random_weights_are_taught_by_stored_targets(root: Path, shown: str) -> None:
    """The first step has the loss of the baseline, whose weights and batch it shares; the next one is another's."""
    losses = []
    for folder in ("taught/seed-1/students/student/distilled", "scratch/seed-1/baselines/random"):
        rows = (root / "claims" / "tiny" / folder / "metrics.jsonl").read_text().splitlines()
        losses.append([row["lm loss"] for row in map(json.loads, rows) if row["kind"] == "train"][:2])
    (first, second), (same, other) = losses
    assert first == pytest.approx(same, rel=1e-6) and abs(second - other) > 1e-5
    lineage = yaml.safe_load((root / "claims/tiny/taught/seed-1/students/student/distilled/lineage.yaml").read_text())
    assert lineage["student"]["random_weights"] is True
    assert lineage["teacher"]["cache"].endswith("taught/seed-1/targets") and lineage["teacher"]["draws"] == 4


def test_it_goes_on_and_is_the_same_at_another_layout(root: Path, shown: str) -> None:
    """What is there stays; a measurement that is lost is made again, of the same documents."""
    first = root / "claims" / "tiny" / "kl" / "seed-2" / "losses.json"
    before = json.loads(first.read_text())
    first.unlink()
    again = run_well(*commanded(root, "parallel.tensor=2", "parallel.sequence=true"), world_size=2)
    assert "distil student" not in again and "score the teacher" not in again
    assert json.loads(first.read_text())["nats"] == pytest.approx(before["nats"], rel=2e-6)
    assert again.partition("held-out loss, nats")[2] == shown.partition("held-out loss, nats")[2]


def test_what_is_wrong_is_told(root: Path, shown: str) -> None:
    commands = [commanded(root, *given) for given, _ in REFUSED]
    (results,) = run_on_ranks(all_typed, 1, commands, root)
    for (given, words), (code, stderr, untouched) in zip(REFUSED, results, strict=True):
        assert code == 2 and stderr.startswith(f"minitron reproduce: {words.replace('@', str(root))}"), (given, stderr)
        assert untouched and stderr.count("\n") == 1, (given, stderr)
