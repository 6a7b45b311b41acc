"""Long plain text becomes several documents, which put together are the text; some of them can be held out."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from minitron_mcore.data import preprocess as preprocessing
from minitron_mcore.data import records
from minitron_mcore.data.config import DataConfig, PreprocessConfig
from minitron_mcore.data.dataset import build_datasets
from minitron_mcore.data.described import split_part
from minitron_mcore.errors import InputError
from tests.unit.data.test_preprocess import stored, write_jsonl
from tests.unit.text_data import preprocess, silent

PROSE = "".join(f"Paragraph {i} says\nthat {i} is {'a' * (i % 90)} number.\n\n" for i in range(2500)).encode()


def parts(text: bytes, path: str = "a.txt", document_bytes: int | None = None) -> list[bytes]:
    found = list(records.passages(io.BytesIO(text), path, document_bytes))
    pieces = [piece for _, piece in found]
    assert b"".join(pieces) == text
    starts = [1 + b"".join(pieces[:i]).count(b"\n") for i in range(len(pieces))]
    assert [line for line, _ in found] == starts
    return pieces


@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n"])
def test_at_blank_lines(ending):
    pieces = parts(PROSE.replace(b"\n\n", ending))
    assert len(pieces) > 8
    assert all(piece.endswith(b"\n") and piece.startswith(b"Paragraph") for piece in pieces)
    assert all(4096 < len(piece) <= records.PASSAGE_BYTES + 4 for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        (PROSE.replace(b"\n\n", b"\n"), b"\n"),
        (PROSE.replace(b"\n", b" "), b" "),
        (b"\n\n" + b"a" * 200_000, b"a"),
        ("漢字かな交じり文🎉".encode() * 9000, b""),
        (b"\x80\xbf" * 60_000, b""),
    ],
)
def test_without_blank_lines_by_lines_words_or_size(text, ends, monkeypatch):
    monkeypatch.setattr(records, "BLOCK_BYTES", 5000)  # what is read at a time does not matter
    pieces = parts(text)
    assert len(pieces) > 4 and all(piece.endswith(ends) for piece in pieces[:-1])
    assert all(0 < len(piece) <= records.PASSAGE_BYTES for piece in pieces)
    if b"\x80\xbf" not in text:
        assert all(piece.decode() for piece in pieces), "no character is cut in two"


def test_which_files_are_cut():
    long, short = PROSE[: records.LONG_BYTES + 1], PROSE[: records.LONG_BYTES]
    for name in ("a.txt", "a.TXT", "enwik", "a.txt.gz", "wiki.train.raw", "/b.c/part-0"):
        assert len(parts(short, name)) == 1 and len(parts(long, name)) > 4
    for name in ("a.py", "a.md", "a.tex.gz"):
        assert len(parts(PROSE, name)) == 1 and len(parts(PROSE, name, 1000)) > 50
    assert len(parts(PROSE, "a.txt", 0)) == 1 and parts(b"") == [b""]
    assert len(parts(PROSE[:1001], "a.txt", 1000)) == 2 and len(parts(PROSE[:1000], "a.txt", 1000)) == 1


def run(tmp_path: Path, tokenizer, said: list[str] | None = None, **settings) -> list[str]:
    given = {"input": str(tmp_path / "in"), "output_prefix": str(tmp_path / "out" / "data"), "workers": 1}
    config = PreprocessConfig(**{**given, **settings})
    return preprocess(config, tokenizer, seed=0, report=silent if said is None else said.append)


def test_one_text_file_has_a_held_out_share(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt.gz").write_bytes(gzip.compress(PROSE))
    said: list[str] = []
    train, valid = run(tmp_path, tokenizer, said, valid_fraction=0.1)
    pieces = [tokenizer.detokenize(document[:-1]) for document in stored(train) + stored(valid)]
    assert sorted(pieces) == sorted(piece.decode() for piece in parts(PROSE)) and 0 < len(stored(valid)) < 6
    words = f"preprocess: long text files, cut at blank lines: 1, into {len(pieces)} documents"
    assert any(line.startswith(words) and "preprocess.document_bytes=0" in line for line in said)
    with pytest.raises(InputError, match=r"document_bytes=99 must be 0 or at least 100"):
        run(tmp_path, tokenizer, document_bytes=99)
    with pytest.raises(InputError, match=r"valid_fraction=0\.1 leaves no document .* preprocess\.document_bytes"):
        run(tmp_path, tokenizer, document_bytes=0, valid_fraction=0.1, output_prefix=str(tmp_path / "other" / "data"))


@pytest.mark.parametrize(("fraction", "counts"), [(0.001, (3, 1)), (0.999, (1, 3))])
def test_of_few_documents_each_side_gets_one(fraction, counts, tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    texts = ["", "one", "two", "", "three", "four"]
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": text} for text in texts])
    draws = {text: preprocessing.draw(number, 0) for number, text in enumerate(texts) if text}
    said: list[str] = []
    prefixes = run(tmp_path, tokenizer, said, valid_fraction=fraction)
    sides = [[tokenizer.detokenize(d[:-1]) for d in stored(prefix) if d] for prefix in prefixes]
    assert tuple(map(len, sides)) == counts
    alone = (min if counts[1] == 1 else max)(draws, key=lambda text: draws[text])
    assert [alone] in sides and "because they are few" in said[0]


class Lengths(list):
    """Documents by their lengths."""

    def sizes(self) -> list[int]:
        return self


def test_what_waits_for_a_held_out_document_is_bounded(monkeypatch):
    monkeypatch.setattr(preprocessing, "WAITING_TOKENS", 100)
    taken: list[int] = []

    def documents():
        for number in range(50):
            taken.append(number)
            yield Lengths([10])

    found = preprocessing.assign(documents(), fraction=1e-9, seed=0, report=silent)
    assert next(found) == ([10], [False]) and len(taken) == 11
    assert [marks for _, marks in found] == [[False]] * 49


def test_empty_documents_are_those_of_megatrons_tool(tokenizer, tmp_path):
    """Byte for byte what Megatron-LM's tools/preprocess_data.py writes: it adds a document for each line, without any
    sentence where the text has no token."""
    texts = ["", "one", "", "", "two two", ""]
    (tmp_path / "in").mkdir()
    records = [{"text": text, "title": text[:1]} for text in texts]
    write_jsonl(tmp_path / "in" / "a.jsonl", records[:3])
    write_jsonl(tmp_path / "in" / "b.jsonl", records[3:])
    for key, prefix in zip(("text", "title"), run(tmp_path, tokenizer, json_keys=["text", "title"]), strict=True):
        builder = IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
        for record in records:
            ids = tokenizer.encode(record[key])
            lengths = [len(ids)] if ids else []
            if ids:
                ids.append(tokenizer.eod)
                lengths[-1] += 1
            builder.add_document(ids, lengths)
        builder.finalize(str(tmp_path / "t.idx"))
        for ending in (".bin", ".idx"):
            assert Path(prefix + ending).read_bytes() == (tmp_path / f"t{ending}").read_bytes()
    (tmp_path / "in" / "c.txt").write_text("")
    prefix = run(tmp_path, tokenizer, output_prefix=str(tmp_path / "more" / "data"))[0]
    assert [bool(document) for document in stored(prefix)] == [bool(text) for text in texts] + [False]


def test_empty_documents_change_no_sample(tokenizer, tmp_path):
    texts = [f"text {i} of many" for i in range(60)]
    (tmp_path / "in").mkdir()
    samples = []
    for name, step in {"without": 1, "with": 2}.items():
        path = tmp_path / "in" / f"{name}.jsonl"
        write_jsonl(path, [{"text": each} for text in texts for each in [text, ""][:step]])
        prefix = run(tmp_path, tokenizer, input=str(path), output_prefix=str(tmp_path / name))[0]
        assert len(stored(prefix)) == 60 * step
        data = DataConfig(train=prefix, split="80,20,0", sequence_length=16)
        parts = [split_part(data, name, None) for name in ("train", "valid")]
        sets = build_datasets(data, tokenizer, parts, seed=3)
        samples.append([[s[i]["tokens"].tolist() for i in range(len(s))] for s in sets if s is not None])
    assert samples[0] == samples[1] and numpy.size(samples[0][1]) > 16
