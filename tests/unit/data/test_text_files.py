"""Text as it comes: compressed, as Parquet, in other encodings, under other names; and what is no text is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_mcore.data.config import PreprocessConfig, TokenizerConfig
from minitron_mcore.errors import InputError
from tests.unit.data.test_preprocess import stored
from tests.unit.text_data import JSON_PACKAGE, preprocess, silent, train_tokenizer

TEXTS = [f"line {i}\nof the größte number {i * i}" for i in range(60)]
LINES = "".join(json.dumps({"text": text, "id": i}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS))
RAW = LINES.encode()
LIST = json.dumps([{"text": text} for text in TEXTS], indent=1, ensure_ascii=False).encode()


def texts_in(path: Path | str, tokenizer, tmp_path: Path, report: Callable[[str], None] = silent, **settings) -> list:
    """What the documents preprocessed from `path` say, each by way of its tokens."""
    config = PreprocessConfig(input=str(path), output_prefix=str(tmp_path / "out" / "data"), workers=1, overwrite=True)
    for name, value in settings.items():
        setattr(config, name, value)
    prefix = preprocess(config, tokenizer, seed=0, report=report)[0]
    return [tokenizer.detokenize(document[:-1]) for document in stored(prefix)]


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("backports.zstd").compress(content)


SPELLINGS: dict[str, Callable[[], bytes]] = {
    "a.jsonl.gz": lambda: gzip.compress(RAW),
    "a.json.gz": lambda: gzip.compress(RAW[:900]) + gzip.compress(RAW[900:]),  # members end to end
    "a.ndjson": lambda: RAW,
    "A.JSONL": lambda: RAW,
    "A.JSONL.GZ": lambda: gzip.compress(RAW),
    "a.jsonl.bz2": lambda: bz2.compress(RAW),
    "a.ndjson.xz": lambda: lzma.compress(RAW),
    "filled.jsonl.xz": lambda: lzma.compress(RAW[:900]) + bytes(8) + lzma.compress(RAW[900:]) + bytes(4),
    "parallel.jsonl.bz2": lambda: bz2.compress(RAW[:900]) + bz2.compress(RAW[900:]),
    "old.jsonl.lzma": lambda: lzma.compress(RAW, format=lzma.FORMAT_ALONE),
    "a.jsonl.zst": lambda: zstd(RAW[:1000]) + zstd(RAW[1000:]),
    "compressed.jsonl": lambda: gzip.compress(RAW),
    "other.jsonl.zst": lambda: gzip.compress(RAW),
    "frame.jsonl": lambda: zstd(RAW),
    "lines.txt": lambda: RAW,
    "part-00000": lambda: RAW,
    "windows.jsonl": lambda: b"\xef\xbb\xbf" + RAW.replace(b"\n", b"\r\n"),
    "utf16.jsonl": lambda: LINES.encode("utf-16"),
    "utf16.jsonl.gz": lambda: gzip.compress(b"\xfe\xff" + LINES.encode("utf-16-be")),
    "utf32.jsonl": lambda: LINES.encode("utf-32"),
    "joined.jsonl": lambda: RAW[: RAW.index(b"\n") + 1] + b"\xef\xbb\xbf" + RAW[RAW.index(b"\n") + 1 :],
    "list.json": lambda: LIST,
    "list.json.gz": lambda: gzip.compress(b"\xef\xbb\xbf" + LIST),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_same_documents_however_they_are_stored(name, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(SPELLINGS[name]())
    assert texts_in(tmp_path / name, tokenizer, tmp_path) == TEXTS


def test_a_folder_of_them_all_with_one_worker_and_with_two(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("minitron_mcore.data.preprocess.TASK_BYTES", 2000)  # many tasks, which cross files
    folder = tmp_path / "in"
    folder.mkdir()
    names = [name for name in SPELLINGS if "zst" not in name and "frame" not in name]
    for name in names:
        (folder / name).write_bytes(SPELLINGS[name]())
    others = {".json", ""}  # not among the endings that are taken from folders
    taken = [name for name in names if Path(name.removesuffix(".gz")).suffix not in others]
    one = texts_in(folder, tokenizer, tmp_path)
    assert one == TEXTS * len(taken)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert texts_in(folder, tokenizer, tmp_path, workers=2) == one
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_parquet(kind, tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    table = pyarrow.table({"id": list(range(len(TEXTS))), "body": column, "text": column})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7, compression="zstd")
    assert texts_in(tmp_path / "a.parquet", tokenizer, tmp_path) == TEXTS
    assert texts_in(tmp_path / "a.parquet", tokenizer, tmp_path, json_keys=["body"]) == TEXTS
    (tmp_path / "a.parquet").rename(tmp_path / "b.txt")
    said: list[str] = []
    assert texts_in(tmp_path / "b.txt", tokenizer, tmp_path, said.append) == TEXTS
    assert "b.txt is read as Parquet, whatever its name says" in said[0]


def test_parquet_that_cannot_be_read(tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    columns = {"text": TEXTS, "number": list(range(60)), "some": ["a", None] * 30, "part": [{"text": "a"}] * 60}
    parquet.write_table(pyarrow.table(columns), path)
    for key, words in {
        "body": "has no column 'body', only ['number', 'part', 'some', 'text']: name the key of the text as",
        "number": "a.parquet has a column 'number' of type int64: make it one of strings",
        "part": "has a column 'part' of type struct",
        "some": "a.parquet, row 2, has null as 'some', not a string",
    }.items():
        refused(path, words, tokenizer, tmp_path, json_keys=[key])
    both = pyarrow.Table.from_arrays([pyarrow.array(TEXTS)] * 2, names=["text", "text"])
    parquet.write_table(both, tmp_path / "b.parquet")
    refused(tmp_path / "b.parquet", "b.parquet has 2 columns 'text'", tokenizer, tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:200] + bytes(200) + whole[400:], whole[:4] + whole[8:]):
        path.write_bytes(damaged)
        refused(path, "a.parquet is damaged or cut off", tokenizer, tmp_path)


def test_parquet_and_zstd_without_their_packages(tokenizer, tmp_path, monkeypatch):
    for package in ("pyarrow", "compression.zstd", "backports.zstd", "backports"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on")
    (tmp_path / "a.jsonl").write_bytes(b"\x28\xb5\x2f\xfd and so on")
    refused(tmp_path / "a.parquet", "pip install 'minitron-mcore[parquet]'", tokenizer, tmp_path)
    refused(tmp_path / "a.jsonl", "pip install backports.zstd", tokenizer, tmp_path)


def refused(path: Path, words: str, tokenizer, tmp_path: Path, **settings) -> None:
    """By both verbs, in one sentence that names the file, with nothing left behind."""
    with pytest.raises(InputError) as caught:
        texts_in(path, tokenizer, tmp_path, **settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.key == "" and path.name in str(caught.value.value) and caught.value.remedy
    assert not (tmp_path / "out").exists()
    config = TokenizerConfig(model=str(tmp_path / "out" / "t.model"), input=str(path), vocab_size=300)
    config.json_key = settings.get("json_keys", ["text"])[0]
    with pytest.raises(InputError) as caught:
        train_tokenizer(config, seed=0, report=silent)
    assert words in str(caught.value) and not (tmp_path / "out").exists()


def archive(path: Path, kind: str) -> bytes:
    (path / "a.jsonl").write_bytes(RAW)
    target = path / "archive"
    if kind == "zip":
        with zipfile.ZipFile(target, "w") as file:
            file.write(path / "a.jsonl")
    elif kind == "sqlite":
        connection = sqlite3.connect(target)
        connection.execute("create table a (b text)")
        connection.commit()
        connection.close()
    else:
        with tarfile.open(target, "w") if kind == "tar" else tarfile.open(target, "w:gz") as file:
            file.add(path / "a.jsonl")
    return target.read_bytes()


DAMAGED: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "a.jsonl.gz": (lambda _: gzip.compress(RAW)[:-40], "a.jsonl.gz is damaged or cut off"),
    "b.jsonl.gz": (lambda _: gzip.compress(RAW)[:60] + bytes(20) + gzip.compress(RAW)[80:], "is damaged or cut off"),
    "c.jsonl.gz": (lambda _: gzip.compress(RAW) + b"more", "is damaged or cut off"),
    "d.jsonl.gz": (lambda _: RAW, "is not compressed by gzip, as its name says"),
    "e.jsonl.gz": (lambda _: b"", "is not compressed by gzip, as its name says"),
    "f.jsonl.gz": (lambda _: gzip.compress(gzip.compress(RAW)), "is compressed twice, by gzip and gzip"),
    "a.jsonl.zst": (lambda _: zstd(RAW)[:-40], "is damaged or cut off"),
    "b.jsonl.zst": (lambda _: zstd(RAW)[:4] + gzip.compress(RAW), "is damaged or cut off"),
    "a.jsonl.bz2": (lambda _: bz2.compress(RAW)[:-9], "is damaged or cut off"),
    "b.jsonl.bz2": (lambda _: b"BZh9" + RAW, "is damaged or cut off"),
    "a.jsonl.xz": (lambda _: lzma.compress(RAW)[:-9], "is damaged or cut off"),
    # Of streams end to end a later one: its beginning, and its middle.
    "c.jsonl.bz2": (lambda _: bz2.compress(RAW) + b"BZh8" + bytes(9), "is damaged or cut off"),
    "d.jsonl.bz2": (lambda _: bz2.compress(RAW) + bz2.compress(RAW)[:60] + bytes(99), "is damaged or cut off"),
    "b.jsonl.xz": (lambda _: lzma.compress(RAW) + b"more", "is damaged or cut off"),
    "c.jsonl.xz": (lambda _: lzma.compress(RAW) + lzma.compress(RAW)[:60] + bytes(99), "is damaged or cut off"),
    "a.parquet": (lambda _: RAW, "is not a Parquet file, as its name says"),
    "a.csv": (lambda _: b"text,id\nhello,1\n", "is a table of comma-separated values"),
    "a.TSV.gz": (lambda _: gzip.compress(b"text\tid\nhello\t1\n"), "is a table of tab-separated values"),
    "zip.txt": (lambda path: archive(path, "zip"), "zip.txt is a ZIP archive, not text"),
    "tar.txt": (lambda path: archive(path, "tar"), "is a tar archive, not text"),
    "a.tar.gz": (lambda path: archive(path, "tar.gz"), "is a tar archive inside gzip, not text"),
    "sql.jsonl": (lambda path: archive(path, "sqlite"), "is an SQLite database, not text"),
    "pdf.txt": (lambda _: b"%PDF-1.7\n%\xe2\xe3\n1 0 obj\n", "is a PDF document, not text"),
    "wide.txt": (lambda _: "no mark".encode("utf-16-le"), "its byte 1 is zero: convert it with iconv if it is UTF-16"),
    "late.txt": (lambda _: b"a" * 100_000 + b"\0", "its byte 100,000 is zero"),
    "cyrillic.txt": (
        lambda _: ("Съешь же ещё этих мягких булок. " * 9).encode("cp1251"),
        "is not UTF-8, because 225 of",
    ),
    "kana.jsonl": (lambda _: json.dumps({"text": "かな" * 90}, ensure_ascii=False).encode("euc-jp"), "is not UTF-8"),
    "odd.txt": (lambda _: "text".encode("utf-16") + b"\x00", "begins as UTF-16-LE but cannot be read on"),
    "deep.jsonl": (lambda _: RAW + b"[" * 200_000 + b"]" * 200_000 + b"\n", "line 61, holds lists or objects nested"),
    "deep2.jsonl": (lambda _: b'{"text": "a", "b": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_001, "line 1, holds"),
    "deep3.json": (lambda _: b'[{"text": "a"},' + b"[" * 200_000, "item 2, holds lists or objects nested too deeply"),
    "digits.jsonl": (lambda _: b'{"text": "a", "b": ' + b"1" * 5000 + b"}", "line 1, cannot be read as JSON"),
    "pretty.json": (lambda _: b'{\n "text": "a"\n}\n', "line 1, is not JSON"),
    "null.jsonl": (lambda _: RAW + b'{"text": null}', "line 61, has a 'text' of type NoneType"),
    "cut.json": (lambda _: LIST[:-30], "item 60 of its list, is not JSON"),
    "comma.json": (lambda _: b'[{"text": "a"} {"text": "b"}]', "item 1 of its list, is not JSON"),
    "more.json": (lambda _: b'[{"text": "a"}]\n{"text": "b"}', "goes on after its list of 1 items"),
    "words.json": (lambda _: b'["a", "b"]', "words.json, item 1, holds a str: make each item an object"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_refuses(name, tokenizer, tmp_path):
    (tmp_path / "made").mkdir()
    make, words = DAMAGED[name]
    (tmp_path / name).write_bytes(make(tmp_path / "made"))
    refused(tmp_path / name, words, tokenizer, tmp_path)


def test_a_mark_is_no_text(tokenizer, tmp_path):
    for name, encoding in {"a": "utf-8-sig", "b": "utf-16", "c": "utf-32"}.items():
        (tmp_path / f"{name}.txt").write_bytes("größer\r\nals 漢字🎉".encode(encoding))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("größer\r\nals 漢字🎉".encode("utf-8-sig")))
    assert texts_in(tmp_path, tokenizer, tmp_path) == ["größer\r\nals 漢字🎉"] * 4


@pytest.mark.parametrize("text", [LIST.decode(), '{\n "text": "a",\n "id": 1\n}\n'])
def test_json_under_the_name_of_a_text_is_asked_about(text, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    said: list[str] = []
    assert texts_in(tmp_path / "a.txt", tokenizer, tmp_path, said.append) == [text]
    assert "a.txt is read as plain text, though it begins like JSON; name it .json to have it read" in said[0]
    (tmp_path / "c.txt").write_text("[{braces}] and {more: of them}")
    said.clear()
    texts_in(tmp_path / "c.txt", tokenizer, tmp_path, said.append)
    assert not any("warning" in words for words in said)


def test_what_is_replaced_is_counted(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes("fine \ufffd".encode())
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\ncaf\xe9 na\xefve \xf0\x9f\x98\n")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n{"text": "half \\ud83d pair"}\n')
    said: list[str] = []
    texts = texts_in(tmp_path, tokenizer, tmp_path, said.append)
    assert texts[1:] == ["one\ntwo\ncaf\ufffd na\ufffdve \ufffd\n", "\ufffd\ufffd", "half \ufffd pair"]
    warning = "WARNING: characters that are not UTF-8, replaced by U+FFFD: 6 (files: 2), the first in "
    assert [line for line in said if "U+FFFD" in line] == [f"{warning}{tmp_path}/b.txt, line 3"]
    said.clear()
    config = TokenizerConfig(model=str(tmp_path / "t.model"), input=str(tmp_path), vocab_size=281)
    train_tokenizer(config, seed=0, report=said.append)
    assert [line for line in said if "U+FFFD" in line] == [f"{warning}{tmp_path}/b.txt, line 3"]


def test_few_documents_are_in_memory_at_a_time(tmp_path):
    """A file of 60 MB, a few kB when compressed, is read in a hundredth of that."""
    import tracemalloc

    from minitron_mcore.data.records import read_records
    from minitron_mcore.data.text_file import inspect_file

    line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as stream:
        for _ in range(600):
            stream.write(line * 100)
    tracemalloc.start()
    count = sum(1 for _ in read_records(inspect_file(str(tmp_path / "a.jsonl.gz")), ["text"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 60_000 and peak < 2 << 20


def test_a_tokenizer_of_a_compressed_file_is_that_of_the_plain_one(tmp_path):
    text = "".join(json.dumps({"text": path.read_text()}) + "\n" for path in sorted(Path(JSON_PACKAGE).glob("*.py")))
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    models = []
    for name in ("a.jsonl", "b.jsonl.gz"):
        config = TokenizerConfig(model=str(tmp_path / f"{name}.model"), input=str(tmp_path / name), vocab_size=400)
        models.append(train_tokenizer(config, seed=0, report=silent).fingerprint)
    assert models[0] == models[1]
