"""`minitron cache` and `distill.teacher=cache:DIR` as typed: the walk, going on after a kill, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from minitron_mcore.distillation.cache.file import CacheReader, shard_file, write_shard
from tests import warm
from tests.distributed.models import save_teacher
from tests.distributed.ranks import run_on_ranks
from tests.e2e.launchers import environment
from tests.e2e.verbs import all_run_well, all_typed, run_well
from tests.unit.text_data import JSON_PACKAGE, small_data, small_tokenizer

COMMON = [
    "tokenizer.model=@/tokenizer.model",
    "data.train=@/json_text_document",
    "data.valid=@/json_text_document",
    "data.sequence_length=32",
    "data.num_workers=0",
    "distill.tokens=512",
    "distill.global_batch_size=4",
    "distill.micro_batch_size=2",
    "distill.eval_iters=1",
    "distill.lr=1e-3",
    "student.checkpoint=@/student",
    "cache.shard_samples=5",
    "log.wandb=disabled",
    "log.tensorboard=false",
]
TEACHER = ["teacher.checkpoint=@/teacher"]
WHOLE = ["cache.method=top_k", "cache.top_k=0", "cache.dtype=fp32"]


def words(root: Path, verb: str, *overrides: str) -> list[str]:
    return [verb, *(text.replace("@", str(root)) for text in [*COMMON, *overrides])]


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    root = corpus_with_teacher("cache")
    run_on_ranks(save_teacher, 2, root / "student", 5.0)
    commands = [
        words(root, "cache", *TEACHER, "cache.folder=@/sampled"),
        words(root, "cache", *TEACHER, "cache.folder=@/whole", *WHOLE),
        words(root, "cache", *TEACHER, "cache.folder=@/top_k", "cache.method=top_k", "distill.temperature=2"),
    ]
    all_run_well(commands)
    return root


def history(folder: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def test_distils_as_from_the_teacher(root: Path) -> None:
    """Four steps and a validation, from the teacher and from all its logits, at another layout too; and from draws."""
    student = [*WHOLE, "distill.lm_weight=0.1"]
    commands = [
        words(root, "distill", *TEACHER, *student, "distill.checkpoint=@/resident"),
        words(root, "distill", *student, "distill.teacher=cache:@/whole", "distill.checkpoint=@/from-whole"),
        words(root, "distill", "distill.teacher=cache:@/sampled", "distill.checkpoint=@/from-sampled"),
        words(
            root,
            "distill",
            "distill.teacher=cache:@/top_k",
            "distill.temperature=2",
            "distill.checkpoint=@/from-top_k",
        ),
    ]
    all_run_well(commands)
    layout = ["parallel.tensor=2", "parallel.sequence=true", "distill.micro_batch_size=1"]
    teacher = ["distill.teacher=cache:@/whole", "distill.checkpoint=@/from-whole-TP2"]
    run_well(*words(root, "distill", *student, *layout, *teacher), world_size=2)
    for key in ("lm loss", "logits distillation loss"):
        expected = history(root / "resident", key)
        assert len(expected) == 4
        for name in ("from-whole", "from-whole-TP2"):
            assert history(root / name, key) == pytest.approx(expected, abs=1e-5), (name, key)
    lineage = (root / "from-sampled" / "lineage.yaml").read_text()
    assert "method: sampled" in lineage and "iteration: 3" in lineage


def test_refusals(root: Path) -> None:
    """Each in one sentence, with exit code 2, and nothing written."""
    shutil.copytree(root / "sampled", root / "unfinished")
    shard_file(root / "unfinished", 2).unlink()
    shutil.copytree(root / "sampled", root / "changed")
    path = shard_file(root / "changed", 0)
    path.write_bytes(path.read_bytes()[:-3] + b"\0\0\0")
    shutil.copytree(root / "sampled", root / "mixed")
    shutil.copy(shard_file(root / "top_k", 0), shard_file(root / "mixed", 0))
    # The same samples in another order.
    shutil.copytree(root / "sampled", root / "reversed")
    reader = CacheReader(root / "reversed")
    write_shard(root / "reversed", reader.settings, 0, reader.stored(0, 5)[::-1])
    shutil.copytree(root / "sampled", root / "nameless")
    description = root / "nameless" / "cache.json"
    description.write_text(description.read_text().replace('"tokenizer"', '"other"'))
    other = small_data(root / "other", small_tokenizer(root / "other.model", vocab_size=500), package=JSON_PACKAGE)
    sampled = "distill.teacher=cache:@/sampled"
    cases = {
        "must be cache:DIR": ["distill.teacher=@/sampled"],
        "holds no teacher's targets": ["distill.teacher=cache:@/teacher"],
        "distill.temperature=2.0 differs from the temperature 1.0 of the targets": [sampled, "distill.temperature=2"],
        "distill.logit_loss=reverse_kl needs more": [sampled, "distill.logit_loss=reverse_kl"],
        "distill.top_k=5": [sampled, "distill.top_k=5"],
        "seed is 1234 there and 7 here": [sampled, "seed=7"],
        "data.train.digest is": [sampled, "data.train=@/email_text_document"],
        "data.sequence_length is 32 there and 16 here": [sampled, "data.sequence_length=16"],
        "holds the first 16 samples": [sampled, "distill.tokens=640"],
        "another tokenizer": [sampled, "tokenizer.model=@/other.model", f"data.train={other}", f"data.valid={other}"],
        "is not finished: 1 of its shards": ["distill.teacher=cache:@/unfinished"],
        "the checksum of sample": ["distill.teacher=cache:@/changed"],
        "belongs to another cache": ["distill.teacher=cache:@/mixed"],
        "made from other data, or in another order: its sample 0": ["distill.teacher=cache:@/reversed"],
        "does not say tokenizer": ["distill.teacher=cache:@/nameless"],
        "was made by another teacher": [sampled, "teacher.checkpoint=@/resident"],
    }
    commands = [words(root, "distill", *given, "distill.checkpoint=@/new") for given in cases.values()]
    results = run_on_ranks(all_typed, 1, commands, root)[0]
    for (said, given), (code, shown, unchanged) in zip(cases.items(), results, strict=True):
        assert code == 2 and said in shown and "Traceback" not in shown, (given, shown)
        assert unchanged or "checksum" in said, given


def test_a_small_part_of_a_cache_of_two_passes(root: Path) -> None:
    """Megatron shuffles two passes together: a run of a few samples reads those that the cache begins with."""
    samples = len(numpy.memmap(root / "json_text_document.bin", dtype=numpy.uint16)) // 32 + 20
    folder = ["cache.folder=@/passes", f"cache.num_samples={samples}", "cache.method=top_k", "cache.top_k=4"]
    distill = ["distill.teacher=cache:@/passes", "distill.checkpoint=@/from-passes"]
    all_run_well(
        [words(root, "cache", *TEACHER, *folder, "cache.shard_samples=1000"), words(root, "distill", *distill)]
    )
    assert len(history(root / "from-passes", "lm loss")) == 4


def test_killed_and_taken_up_again(root: Path, tmp_path: Path) -> None:
    """A process killed after its first shard leaves nothing that looks finished; the same command goes on."""
    folder = root / "killed"
    given = words(root, "cache", *TEACHER, f"cache.folder={folder}", "cache.shard_samples=1", "cache.num_samples=60")
    process = warm.start("minitron_mcore", given, output=tmp_path / "log", env=environment())
    deadline = time.monotonic() + 60
    while not shard_file(folder, 2).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reader = CacheReader(folder)
    missing = reader.missing_shards(60)
    assert 0 < len(missing) < 60
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    run_well(*given)
    assert CacheReader(folder).missing_shards(60) == []
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    for sample in range(60):
        CacheReader(folder).read(sample)


def test_a_longer_budget_from_a_cache_that_grew_and_moved(root: Path) -> None:
    """Four steps, then six: the cache gets the samples of two more, lies elsewhere, and the run goes on with it. One
    that was made otherwise meanwhile is refused."""
    constant = ["distill.lr_decay_style=constant", "distill.checkpoint=@/longer"]
    longer = [*constant, "distill.tokens=768"]
    shutil.copytree(root / "sampled", root / "grown")
    run_well(*words(root, "distill", *constant, "distill.teacher=cache:@/grown"))
    there = "distill.teacher=cache:@/moved"
    commands = [words(root, "distill", *longer, "distill.teacher=cache:@/grown")]
    ((code, shown, unchanged),) = run_on_ranks(all_typed, 1, commands, root)[0]
    assert code == 2 and unchanged and "run `cache` again for as many, which adds what is missing" in shown
    run_well(*words(root, "cache", *TEACHER, "cache.folder=@/grown", "distill.tokens=768"))
    (root / "grown").rename(root / "moved")
    commands = [
        words(root, "cache", *TEACHER, "cache.folder=@/redrawn", "distill.tokens=768", "cache.draws=12"),
        words(root, "distill", *longer, there),
    ]
    all_run_well(commands)
    assert len(history(root / "longer", "lm loss")) == 6
    commands = [words(root, "distill", *longer, "distill.tokens=1024", "distill.teacher=cache:@/redrawn")]
    ((code, shown, unchanged),) = run_on_ranks(all_typed, 1, commands, root)[0]
    assert code == 2 and unchanged and "was distilled from other targets so far: draws is 50 there and 12 in" in shown
