"""Calibration samples: the same set at every layout and micro batch size, each scored once."""

from __future__ import annotations

import itertools

import pytest
import torch

from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.dataset import batches_once, draw_samples
from minitron_mcore.data.described import calibration_part, describe_calibration
from minitron_mcore.errors import InputError
from tests.unit.data.test_dataset import build_calibration


@pytest.fixture(scope="module")
def dataset(corpus, tokenizer):
    config = DataConfig(calibration=str(corpus / "json_text_document"), sequence_length=32)
    return build_calibration(config, tokenizer, 10, seed=1)


def read(dataset, num_samples, micro_batch_size, rank, size, seed=3, num_workers=0):
    return list(
        batches_once(
            dataset,
            draw_samples(dataset, num_samples, seed),
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=size,
            num_workers=num_workers,
        )
    )


def test_samples_are_drawn_without_replacement(dataset):
    drawn = draw_samples(dataset, 50, seed=3)
    assert len(set(drawn)) == 50 and all(0 <= i < len(dataset) for i in drawn)
    assert drawn == draw_samples(dataset, 50, seed=3) != draw_samples(dataset, 50, seed=4)
    assert sorted(draw_samples(dataset, len(dataset), seed=3)) == list(range(len(dataset)))


@pytest.mark.parametrize("num_samples", [1, 7, 12])
def test_every_layout_scores_the_same_samples_once(dataset, num_samples):
    expected = sorted(dataset[i]["tokens"].tolist() for i in draw_samples(dataset, num_samples, seed=3))
    for size, micro_batch_size in itertools.product((1, 2, 3, 4), (1, 2, 5)):
        rounds = -(-num_samples // (micro_batch_size * size))
        found = []
        for rank in range(size):
            got = read(dataset, num_samples, micro_batch_size, rank, size)
            assert len(got) == rounds, "a rank with fewer microbatches would leave the others waiting"
            for batch in got:
                assert batch["tokens"].shape == (micro_batch_size, 32) and batch["valid"].shape == (micro_batch_size,)
                assert not batch["loss_mask"][batch["valid"] == 0].any()
                found += batch["tokens"][batch["valid"] == 1].tolist()
        assert sorted(found) == expected


def test_a_sum_weighted_by_valid_is_the_dense_sum(dataset):
    drawn = draw_samples(dataset, 7, seed=3)
    dense = sum(float(dataset[i]["tokens"].double().pow(2).sum()) for i in drawn)
    for size in (1, 2, 4):
        total = 0.0
        for rank in range(size):
            for batch in read(dataset, 7, 2, rank, size):
                per_sample = batch["tokens"].double().pow(2).sum(1)
                total += float((per_sample * batch["valid"]).sum())
        assert total == dense, "sums of small integers are exact in float64"


def test_reading_processes_change_nothing(dataset):
    plain, workers = read(dataset, 7, 2, 1, 2), read(dataset, 7, 2, 1, 2, num_workers=2)
    assert len(plain) == len(workers) == 2
    for first, second in zip(plain, workers, strict=True):
        assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("num_samples", "rule", "remedy"),
    [(0, "must be at least 1", ""), (100_000, "calibration samples there are", "data.calibration")],
)
def test_refuses(dataset, num_samples, rule, remedy):
    with pytest.raises(InputError) as caught:
        read(dataset, num_samples, 1, 0, 1)
    assert (caught.value.key, caught.value.value) == ("importance.num_samples", num_samples)
    assert rule in caught.value.rule and remedy in caught.value.remedy


def test_refuses_a_wrong_number_of_samples_before_building(corpus, tokenizer):
    with pytest.raises(InputError, match=r"importance\.num_samples=0 must be at least 1"):
        calibration_part(DataConfig(train="x"), 0)
    data = DataConfig(calibration=str(corpus / "json_text_document"), sequence_length=32)
    with pytest.raises(InputError, match=r"importance\.num_samples=100000 is more than the 6\d\d calibration"):
        describe_calibration(data, tokenizer, 100_000)
