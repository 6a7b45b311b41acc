"""Datasets against a plain packing of the same documents; microbatches at every layout; clear refusals."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.dataset import batches, batches_once, build_datasets
from minitron_mcore.data.described import calibration_part, split_part, training_parts
from minitron_mcore.data.index import Wanted
from minitron_mcore.errors import InputError
from tests.unit.data.conftest import LENGTH
from tests.unit.text_data import JSON_PACKAGE, small_data

SEED = 11


def build(config, tokenizer, train_samples=None, valid_samples=0, test_samples=0, seed=SEED):
    """(train, valid, test); None where no samples are asked for."""
    sizes = {"train": train_samples, "valid": valid_samples, "test": test_samples}
    parts = [split_part(config, name, size) for name, size in sizes.items() if size != 0]
    built = zip(parts, build_datasets(config, tokenizer, parts, seed=seed), strict=True)
    by_name = {part.name: dataset for part, dataset in built}
    return tuple(map(by_name.get, sizes))


def build_calibration(config, tokenizer, num_samples, seed=SEED):
    return build_datasets(config, tokenizer, [calibration_part(config, num_samples)], seed=seed)[0]


def wanted(samples):
    return Wanted(samples, LENGTH, "train.tokens", samples * LENGTH)


def documents_of(prefix: str) -> list[list[int]]:
    """Documents read from the .bin by the lengths alone, without the reader that the datasets use."""
    index = IndexedDataset(prefix)  # by name: its arrays are unmapped with it
    lengths = index.sequence_lengths.tolist()
    tokens = numpy.fromfile(prefix + ".bin", dtype=numpy.uint16).tolist()
    ends = list(itertools.accumulate(lengths))
    return [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def packed(documents: list[list[int]], seed: int) -> list[list[int]]:
    """One pass of GPT samples: shuffle documents, join them, cut LENGTH + 1 tokens every LENGTH, shuffle again."""
    draw = numpy.random.RandomState(seed)
    order = numpy.arange(len(documents))
    draw.shuffle(order)
    stream = [token for i in order for token in documents[i]]
    count = (len(stream) - 1) // LENGTH
    samples = [stream[i * LENGTH : i * LENGTH + LENGTH + 1] for i in range(count)]
    places = numpy.arange(count, dtype=numpy.uint32)
    draw.shuffle(places)
    return [samples[i] for i in places]


def rows(dataset) -> list[list[int]]:
    return [[*dataset[i]["tokens"].tolist(), int(dataset[i]["labels"][-1])] for i in range(len(dataset))]


def test_samples_are_the_packed_documents(config, prefixes, tokenizer):
    train, valid, test = build(config, tokenizer, None, None, 0)
    assert rows(train) == packed(documents_of(prefixes[0]), SEED)
    assert rows(valid) == packed(documents_of(prefixes[1]), SEED)
    assert test is None
    sample = train[3]
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["position_ids"].tolist() == list(range(LENGTH)) and sample["loss_mask"].tolist() == [1.0] * LENGTH
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}


def test_end_of_document_settings(config, tokenizer):
    config.eod_mask_loss = True
    train, _, _ = build(config, tokenizer)
    seen = 0
    for i in range(len(train)):
        tokens = train[i]["tokens"].tolist()
        assert train[i]["loss_mask"].tolist() == [float(token != tokenizer.eod) for token in tokens]
        seen += tokens.count(tokenizer.eod)
    assert seen > 5
    with pytest.raises(InputError, match="reset_position_ids=true has no effect"):
        dataclasses.replace(config, reset_position_ids=True)


def test_more_samples_than_one_pass(config, prefixes, tokenizer):
    one = len(build(config, tokenizer)[0])
    more = build(config, tokenizer, train_samples=2 * one + 5)[0]
    assert len(more) >= 2 * one + 5
    counts = Counter(token for i in range(2 * one) for token in more[i]["tokens"].tolist())
    whole = Counter(token for document in documents_of(prefixes[0]) for token in document)
    # about two passes: each frequent token twice as often as in the text, to within the last cut samples
    for token, count in whole.most_common(20):
        assert 1.8 * count <= counts[token] <= 2.2 * count


def test_split_cuts_documents(config, prefixes, tokenizer):
    config.valid, config.split = None, "80,20,0"
    train, valid, _ = build(config, tokenizer, None, None)
    documents = documents_of(prefixes[0])
    cut = round(0.8 * len(documents))
    assert rows(train) == packed(documents[:cut], SEED)
    assert rows(valid) == packed(documents[cut:], SEED)


def test_training_without_held_out_text_where_nobody_asked_for_any(config, prefixes, tokenizer, tmp_path):
    def names(**settings):
        data = dataclasses.replace(config, **settings)
        parts = training_parts(data, [wanted(4), dataclasses.replace(wanted(4), is_validation=True)])
        training, *validation = build_datasets(data, tokenizer, parts, seed=SEED)
        assert parts[0].name == "train" and training is not None and len(training) >= 4
        return [part.source for part, dataset in zip(parts[1:], validation, strict=True) if dataset is not None]

    assert names() == names(valid=None) == names(valid=None, split="80,20,0") == [""]
    assert names(valid=None, train=prefixes[1]) == [], "three files, of which the default holds none out"
    assert names(valid=None, split="1,0,0") == []
    both = list(prefixes)
    assert names(valid=None, train=both) == ["email_text_document"]
    assert names(train=both) == [""] and len(names(valid=both)) == 3
    for settings, words in (({"split": "97,2,1"}, "0 tokens in the 0 of its"), ({"split": "0,1,1"}, "for train")):
        with pytest.raises(InputError, match=words):
            names(valid=None, train=prefixes[1], **settings)
    (tmp_path / "no.txt").write_text("short")
    short = small_data(tmp_path / "short", tokenizer, package=str(tmp_path / "no.txt"))
    with pytest.raises(InputError, match=r"data\.valid=.*short_text_document holds . tokens.*give more text"):
        names(valid=short)


@pytest.mark.parametrize("form", ["list", "string"])
def test_weighted_blend(config, prefixes, tokenizer, form):
    items = ["0.75", prefixes[0], "0.25", prefixes[1]]
    config.train = items if form == "list" else " ".join(items)
    train, _, _ = build(config, tokenizer, train_samples=400)
    assert len(train) >= 400
    first = {tuple(row) for row in packed(documents_of(prefixes[0]), SEED)}
    from_first = sum(tuple(row) in first for row in rows(train)[:400])
    # the blend follows the weights to within one sample
    assert abs(from_first - 300) <= 1


def test_plain_blend_follows_token_counts_beyond_one_pass(config, prefixes, tokenizer):
    config.train = list(prefixes)
    sizes = [os.path.getsize(prefix + ".bin") for prefix in prefixes]
    samples = sum(sizes) // 2 // LENGTH * 3
    train, _, _ = build(config, tokenizer, train_samples=samples)
    assert len(train) >= samples
    chosen = numpy.bincount([int(train[i]["dataset_id"]) for i in range(samples)])
    assert abs(chosen[0] / samples - sizes[0] / sum(sizes)) < 0.01
    whole, _, _ = build(config, tokenizer)
    assert sorted(rows(whole)) == sorted(row for prefix in prefixes for row in packed(documents_of(prefix), SEED))
    batch = next(stream(train, 0, 2, 0, 1, 2))
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids", "samples"}


def stream(dataset, consumed, micro_batch_size, rank, size, global_batch_size, num_workers=0):
    return batches(
        dataset,
        consumed_samples=consumed,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=size,
        global_batch_size=global_batch_size,
        num_workers=num_workers,
    )


def samples_of(iterator, count: int) -> list[list[int]]:
    """The first `count` samples' tokens of an iterator of batches."""
    found: list[list[int]] = []
    while len(found) < count:
        found += next(iterator)["tokens"].tolist()
    assert len(found) == count
    return found


@pytest.fixture(scope="module")
def train(prefixes, tokenizer, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    config = DataConfig(train=prefixes[1], valid=prefixes[1], sequence_length=LENGTH, cache_path=cache)
    return build(config, tokenizer)[0]


def test_a_global_batch_is_the_same_at_every_layout(train):
    tokens = [row[:-1] for row in rows(train)]
    for size, micro_batch_size in itertools.product((1, 2, 4), (1, 2, 3)):
        ranks = [stream(train, 24, micro_batch_size, rank, size, 24) for rank in range(size)]
        for step in (1, 2):
            parts = [samples_of(rank, 24 // size) for rank in ranks]
            whole = [
                row
                for k in range(24 // size // micro_batch_size)
                for part in parts
                for row in part[k * micro_batch_size : (k + 1) * micro_batch_size]
            ]
            assert whole == tokens[24 * step : 24 * (step + 1)]


def test_resume_and_wrap_around(train):
    tokens = [row[:-1] for row in rows(train)]
    n = len(tokens)
    straight = stream(train, 0, 2, 1, 2, 4)
    for _ in range(5):
        next(straight)
    resumed = stream(train, 20, 2, 1, 2, 4)
    for _ in range(4):
        first, second = next(straight), next(resumed)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert samples_of(stream(train, n - 1, 1, 0, 1, 1), 3) == [tokens[n - 1], tokens[0], tokens[1]]
    assert samples_of(stream(train, 3 * n + 2, 1, 0, 1, 1), 1) == [tokens[2]]


def test_batches_in_worker_processes_are_the_same(train):
    plain, workers = stream(train, 6, 2, 1, 2, 4), stream(train, 6, 2, 1, 2, 4, num_workers=2)
    for _ in range(5):
        first, second = next(plain), next(workers)
        assert list(first) == list(second) == ["tokens", "labels", "loss_mask", "position_ids", "samples"]
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert [(first[k].dtype, tuple(first[k].shape)) for k in ("tokens", "loss_mask")] == [
        (torch.int64, (2, LENGTH)),
        (torch.float32, (2, LENGTH)),
    ]


def test_batches_once_gives_every_sample_once(train):
    chosen = [5, 0, 17, 3, 9, 30, 2]
    tokens = rows(train)
    for size, micro_batch_size in itertools.product((1, 2, 3), (1, 2, 4)):
        rounds = -(-7 // (micro_batch_size * size))
        found = []
        for rank in range(size):
            got = list(
                batches_once(
                    train,
                    chosen,
                    micro_batch_size=micro_batch_size,
                    data_parallel_rank=rank,
                    data_parallel_size=size,
                )
            )
            assert len(got) == rounds and all(batch["tokens"].shape == (micro_batch_size, LENGTH) for batch in got)
            for batch in got:
                assert torch.equal(batch["loss_mask"].sum(1), batch["valid"] * LENGTH), "fillers count no token"
                found += [row for row, valid in zip(batch["tokens"].tolist(), batch["valid"], strict=True) if valid]
        assert sorted(found) == sorted(tokens[i][:-1] for i in chosen)


def test_overwritten_data_is_not_read_through_old_indices(config, tokenizer, tmp_path):
    prefix = small_data(tmp_path / "data", tokenizer, package=JSON_PACKAGE)
    config.train = config.valid = prefix
    before = rows(build(config, tokenizer)[0])
    small_data(tmp_path / "data", tokenizer, overwrite=True)
    after = rows(build(config, tokenizer)[0])
    assert after == packed(documents_of(prefix), SEED) != before


def test_indices_cut_off_by_a_kill_are_built_again(config, tokenizer):
    expected = rows(build(config, tokenizer)[0])
    cached = [path for path in Path(config.cache_path).rglob("*.npy")]
    assert len(cached) == 3
    for path in cached:
        content = path.read_bytes()
        for size in (0, len(content) // 2):
            path.write_bytes(content[:size])
            assert rows(build(config, tokenizer)[0]) == expected


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.marker),)


def test_an_index_that_is_a_pickle_is_not_loaded(config, tokenizer, tmp_path):
    """Megatron would: whatever is no array is unpickled."""
    expected = rows(build(config, tokenizer)[0])
    cached = [path for path in Path(config.cache_path).rglob("*.npy")]
    (tmp_path / "objects.npz").touch()
    numpy.save(tmp_path / "objects.npy", numpy.array([Evil(tmp_path / "marker")]), allow_pickle=True)
    numpy.savez(tmp_path / "objects.npz", numpy.array([Evil(tmp_path / "marker")]))
    evil = [path.read_bytes() for path in sorted(tmp_path.glob("objects.*"))]
    for content in (*evil, pickle.dumps(Evil(tmp_path / "marker"))):
        for path in cached:
            path.write_bytes(content)
        assert rows(build(config, tokenizer)[0]) == expected
    assert not (tmp_path / "marker").exists()


def test_calibration_set(config, prefixes, tokenizer):
    def calibration(num_samples=4):
        return rows(build_calibration(config, tokenizer, num_samples))

    assert calibration() == packed(documents_of(prefixes[0]), SEED), "the training set's text where there is no other"
    config.calibration = prefixes[1]
    assert calibration() == packed(documents_of(prefixes[1]), SEED)
    config.calibration = [1, prefixes[0], 1, prefixes[1]]
    blended = calibration(20)
    assert len(blended) >= 20 and len({tuple(row) for row in blended}) == len(blended)
    with pytest.raises(InputError, match="different samples, too few for its part"):
        calibration(10_000)
    config.calibration, config.valid, config.split = None, None, "80,20,0"
    documents = documents_of(prefixes[0])
    assert calibration() == packed(documents[: round(0.8 * len(documents))], SEED), "held-out documents stay out"


def test_refuses_batches_that_do_not_divide(train):
    with pytest.raises(InputError, match="global_batch_size=6 must be a multiple of micro_batch_size=2 times"):
        stream(train, 0, 2, 0, 2, 6)
