"""`cache` and what is read from it: the same targets at every layout and micro-batch size, whole, resumable, refused.

The teacher is compared with the dense float64 model: log-probabilities within 1e-5 (fp32 logits of about 10 round at
1e-6). Between layouts, drawn ids and counts are equal but where a random number falls into a rounding: none of the
416 tokens here, at most 1 of 1000 is allowed.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.distillation.cache.file import CacheReader, Targets, shard_file, token_checksum
from minitron_mcore.distillation.cache.write import cache_lock
from tests.distributed.dense_reference import DenseModel
from tests.distributed.models import save_teacher, tiny
from tests.distributed.ranks import run_on_ranks

SAMPLES, LENGTH, VOCAB = 13, 32, 1003
COMMON = [
    "tokenizer.model=@/tokenizer.model",
    "teacher.checkpoint=@/teacher",
    "data.train=@/json_text_document",
    "data.split=1",
    f"data.sequence_length={LENGTH}",
    "data.num_workers=0",
    f"cache.num_samples={SAMPLES}",
    "cache.shard_samples=4",
    "cache.chunk_tokens=20",
    "seed=5",
]
LAYOUTS = {
    "TP2-SP": ["parallel.tensor=2", "parallel.sequence=true", "cache.micro_batch_size=2"],
    "PP2-VPP2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "DP2": ["cache.micro_batch_size=4"],
}
WHOLE = ["cache.method=top_k", "cache.top_k=0", "cache.dtype=fp32"]
METHODS = {"sampled": [], "proposal": ["cache.proposal_temperature=1.25", "cache.dtype=fp32"], "whole": WHOLE}
METHODS["top_k"] = ["cache.method=top_k", "cache.top_k=20", "cache.temperature=2"]


def cache(root: Path, overrides: list[str]) -> tuple[str, str]:
    """(what was printed, what was refused); `@` stands for the folder of the test."""
    from minitron_mcore.errors import InputError
    from minitron_mcore.jobs.cache import resolve
    from minitron_mcore.recipe import load_recipe
    from minitron_mcore.runtime.start import start
    from minitron_mcore.runtime.world import World
    from minitron_mcore.stages import cache as stage

    drawn = [] if "cache.method=top_k" in overrides else ["cache.draws=30"]
    printed = io.StringIO()
    try:
        recipe = load_recipe(None, [text.replace("@", str(root)) for text in [*COMMON, *drawn, *overrides]])
        with contextlib.redirect_stdout(printed):
            runtime = start()
            job = resolve(recipe, World(runtime.rank, runtime.world_size))
            print(*(f"WARNING: {note}" for note in job.notes), sep="\n")
            stage.run(job, runtime)
    except InputError as error:
        return printed.getvalue(), str(error)
    return printed.getvalue(), ""


def cache_everywhere(root: Path, layouts: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    return {
        f"{method}-{name}": cache(root, [*layout, *how, f"cache.folder=@/{method}-{name}"])
        for name, layout in layouts.items()
        for method, how in METHODS.items()
    }


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    return corpus_with_teacher("cache")


@pytest.fixture(scope="module")
def shown(root: Path) -> dict[str, tuple[str, str]]:
    result = run_on_ranks(cache_everywhere, 1, root, {"1": []})[0]
    return result | run_on_ranks(cache_everywhere, 2, root, LAYOUTS)[0]


def targets(folder: Path) -> list[Targets]:
    reader = CacheReader(folder)
    assert reader.missing_shards(SAMPLES) == []
    return [reader.read(sample) for sample in range(SAMPLES)]


def different_tokens(ours: Targets, theirs: Targets) -> int:
    """How many tokens of a sample have other ids or counts."""

    def rows(one: Targets) -> list[tuple[Any, ...]]:
        ends = numpy.cumsum(one.num_ids)
        counts = one.counts if one.counts is not None else one.ids
        return [
            (one.ids[end - n : end].tolist(), counts[end - n : end].tolist())
            for end, n in zip(ends, one.num_ids, strict=True)
        ]

    return sum(a != b for a, b in zip(rows(ours), rows(theirs), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_at_every_layout(root: Path, shown: dict[str, tuple[str, str]], method: str) -> None:
    assert {name: refused for name, (_, refused) in shown.items() if refused} == {}
    single = targets(root / f"{method}-1")
    for name in LAYOUTS:
        other = targets(root / f"{method}-{name}")
        changed = sum(different_tokens(a, b) for a, b in zip(single, other, strict=True))
        assert changed <= SAMPLES * LENGTH // 1000, name
        for a, b in zip(single, other, strict=True):
            if a.values is not None and not different_tokens(a, b):
                assert b.values is not None
                # fp16 rounds to 2^-11 of the value, and may do so to either side.
                numpy.testing.assert_allclose(a.values, b.values, rtol=1e-3 if method == "top_k" else 0, atol=1e-5)
            if method == "top_k":
                assert a.tails is not None and b.tails is not None
                numpy.testing.assert_allclose(a.tails, b.tails, rtol=0, atol=1e-5)
        assert CacheReader(root / f"{method}-{name}").settings == CacheReader(root / f"{method}-1").settings


def dense_log_probs(root: Path, temperature: float) -> tuple[torch.Tensor, Any]:
    """[samples, s, V] of the teacher's logits in float64, and the dataset."""
    from minitron_mcore.data.config import DataConfig
    from minitron_mcore.data.dataset import build_datasets
    from minitron_mcore.data.described import split_part
    from minitron_mcore.data.tokenizer import load_tokenizer
    from tests.distributed.training.test_training import draw_plain_weights

    data = DataConfig(train=str(root / "json_text_document"), split="1", sequence_length=LENGTH)
    tokenizer = load_tokenizer(str(root / "tokenizer.model"))
    (dataset,) = build_datasets(data, tokenizer, [split_part(data, "train", SAMPLES)], seed=5)
    assert dataset is not None
    model = DenseModel(tiny("llama"), draw_plain_weights(tiny("llama"), 1))
    tokens = torch.stack([torch.as_tensor(dataset[i]["tokens"]) for i in range(SAMPLES)])
    return (model.forward(tokens)["logits"][..., :VOCAB] / temperature).log_softmax(-1), dataset


def test_log_probabilities_are_those_of_the_dense_model(root: Path, shown: dict[str, tuple[str, str]]) -> None:
    expected, _ = dense_log_probs(root, 1.0)
    for sample, found in enumerate(targets(root / "whole-1")):
        assert found.values is not None and (found.num_ids == VOCAB).all()
        numpy.testing.assert_allclose(found.values.reshape(LENGTH, VOCAB), expected[sample], rtol=0, atol=1e-5)
    expected, _ = dense_log_probs(root, 2.0)
    for sample, found in enumerate(targets(root / "top_k-1")):
        assert found.values is not None and (found.num_ids == 20).all()
        best = expected[sample].topk(20).indices.sort().values
        assert (torch.from_numpy(found.ids).view(LENGTH, 20) == best).all()
        # fp16 keeps 11 bits.
        numpy.testing.assert_allclose(found.values.reshape(LENGTH, 20), expected[sample].gather(1, best), rtol=2**-10)
        others = expected[sample].scatter(1, best, -torch.inf).logsumexp(-1)
        assert found.tails is not None
        numpy.testing.assert_allclose(found.tails, others, rtol=0, atol=1e-5)


def test_drawn_from_the_dense_model(root: Path, shown: dict[str, tuple[str, str]]) -> None:
    """Counts of groups of ids of like probability, over all tokens: each is 30 times its probability, up to 5 sigma."""
    expected, _ = dense_log_probs(root, 1.0)
    for name in ("sampled-TP2-SP", "sampled-PP2-VPP2"):
        drawn = torch.zeros_like(expected)
        for sample, found in enumerate(targets(root / name)):
            assert found.counts is not None
            token = numpy.repeat(numpy.arange(LENGTH), found.num_ids)
            drawn[sample, token, found.ids] = torch.from_numpy(found.counts).double()
        means = 30 * expected.exp()
        for low in range(-12, 5):
            group = (means.log() >= low) & (means.log() < low + 1)
            mean = float(means[group].sum())
            assert abs(float(drawn[group].sum()) - mean) < 5 * mean**0.5 + 3, low


def refuse_on_rank(root: Path, cases: list[list[str]]) -> list[str]:
    return [cache(root, ["parallel.tensor=2", *overrides])[1] for overrides in cases]


def test_refusals(root: Path, shown: dict[str, tuple[str, str]]) -> None:
    """Other settings for a folder that is there, numbers that cannot be, a teacher that gives NaN."""
    run_on_ranks(save_teacher, 2, root / "broken", float("nan"))
    there = "cache.folder=@/sampled-1"
    cases = {
        "cache.folder is not given": [],
        "holds another cache: draws is 30 there and 31 here": [there, "cache.draws=31"],
        "holds another cache: seed is 5 there and 6 here": [there, "seed=6"],
        "data.sequence_length is 32 there and 16 here": [there, "data.sequence_length=16"],
        "holds 13 samples, and cache.num_samples or distill.tokens asks for 12": [there, "cache.num_samples=12"],
        "cannot grow from 13 samples to 90000: sample 0 would have other tokens": [there, "cache.num_samples=90000"],
        "distill.temperature=0.0 must lie between 0.001 and 100": ["cache.folder=@/new", "distill.temperature=0"],
        "cache.temperature=-1.0 must lie between 0.001 and 100": ["cache.folder=@/new", "cache.temperature=-1"],
        "holds other files": ["cache.folder=@/teacher"],
        "cache.proposal_temperature=1e-30 must lie": ["cache.folder=@/new", "cache.proposal_temperature=1e-30"],
        "cache.top_k=1004 is more than the teacher's vocab_size=1003": [
            "cache.folder=@/new",
            "cache.method=top_k",
            "cache.top_k=1004",
        ],
        "cache.top_k=10 has no effect with cache.method=sampled": ["cache.folder=@/new", "cache.top_k=10"],
        "cache.draws=12 has no effect with cache.method=top_k": [
            "cache.folder=@/new",
            "cache.method=top_k",
            "cache.draws=12",
        ],
        "cache.num_samples=20000000000 takes 20,000,000,000 samples": [
            "cache.folder=@/new",
            "cache.num_samples=20000000000",
        ],
        "cache.draws=0 must lie between": ["cache.folder=@/new", "cache.draws=0"],
        "cache.shard_samples=0 must be at least 1": ["cache.folder=@/new", "cache.shard_samples=0"],
        "cache.temperature=0": ["cache.folder=@/new", "cache.temperature=0"],
        "distill.tokens=0 must be": ["cache.folder=@/new", "cache.num_samples=null"],
        "gives logits that are NaN or Inf in sample 0 ": ["cache.folder=@/nan", "teacher.checkpoint=@/broken"],
    }
    for words, told in zip(cases, run_on_ranks(refuse_on_rank, 2, root, list(cases.values()))[0], strict=True):
        assert words in told and "\n" not in told
    assert not (root / "new").exists() and not list((root / "nan").glob("targets*"))


def test_goes_on_at_the_first_missing_shard(root: Path, shown: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """What a killed run leaves: some shards, and a part of one under another name."""
    for name in ("tokenizer.model", "teacher", "json_text_document.bin", "json_text_document.idx"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "json_text_document.json").symlink_to(root / "json_text_document.json")
    folder = tmp_path / "again"
    shutil.copytree(root / "sampled-1", folder)
    for shard in (1, 3):
        shard_file(folder, shard).unlink()
    (folder / "targets-000001.bin.77.tmp").write_bytes(b"cut off")
    kept = shard_file(folder, 2).stat().st_mtime_ns
    resumed, refused = run_on_ranks(cache, 1, tmp_path, ["cache.folder=@/again"])[0]
    assert not refused and "2 shards to write" in resumed and "bytes a token" in resumed
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in (root / "sampled-1").iterdir()
    }
    assert shard_file(folder, 2).stat().st_mtime_ns == kept
    again, refused = run_on_ranks(cache, 1, tmp_path, ["cache.folder=@/again"])[0]
    assert not refused and "holds all 13 samples" in again and "shards" not in again
    shard_file(folder, 2).write_bytes(shard_file(folder, 2).read_bytes()[:-1])
    assert "targets-000002.bin is damaged" in run_on_ranks(cache, 1, tmp_path, ["cache.folder=@/again"])[0][1]


def test_grows(root: Path, shown: dict[str, tuple[str, str]]) -> None:
    """From 13 samples to 18, over a shard that was not full, at another layout: what was there stays, bit by bit, and
    what comes is what a new cache of 18 samples has."""
    shutil.copytree(root / "sampled-1", root / "grown")
    kept = CacheReader(root / "grown")
    before = [kept.stored(shard, kept.held(shard)) for shard in range(4)]
    assert [len(blocks) for blocks in before] == [4, 4, 4, 1]
    full = {shard: shard_file(root / "grown", shard).stat().st_mtime_ns for shard in range(3)}
    more = ["cache.folder=@/grown", "cache.num_samples=18"]
    printed, refused = run_on_ranks(cache, 2, root, [*LAYOUTS["DP2"], *more])[0]
    assert not refused and "2 shards to write" in printed
    assert not run_on_ranks(cache, 1, root, ["cache.folder=@/anew", "cache.num_samples=18"])[0][1]
    reader, anew = CacheReader(root / "grown"), CacheReader(root / "anew")
    assert reader.settings == anew.settings and not reader.missing_shards(18) and reader.held(4) == 2
    assert [reader.stored(shard, len(blocks)) for shard, blocks in enumerate(before)] == before
    assert {shard: shard_file(root / "grown", shard).stat().st_mtime_ns for shard in range(3)} == full
    for sample in range(18):
        assert reader.tokens_of(sample) == anew.tokens_of(sample)
        # At most 1 token of 1000 in another draw, as between layouts: here none, of 160.
        assert sample < 13 or not different_tokens(reader.read(sample), anew.read(sample))
    tokens = dense_log_probs(root, 1.0)[1][12]["tokens"]
    assert reader.tokens_of(12) == token_checksum(numpy.asarray(tokens))


def test_two_at_once_and_what_distill_would_refuse(root: Path, shown: dict[str, tuple[str, str]]) -> None:
    shutil.copytree(root / "sampled-1", root / "twice")
    shard_file(root / "twice", 1).unlink()
    (root / "twice" / "targets-000001.bin.host.77.tmp").write_bytes(b"under way")
    lock = cache_lock(root / "twice")
    lock.take()
    assert "is being written by another `cache`" in run_on_ranks(cache, 1, root, ["cache.folder=@/twice"])[0][1]
    assert (root / "twice" / "targets-000001.bin.host.77.tmp").exists()
    lock.release()
    printed, refused = run_on_ranks(cache, 1, root, ["cache.folder=@/twice", "distill.logit_loss=reverse_kl"])[0]
    assert not refused and not list((root / "twice").glob("*.tmp"))
    (warning,) = (line for line in printed.splitlines() if "WARNING: " in line)
    assert "distill.logit_loss=reverse_kl needs more of the teacher" in warning
    printed, _ = run_on_ranks(cache, 1, root, ["cache.folder=@/sampled-1"])[0]
    assert "WARNING: " not in printed
