"""What is known of data before it is read: clear refusals, and the same datasets as are built."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from minitron_mcore.data.blend import parse_blend, parse_split
from minitron_mcore.data.described import describe, describe_calibration, describe_training, split_part
from minitron_mcore.data.index import HEADER, TOKEN_TYPES, read_index
from minitron_mcore.errors import InputError
from tests.unit.data.test_dataset import build, build_calibration, documents_of, wanted
from tests.unit.text_data import JSON_PACKAGE, small_data, small_tokenizer


@pytest.mark.parametrize(
    ("settings", "key", "value", "rule", "remedy"),
    [
        ({"train": None}, "data.train", None, "is not set", "a .bin/.idx pair"),
        ({"train": "/nowhere/x"}, "data.train", "/nowhere/x", "lacks its .bin or its .idx", "`preprocess`"),
        ({"train": "EMAIL_SHORT"}, "data.train", "EMAIL_SHORT", "lacks its", "email_text_document?"),
        (
            {"train": ["0.5", "EMAIL", "JSON"]},
            "data.train",
            ["0.5", "EMAIL", "JSON"],
            "must be",
            "a weight before each",
        ),
        ({"train": ["-1", "EMAIL", "2", "JSON"]}, "data.train", ["-1", "EMAIL", "2", "JSON"], "weights above 0", ""),
        ({"train": 5}, "train", 5, "must be text or a list", ""),
        ({"train": []}, "data.train", [], "must be prefixes alone", ""),
        ({"valid": None, "split": "1,0,0"}, "data.split", "1,0,0", "leaves no documents for valid", "set data.valid"),
        (
            *({"valid": None, "split": "9999,1,0"}, "data.train", "EMAIL"),
            *("holds 0 tokens in the 0 of its", "data.valid, or preprocess.valid_fraction"),
        ),
        ({"valid": None, "split": "a,b"}, "data.split", "a,b", "must be one to three shares", "969,30,1"),
        ({"valid": None, "split": "0,0,0"}, "data.split", "0,0,0", "one of them above 0", ""),
        ({"sequence_length": 0}, "sequence_length", 0, "must be at least 1", ""),
        (
            *({"sequence_length": 10_000_000}, "data.train", "EMAIL"),
            *("one sample takes data.sequence_length + 1 = 10,000,001", "lower data.sequence_length"),
        ),
        ({"reset_attention_mask": True}, "reset_attention_mask", True, "is not possible", "leave it out"),
        ({"cache_path": "/proc/nowhere"}, "data.cache_path", "/proc/nowhere", "cannot be written", ""),
    ],
)
def test_refuses(config, prefixes, tokenizer, settings, key, value, rule, remedy):
    names = {"EMAIL": prefixes[0], "JSON": prefixes[1], "EMAIL_SHORT": prefixes[0][: -len("_text_document")]}

    def named(value):
        if isinstance(value, list):
            return [names.get(item, item) for item in value]
        return names.get(value, value) if isinstance(value, str) else value

    def described(data):
        describe(data, [split_part(data, name, 4) for name in ("train", "valid")], tokenizer)

    for refused in (described, lambda data: build(data, tokenizer, 4, 4)):
        with pytest.raises(InputError) as caught:
            refused(dataclasses.replace(config, **{name: named(given) for name, given in settings.items()}))
        error = caught.value
        assert (error.key, error.value) == (key, named(value))
        assert rule in error.rule and remedy in error.remedy and "\n" not in str(error)


def test_what_is_described_is_what_is_built(config, prefixes, tokenizer):
    """Whatever the parts: their tokens, whether validation is there, and what another job will write."""
    valid = dataclasses.replace(wanted(4), is_validation=True)
    config.train = [3, prefixes[0], 1, prefixes[1]]
    described = describe_training(config, tokenizer, [wanted(40), valid])
    lengths = [sum(map(len, documents_of(prefix))) for prefix in prefixes]
    assert [part.tokens for part in described.parts] == [tuple(lengths), (lengths[1],)] and described.has_validation
    assert [source.stored_tokens for source in described.sources.values()] == lengths
    config.valid, config.train = None, prefixes[1]
    assert not describe_training(config, tokenizer, [wanted(4), valid]).has_validation
    described = describe_calibration(config, tokenizer, 4)
    calibration = build_calibration(config, tokenizer, 4)
    assert calibration is not None and len(calibration) == described.parts[0].samples
    assert {code: numpy.dtype(DType.dtype_from_code(code)) for code in (kind.value for kind in DType)} == TOKEN_TYPES
    index = read_index(prefixes[0])
    assert index and index.lengths().tolist() == IndexedDataset(prefixes[0]).sequence_lengths.tolist()


def test_promised_text_is_checked_as_far_as_it_is_known(config, prefixes, tokenizer):
    config.train, config.valid = "/later/a b", None
    sizes = [wanted(4), dataclasses.replace(wanted(4), is_validation=True)]
    for known in (None, tokenizer):
        described = describe_training(config, known, sizes, promised={"/later/a b"})
        assert (
            [part.tokens for part in described.parts] == [(0,), (0,)]
            and not described.sources
            and described.has_validation
        )
    for change, key in (({"split": "0,1"}, "data.split"), ({"valid": "/later/c"}, "data.valid")):
        data = dataclasses.replace(config, **change)
        with pytest.raises(InputError) as caught:
            describe_training(
                data, None, [wanted(4), dataclasses.replace(wanted(4), is_validation=True)], {"/later/a b"}
            )
        assert caught.value.key == key
    config.train = prefixes[0]
    with pytest.raises(
        InputError, match=r"holds the ids of a tokenizer that is not given: name it as tokenizer\.model"
    ):
        describe_training(config, None, [wanted(4)])


def test_refuses_a_tokenizer_that_does_not_fit(config, prefixes, tokenizer, tmp_path):
    other = small_tokenizer(tmp_path / "other.model", vocab_size=400)
    with pytest.raises(InputError) as caught:
        build(config, other)
    assert (caught.value.key, caught.value.value) == ("data.train", prefixes[0])
    assert "made with another tokenizer" in caught.value.rule and other.path in caught.value.rule
    assert "allow=[other_tokenizer]" in caught.value.remedy
    bare = tmp_path / "bare"
    for ending in (".bin", ".idx"):
        os.link(prefixes[0] + ending, str(bare) + ending)
    config.train = str(bare)
    with pytest.raises(InputError, match=r"holds token \d+, beyond the 400 of tokenizer\.model"):
        build(config, other)
    assert build(config, tokenizer)[0] is not None, "without a description the ids decide"


@pytest.mark.parametrize(("ending", "words"), [(".bin", "and its index counts"), (".idx", r"an \.idx that is cut off")])
def test_refuses_cut_off_files(config, tokenizer, tmp_path, ending, words):
    prefix = small_data(tmp_path / "data", tokenizer, package=JSON_PACKAGE)
    content = Path(prefix + ending).read_bytes()
    config.train = prefix
    for size in (len(content) // 2, len(content) - 1, 20, 0):
        Path(prefix + ending).write_bytes(content[:size])
        with pytest.raises(InputError, match=rf"data\.train=.*({words}|an empty .bin).*: preprocess the text again"):
            build(config, tokenizer)


@pytest.mark.parametrize("place", ["offset", "end"])
def test_refuses_an_index_that_does_not_fit_itself(config, tokenizer, tmp_path, place):
    """A bit that turned over: Megatron would read another text, or stop at an assertion."""
    config.train = prefix = small_data(tmp_path / "data", tokenizer, package=JSON_PACKAGE)
    file = Path(prefix + ".idx")
    content, index = bytearray(file.read_bytes()), read_index(prefix)
    assert index is not None and index.is_consistent
    sequences = index.sequences
    content[HEADER.size + 4 * sequences + 8 * (1 if place == "offset" else sequences + 1)] ^= 2
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"data\.train=.* has a damaged \.idx: .*: preprocess the text again"):
        build(config, tokenizer)


def test_blends_and_splits_as_written():
    assert parse_blend("a b", "k").prefixes == ("a", "b")
    assert parse_blend(["1", "a.bin", 2.5, "b.idx"], "k").weights == (1.0, 2.5)
    assert parse_blend(["1", "a.bin", 2.5, "b.idx"], "k").prefixes == ("a", "b")
    assert parse_blend(["a", "b"], "k").weights is None
    assert parse_split("969, 30,1") == [(0.0, 0.969), (0.969, 0.999), (0.999, 1.0)]
    assert parse_split("1") == [(0.0, 1.0), None, None]
