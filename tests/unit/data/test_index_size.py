"""Samples whose indices could not be built are refused before Megatron begins; real budgets are not."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest

from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.index import MOST_SAMPLES, Wanted, check_index_size
from minitron_mcore.errors import InputError


def index(prefix: Path, documents: int, tokens: int) -> str:
    """A pair of files by their header and size alone; the tokens are uint16, and take no room on the disk."""
    prefix.with_suffix(".idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1))
    with prefix.with_suffix(".bin").open("wb") as stream:
        stream.truncate(2 * tokens)
    return str(prefix)


def told(data: DataConfig, *wanted: Wanted) -> str:
    try:
        check_index_size(data, wanted)
    except InputError as error:
        return str(error)
    return ""


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    class Usage:
        free = size

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)


def test_real_budgets_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10**12)
    data = DataConfig(train=index(tmp_path / "large", 10**6, 10**12), split="99,1,0")
    for tokens, length in ((94 * 10**9, 8192), (380 * 10**9, 4096), (15 * 10**12, 1024)):
        valid = Wanted(4 * 768, length, "distill.eval_iters", 4, is_validation=True)
        assert not told(data, Wanted(tokens // length, length, "distill.tokens", tokens), valid)
    small = DataConfig(train=index(tmp_path / "small", 1, 1025), split="1")
    assert not told(small, Wanted(100_000, 1024, "train.tokens", 102400000)), "a batch learnt by heart"


@pytest.mark.parametrize("split", ["1", "80,20,0"])
def test_a_text_gone_through_without_end(tmp_path: Path, split: str) -> None:
    data = DataConfig(train=index(tmp_path / "text", 40, 10_000), split=split)
    many = told(data, Wanted(MOST_SAMPLES + 1, 16, "distill.tokens", 274877906960))
    assert many.startswith("distill.tokens=274877906960 takes 17,179,869,185 samples of 16 tokens, and no index holds")
    share = {"1": 1.0, "80,20,0": 0.8}[split]
    passes = told(data, Wanted(400_000_000, 16, "distill.tokens", 6400000000))
    assert f"distill.tokens=6400000000 takes 400,000,000 samples of 16 tokens, {640_000 / share:,.0f} passes" in passes
    assert passes.endswith(
        "through data.train; above 100,000,000 samples at most 1,000 passes are possible: lower it, or give more text"
    )


def test_the_disk_must_hold_the_indices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 bytes a sample, 10 more of a blend, 4 a document and pass; what lies in the cache counts as free."""
    settings: dict[str, Any] = {"split": "1", "cache_path": str(tmp_path / "indices" / "here")}
    one, two = (index(tmp_path / name, 10, 1000) for name in ("one", "two"))
    wanted = Wanted(1000, 100, "distill.tokens", 100000)  # 100 passes, of 10 documents, or 50 of 20
    for train, bytes_ in ((one, 12 * 1000 + 4 * 1000), ([one, two], 22 * 1000 + 4 * 1000)):
        data = DataConfig(train=train, **settings)  # type: ignore[arg-type]
        free(monkeypatch, bytes_)
        assert not told(data, wanted)
        free(monkeypatch, bytes_ - 1)
        words = told(data, wanted)
        assert words.startswith("distill.tokens=100000 takes 1,000 samples, whose index of 0.0 GB does not fit")
        assert f"into {tmp_path}/indices/here" in words and "set data.cache_path to a folder with more room" in words
    (tmp_path / "indices" / "here" / "0123").mkdir(parents=True)
    numpy.save(tmp_path / "indices" / "here" / "0123" / "sample_index.npy", numpy.zeros(10))
    assert not told(data, wanted), "the run goes on with the indices it has"


def test_files_that_are_not_there_are_left_to_the_reader(tmp_path: Path) -> None:
    (tmp_path / "torn.idx").write_bytes(b"MMIDIDX")
    for name in ("none", "torn"):
        assert not told(DataConfig(train=str(tmp_path / name)), Wanted(400_000_000, 16, "train.tokens", 1))
    with pytest.raises(InputError, match=r"data\.train is not set"):
        check_index_size(DataConfig(), [Wanted(1, 16, "train.tokens", 1)])
