"""Preprocessing: the files hold each document's own tokens, whatever the number of workers; nothing half-written."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from minitron_mcore.data.config import PreprocessConfig, TokenizerConfig
from minitron_mcore.data.preprocess import is_held_out
from minitron_mcore.data.tokenizer import HUGGING_FACE, SENTENCEPIECE, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.runtime.progress import Bar
from tests.e2e.launchers import ROOT
from tests.unit.text_data import (
    EMAIL_PACKAGE,
    JSON_PACKAGE,
    preprocess,
    python_files,
    silent,
    small_data,
    small_tokenizer,
)


def stored(prefix: str) -> list[list[int]]:
    """Documents as Megatron reads them."""
    dataset = IndexedDataset(prefix)
    ends = dataset.document_indices.tolist()
    assert set(numpy.diff(ends)) <= {0, 1} and (ends[0], ends[-1]) == (0, len(dataset))
    return [dataset[i].tolist() if end > i else [] for i, end in itertools.pairwise(ends)]


def expected(tokenizer, package: str) -> list[list[int]]:
    texts = [path.read_bytes().decode("utf-8", errors="replace") for path in python_files(package)]
    return [[*tokenizer.tokenize(text), tokenizer.eod] if text else [] for text in texts]


def write_jsonl(path: Path, records: list) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def config_for(tmp_path: Path, source: Path | str, **settings: Any) -> PreprocessConfig:
    given = {"input": str(source), "output_prefix": str(tmp_path / "out" / "data"), "workers": 1}
    return PreprocessConfig(**{**given, **settings})


def test_documents_of_a_folder(tokenizer, tmp_path):
    prefix = small_data(tmp_path / "email", tokenizer)
    assert prefix == str(tmp_path / "email") + "_text_document"
    documents = expected(tokenizer, EMAIL_PACKAGE)
    assert stored(prefix) == documents
    raw = numpy.fromfile(prefix + ".bin", dtype=numpy.uint16)
    assert raw.tolist() == [token for document in documents for token in document]
    description = json.loads(Path(prefix + ".json").read_text())
    assert description["documents"] == len(documents) and description["tokens"] == len(raw)
    assert description["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["email_text_document" + ending for ending in (".bin", ".idx", ".json")]


def test_two_workers_write_what_one_writes(tokenizer, tmp_path):
    one = small_data(tmp_path / "one", tokenizer, valid_fraction=0.2)
    two = small_data(tmp_path / "two", tokenizer, valid_fraction=0.2, workers=2)
    for suffix in ("", "_valid"):
        for ending in (".bin", ".idx"):
            first = Path(str(tmp_path / "one") + suffix + "_text_document" + ending)
            second = Path(str(tmp_path / "two") + suffix + "_text_document" + ending)
            assert first.read_bytes() == second.read_bytes()
    assert one != two


def test_held_out_documents_are_a_share_of_the_whole(tokenizer, tmp_path):
    prefix = small_data(tmp_path / "email", tokenizer, valid_fraction=0.2)
    train, valid = stored(prefix), stored(str(tmp_path / "email_valid_text_document"))
    whole = expected(tokenizer, EMAIL_PACKAGE)
    files = python_files(EMAIL_PACKAGE)
    marks = [is_held_out(i, 0.2, seed=1) for i in range(len(files))]
    assert valid == [document for document, mark in zip(whole, marks, strict=True) if mark]
    assert train == [document for document, mark in zip(whole, marks, strict=True) if not mark]


def test_held_out_draw_follows_fraction_and_seed():
    draws = [is_held_out(i, 0.1, seed=3) for i in range(10_000)]
    # 1000 expected with a standard deviation of 30: five of them
    assert 850 < sum(draws) < 1150
    assert draws == [is_held_out(i, 0.1, seed=3) for i in range(10_000)]
    assert draws != [is_held_out(i, 0.1, seed=4) for i in range(10_000)]
    assert not any(is_held_out(i, 0.0, seed=3) for i in range(100))


def test_json_lines_with_two_keys(tokenizer, tmp_path):
    records = [{"text": f"line {i}\n", "title": f"t{i}", "other": i} for i in range(2000)]
    records[7]["text"] = ""
    write_jsonl(tmp_path / "a.jsonl", records[:1200])
    write_jsonl(tmp_path / "b.jsonl", records[1200:])
    with open(tmp_path / "b.jsonl", "a") as stream:
        stream.write("\n  \n")
    config = config_for(tmp_path, tmp_path, json_keys=["text", "title"])
    prefixes = preprocess(config, tokenizer, seed=0, report=silent)
    assert [os.path.basename(prefix) for prefix in prefixes] == ["data_text_document", "data_title_document"]
    texts = [[*tokenizer.tokenize(r["text"]), tokenizer.eod] if r["text"] else [] for r in records]
    assert stored(prefixes[0]) == texts and texts[7] == []
    assert stored(prefixes[1]) == [[*tokenizer.tokenize(r["title"]), tokenizer.eod] for r in records]


def test_without_end_of_document(tokenizer, tmp_path):
    prefix = small_data(tmp_path / "data", tokenizer, package=JSON_PACKAGE, append_eod=False)
    assert stored(prefix) == [document[:-1] for document in expected(tokenizer, JSON_PACKAGE)]


def test_broken_unicode_is_replaced(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\r\n")
    (tmp_path / "b.jsonl").write_text('{"text": "half \\ud83d pair"}\n')
    prefix = preprocess(config_for(tmp_path, tmp_path), tokenizer, seed=0, report=silent)[0]
    texts = [tokenizer.detokenize(document[:-1]) for document in stored(prefix)]
    assert texts == ["caf\ufffd\r\n", "half \ufffd pair"]


def test_globs_and_doubles(tokenizer, tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(f"in {name}")
    config = config_for(tmp_path, tmp_path)
    config.input = [str(tmp_path / "?.txt"), str(tmp_path / "b.txt"), str(tmp_path / "c.md")]
    documents = stored(preprocess(config, tokenizer, seed=0, report=silent)[0])
    texts = [tokenizer.detokenize(document[:-1]) for document in documents]
    assert texts == ["in a.txt", "in b.txt", "in c.md"]


def test_progress_ends_with_every_byte_that_was_read(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("minitron_mcore.data.preprocess.TASK_BYTES", 1 << 14)
    lines: list[str] = []
    bars: list[Bar] = []

    @contextlib.contextmanager
    def watched(total, unit, title):
        bars.append(Bar(total, 0))
        yield bars[-1]

    config = config_for(tmp_path, EMAIL_PACKAGE, extensions=[".py"])
    preprocess(config, tokenizer, seed=0, report=lines.append, progress=watched)
    size = sum(path.stat().st_size for path in map(Path, python_files(EMAIL_PACKAGE)))
    assert [(bar.total, bar.done) for bar in bars] == [(size, size)]
    assert f"done, {len(python_files(EMAIL_PACKAGE))} documents" in lines[-1] and "MB/s" in lines[-1]


def test_existing_output_stays(tokenizer, tmp_path):
    prefix = Path(small_data(tmp_path / "data", tokenizer, package=JSON_PACKAGE))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"output_prefix=.* would overwrite .*\.idx: .*preprocess\.overwrite=true"):
        small_data(tmp_path / "data", tokenizer)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    small_data(tmp_path / "data", tokenizer, overwrite=True)
    assert stored(str(prefix)) == expected(tokenizer, EMAIL_PACKAGE)


def test_a_failed_overwrite_keeps_the_old_data(tokenizer, tmp_path):
    prefix = small_data(tmp_path / "data", tokenizer, package=JSON_PACKAGE)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(InputError):
        small_data(tmp_path / "data", tokenizer, package=str(tmp_path / "bad.jsonl"), overwrite=True)
    assert stored(prefix) == expected(tokenizer, JSON_PACKAGE)


def test_a_run_cut_off_while_writing_leaves_no_index(tokenizer, tmp_path, monkeypatch):
    calls = []

    def replace_once(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr("minitron_mcore.data.preprocess.os.replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        small_data(tmp_path / "data", tokenizer, package=JSON_PACKAGE)
    assert calls[-1].endswith(".idx") and not IndexedDataset.exists(str(tmp_path / "data_text_document"))
    monkeypatch.undo()
    assert stored(small_data(tmp_path / "data", tokenizer, package=JSON_PACKAGE)) == expected(tokenizer, JSON_PACKAGE)


@pytest.mark.parametrize(
    ("content", "settings", "key", "rule", "remedy"),
    [
        ('{"text": "a"}\n\n{"text": \n', {}, "", "is not JSON", "mend it"),
        ('{"text": "a"}\n["text"]\n', {}, "", "holds a list", "an object"),
        ('{"text": "a"}\n{"body": "b"}\n', {}, "", "has no key 'text', only ['body']", "preprocess.json_keys"),
        ('{"text": 5}\n', {}, "", "has a 'text' of type int", "leave the line out"),
        ("", {}, "preprocess.input", "holds no text", "name other files"),
        ('{"text": ""}\n', {}, "preprocess.input", "holds no text", ""),
        ('{"text": "a"}\n', {"valid_fraction": 0.001}, "preprocess.valid_fraction", "leaves no document", "more"),
        ('{"text": "a"}\n', {"valid_fraction": 1.0}, "valid_fraction", "must be at least 0 and below 1", ""),
        ('{"text": "a"}\n', {"workers": 0}, "workers", "must be at least 1", ""),
        ('{"text": "a"}\n', {"json_keys": []}, "json_keys", "is empty", "name at least one"),
        ('{"text": "a"}\n', {"output_prefix": "/proc/nowhere/x"}, "preprocess.output_prefix", "cannot be written", ""),
        ('{"text": "a"}\n', {"extensions": [".py"]}, "preprocess.input", "no file ending in .py", "extensions"),
        ('{"text": "a"}\n', {"input": "/nowhere/x.txt"}, "preprocess.input", "does not exist", ""),
    ],
)
def test_refuses(tokenizer, tmp_path, content, settings, key, rule, remedy):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError) as caught:
        preprocess(config_for(tmp_path, tmp_path, **settings), tokenizer, seed=0, report=silent)
    error = caught.value
    assert error.key == key and rule in error.rule and remedy in error.remedy and "\n" not in str(error)
    assert key or error.value == f"{tmp_path}/a.jsonl, line {content.count(chr(10))},"
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out"), "nothing is left behind"


def test_a_workers_refusal_reaches_the_user(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 3000 + [{"body": ""}])
    with pytest.raises(InputError, match=r"a\.jsonl, line 3001, has no key 'text'"):
        preprocess(config_for(tmp_path, tmp_path, workers=2), tokenizer, seed=0, report=silent)
    assert not (tmp_path / "out").exists()


def test_keys_need_json(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"title": "t"}])
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(InputError, match=r"cannot be read from plain text such as .*b\.txt"):
        preprocess(config_for(tmp_path, tmp_path, json_keys=["title"]), tokenizer, seed=0, report=silent)


def test_workers_end_with_a_process_that_was_killed(tmp_path):
    """Else they would wait for it, and hold its memory, until the machine is restarted."""
    code = "import os; from minitron_mcore.data.preprocess import _pool; pool = _pool(1); "
    code += "print(pool.submit(os.getpid).result(), flush=True); os._exit(9)"
    with (tmp_path / "out").open("w") as out:
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=out, timeout=60).returncode == 9
    worker = int((tmp_path / "out").read_text())
    deadline = time.monotonic() + 30
    while is_alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_worker_reads_the_tokenizer_as_the_type_asked_for(tmp_path):
    """A bare tokenizer.model is a SentencePiece model, unless tokenizer.type says that transformers is to read it."""
    model = tmp_path / "llama" / "tokenizer.model"
    model.parent.mkdir()
    small_tokenizer(model)
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(TokenizerConfig(type=HUGGING_FACE, model=str(tmp_path / "llama")))
    assert (tokenizer.type, load_tokenizer(str(tmp_path / "llama")).type) == (HUGGING_FACE, SENTENCEPIECE)
    prefix = small_data(tmp_path / "data", tokenizer, package=JSON_PACKAGE)
    assert json.loads(Path(prefix + ".json").read_text())["tokenizer"]["type"] == HUGGING_FACE
