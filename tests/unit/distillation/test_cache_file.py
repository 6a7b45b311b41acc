"""Targets come back as they were written; damage is found; a shard is there whole or not at all."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_mcore.distillation.cache import write
from minitron_mcore.distillation.cache.file import (
    CacheReader,
    Targets,
    decode_targets,
    encode_targets,
    settings_digest,
    shard_file,
    token_checksum,
    write_settings,
    write_shard,
)
from minitron_mcore.distillation.cache.serving import claim
from minitron_mcore.distillation.cache.write import cache_lock
from minitron_mcore.errors import InputError
from minitron_mcore.runtime import agree
from minitron_mcore.runtime.progress import Bar

SETTINGS: dict[str, Any] = {"method": "sampled", "proposal_temperature": 1.0, "vocab_size": 70_000, "dtype": "fp16"}
SETTINGS |= {"num_samples": 5, "shard_samples": 3, "temperature": 1.0, "teacher": {"architecture": {}}}


def some_targets(seed: int, vocab_size: int, tokens: int = 40, values: bool = False) -> Targets:
    """Tokens with no id, one id, and many, the first and the last id of the vocabulary among them."""
    random = numpy.random.default_rng(seed)
    rows = [
        numpy.sort(random.choice(vocab_size, size=min(int(n), vocab_size), replace=False))
        for n in random.geometric(0.1, tokens) - 1
    ]
    rows[0] = numpy.array([0, vocab_size - 1]) if vocab_size > 1 else numpy.array([0])
    ids = numpy.concatenate(rows).astype(numpy.int64)
    drawn = None if values else random.geometric(0.3, len(ids)).astype(numpy.int64)
    logs = -random.exponential(5, len(ids)).astype(numpy.float32) if values else None
    tails = -random.exponential(20, tokens).astype(numpy.float32) if values and seed % 2 else None
    return Targets(numpy.array([len(row) for row in rows]), ids, drawn, logs, tails)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.sampled_from([1, 2, 255, 256, 257, 65536, 65537, 256000]),
    dtype=st.sampled_from([None, "fp16", "fp32"]),
)
def test_round_trip(seed: int, vocab_size: int, dtype: str | None) -> None:
    written = some_targets(seed, vocab_size, values=dtype is not None)
    how: dict[str, Any] = {"method": "sampled", "proposal_temperature": 1.0}
    if dtype is not None:
        how = {"method": "top_k", "top_k": vocab_size - (written.tails is not None)}
    how |= {"vocab_size": vocab_size, "dtype": dtype or "fp16"}
    read = decode_targets(encode_targets(written, how), how)
    assert numpy.array_equal(read.num_ids, written.num_ids) and numpy.array_equal(read.ids, written.ids)
    if written.counts is not None:
        assert read.counts is not None and numpy.array_equal(read.counts, written.counts)
    if written.values is not None:
        rounded = written.values.astype(numpy.float16 if dtype == "fp16" else numpy.float32)
        assert read.values is not None and numpy.array_equal(read.values, rounded.astype(numpy.float32))
    if written.tails is not None:
        assert read.tails is not None and numpy.array_equal(read.tails, written.tails)


def write_cache(folder: Path, how: dict[str, Any] = SETTINGS) -> list[Targets]:
    samples = [some_targets(seed, SETTINGS["vocab_size"]) for seed in range(5)]
    blocks = [
        (encode_targets(targets, SETTINGS), token_checksum(numpy.arange(sample, sample + 40)))
        for sample, targets in enumerate(samples)
    ]
    write_settings(folder, how)
    for shard, part in enumerate((blocks[:3], blocks[3:])):
        write_shard(folder, how, shard, part)
    return samples


def test_samples_by_number(tmp_path: Path) -> None:
    samples = write_cache(tmp_path)
    reader = CacheReader(tmp_path)
    assert reader.missing_shards(5) == []
    for sample in (4, 0, 3, 2, 1):
        assert numpy.array_equal(reader.read(sample).ids, samples[sample].ids)
        assert reader.tokens_of(sample) == token_checksum(numpy.arange(sample, sample + 40))
    for beyond in (-1, 5):
        with pytest.raises(InputError, match="no targets of sample"):
            reader.read(beyond)


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    """One bit of each byte of a shard in turn."""
    write_cache(tmp_path)
    path = shard_file(tmp_path, 1)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"targets-000001\.bin"):
            reader = CacheReader(tmp_path)
            reader.read(3)
            reader.read(4)
    for end in (0, 5, 30, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"targets-000001\.bin"):
            CacheReader(tmp_path).missing_shards(5)
    path.unlink()
    assert CacheReader(tmp_path).missing_shards(5) == [1] and CacheReader(tmp_path).missing_shards(3) == []
    with pytest.raises(InputError, match="run `cache` again, which writes what is missing"):
        CacheReader(tmp_path).read(3)


def test_a_full_disk_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space"):
        write_shard(tmp_path, SETTINGS, 2, [(b"block", "")])
    assert {path.name for path in tmp_path.iterdir()} == before


def test_damaged_descriptions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is missing"):
        CacheReader(tmp_path)
    damaged = {
        "{": "is damaged",
        "[]": "is damaged",
        '{"format": 9, "settings": {}}': "is of format 9",
        '{"format": 1, "settings": {}}': "is of format 1, an older version's",
        '{"format": 2, "settings": {}}': "its method is None",
    }
    for text, told in damaged.items():
        (tmp_path / "cache.json").write_text(text)
        with pytest.raises(InputError, match=told):
            CacheReader(tmp_path)
    wrong = {"teacher": {}, "shard_samples": 0, "vocab_size": "many", "dtype": "fp8", "temperature": -1.0}
    for name, value in wrong.items():
        write_settings(tmp_path, SETTINGS | {name: value})
        with pytest.raises(InputError, match="architecture" if name == "teacher" else name):
            CacheReader(tmp_path)
    for name in SETTINGS:
        write_settings(tmp_path, {key: value for key, value in SETTINGS.items() if key != name})
        with pytest.raises(InputError, match=rf"cache\.json is damaged.*{name}"):
            CacheReader(tmp_path)


def test_a_cache_that_grows_while_it_is_read(tmp_path: Path) -> None:
    """More samples are no other cache; a reader from before finds those it knew where the longer shard has them now."""
    samples = write_cache(tmp_path)
    reader = CacheReader(tmp_path)
    assert reader.held(1) == 2 and reader.missing_shards(6) == [1]
    reader.read(3)
    grown = {**SETTINGS, "num_samples": 6}
    assert settings_digest(grown) == settings_digest(SETTINGS)
    write_settings(tmp_path, grown)
    blocks = reader.stored(1, 2)
    write_shard(tmp_path, grown, 1, [*blocks, blocks[0]])
    assert numpy.array_equal(reader.read(4).ids, samples[4].ids)
    assert CacheReader(tmp_path).missing_shards(6) == []


def test_what_is_missing_of_a_cache(tmp_path: Path) -> None:
    """Of every shard the samples that it lacks, whatever the settings in the folder say of their number."""
    how = {**SETTINGS, "teacher": {"architecture": {}, "weights": None}}
    write_cache(tmp_path, how)
    for wanted, missing in ((5, []), (8, [(1, range(5, 6)), (2, range(6, 8))])):
        lock = cache_lock(tmp_path)
        assert claim(tmp_path, {**how, "num_samples": wanted}, lock) == missing
        lock.release()


def test_a_rank_that_its_peers_wait_for_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is no word to the user ends the process at once: in a collective the others would wait for it."""
    write_cache(tmp_path)
    told: list[Any] = []
    alone = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    monkeypatch.setattr(write, "data_group", lambda: alone)
    monkeypatch.setattr(agree, "raise_together", told.append)
    monkeypatch.setattr(write, "ask_teacher", lambda *given: SETTINGS["lost"])
    runtime: Any = SimpleNamespace(device="cpu", progress=lambda *given: nullcontext(Bar(1, 0)))
    monkeypatch.setattr(write, "CacheReader", lambda folder: SimpleNamespace(settings={"data.sequence_length": 4}))
    with pytest.raises(KeyError, match="lost"):
        write.write_missing([], lambda samples: [], 1, tmp_path, [(1, range(5, 6))], runtime)
    assert not told


def test_the_digest_is_of_what_is_held() -> None:
    """Where a teacher of known weights lay says nothing; where its weights are not known, it is all there is."""

    def digest(checkpoint: str, weights: str | None, **changes: Any) -> str:
        teacher = {"architecture": {}, "checkpoint": checkpoint, "iteration": 3, "weights": weights}
        return settings_digest({**SETTINGS, "teacher": teacher, **changes})

    assert digest("/a", "sum") == digest("/b", "sum", num_samples=9, shard_samples=2)
    known = digest("/a", "sum")
    assert len({known, digest("/a", "other"), digest("/a", None), digest("/b", None), digest("/a", "sum", seed=2)}) == 5


def test_what_a_token_costs() -> None:
    """About 12 of 128,256 ids, drawn 50 times: less than 2.5 bytes an id (17 bits of an id, and a count, are 3)."""
    random = numpy.random.default_rng(1)
    frequency = numpy.arange(1, 128_257) ** -1.0
    names = random.permutation(128_256)
    rows = []
    for _ in range(1024):
        kept = names[random.choice(128_256, size=12, p=frequency / frequency.sum())]
        rows.append(numpy.unique(kept))
    ids = numpy.concatenate(rows)
    targets = Targets(numpy.array([len(row) for row in rows]), ids, random.geometric(0.4, len(ids)), None)
    assert len(encode_targets(targets, {**SETTINGS, "vocab_size": 128_256})) / len(ids) < 2.5
