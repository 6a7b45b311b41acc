"""Text and JSON lines to Megatron's indexed token files.

For each key of `json_keys` (plain text counts as key `text`), under Megatron's names:

    <output_prefix>_<key>_document.bin   token ids, uint16 or int32, document after document
    <output_prefix>_<key>_document.idx   their lengths and offsets
    <output_prefix>_<key>_document.json  which tokenizer made them, how many documents and tokens

and the same under <output_prefix>_valid_... for held-out documents. What is written does not depend on the number of
workers. The .idx comes last, so a run that was cut off leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Union

import numpy

from minitron_mcore.data.config import PreprocessConfig
from minitron_mcore.data.corpus import find_files, is_jsonl, json_texts, make_parent, read_lines, read_text
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError

TASK_BYTES = 1 << 18  # text handed to a worker at a time


@dataclass(frozen=True)
class TextTask:
    paths: list[str]


@dataclass(frozen=True)
class JsonTask:
    path: str
    lines: list[tuple[int, bytes]]  # (line number, line)


Task = Union[TextTask, JsonTask]


@dataclass(frozen=True)
class Encoding:
    """What a worker needs to know; small, as it travels with each task."""

    tokenizer_type: str
    tokenizer_path: str
    keys: tuple[str, ...]
    append_eod: bool


@dataclass
class Encoded:
    """One task's documents. A key's `tokens` are its documents end to end; a length of 0 is an empty document."""

    bytes: int = 0
    tokens: dict[str, numpy.ndarray] = field(default_factory=dict)  # [sum of lengths], the output's integer type
    lengths: dict[str, numpy.ndarray] = field(default_factory=dict)  # [documents], int64


def preprocess(
    config: PreprocessConfig, tokenizer: Tokenizer, *, seed: int, report: Callable[[str], None] = print
) -> list[str]:
    """Encode every document of `config.input`; returns the prefixes written, held-out ones last.

    One process calls it. `seed` decides which documents are held out. Raises InputError, with nothing left behind, for
    input that is missing, empty or malformed, and for output that exists (unless `config.overwrite`).
    """
    files = find_files(config.input, config.extensions, "preprocess.input", config.exclude)
    keys = _check(config, files)
    names = [f"{config.output_prefix}_{key}_document" for key in keys]
    held_out_names = [f"{config.output_prefix}_valid_{key}_document" for key in keys] if config.valid_fraction else []
    for name in names + held_out_names:
        if os.path.exists(name + ".idx") and not config.overwrite:
            raise InputError(f"{name}.idx exists; give another output_prefix, or set preprocess.overwrite=true")
    made = make_parent(names[0], "preprocess.output_prefix")

    encoding = Encoding(tokenizer.type, tokenizer.path, tuple(keys), config.append_eod)
    writers = [_Writer(name, tokenizer, config.append_eod) for name in names + held_out_names]
    progress = _Progress(sum(map(os.path.getsize, files)), config.log_interval, report)
    try:
        count = 0
        for encoded in _encode_all(_tasks(files), encoding, config.workers or len(os.sched_getaffinity(0))):
            documents = len(encoded.lengths[keys[0]])
            held_out = [is_held_out(count + i, config.valid_fraction, seed) for i in range(documents)]
            for k, key in enumerate(keys):
                _write(encoded.tokens[key], encoded.lengths[key], held_out, writers[k :: len(keys)])
            count += documents
            progress.add(documents, encoded.bytes)
        for writer in writers:
            writer.finish()
        _refuse_empty(writers, config)
    except BaseException:
        for writer in writers:
            writer.discard()
        with contextlib.suppress(OSError):  # not empty: another process writes there
            for folder in made:
                os.rmdir(folder)
        raise
    for writer in writers:
        writer.publish()
    progress.end(sum(writer.tokens for writer in writers))
    return [writer.prefix for writer in writers]


def is_held_out(document: int, fraction: float, seed: int) -> bool:
    """Whether a document goes to the held-out files: a draw by its number and the seed, the same on every machine."""
    if not fraction:
        return False
    digest = hashlib.sha256(f"{seed}:{document}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2.0**64


def _check(config: PreprocessConfig, files: list[str]) -> list[str]:
    """The keys to write. Raises InputError for settings that cannot be."""
    if not config.output_prefix:
        raise InputError("preprocess.output_prefix is not set; it is the path that the written files' names begin with")
    if not 0.0 <= config.valid_fraction < 1.0:
        raise InputError(f"preprocess.valid_fraction={config.valid_fraction} must be at least 0 and below 1")
    if config.workers is not None and config.workers < 1:
        raise InputError(f"preprocess.workers={config.workers} must be 1 or more, or null for every core")
    if not config.json_keys or len(set(config.json_keys)) < len(config.json_keys):
        raise InputError(f"preprocess.json_keys={config.json_keys} must be one or more different keys")
    plain = [path for path in files if not is_jsonl(path)]
    if plain and list(config.json_keys) != ["text"]:
        raise InputError(
            f"preprocess.json_keys={config.json_keys} cannot be read from plain text such as {plain[0]}, whose key is "
            "text; preprocess text and JSON lines apart"
        )
    return list(config.json_keys)


def _tasks(files: Iterable[str]) -> Iterator[Task]:
    """The work, in order, in parts of about TASK_BYTES."""
    paths: list[str] = []
    size = 0
    for path in files:
        if is_jsonl(path):
            if paths:
                yield TextTask(paths)
                paths, size = [], 0
            yield from _json_tasks(path)
            continue
        paths.append(path)
        size += os.path.getsize(path)
        if size >= TASK_BYTES:
            yield TextTask(paths)
            paths, size = [], 0
    if paths:
        yield TextTask(paths)


def _json_tasks(path: str) -> Iterator[JsonTask]:
    lines: list[tuple[int, bytes]] = []
    size = 0
    for number, line in read_lines(path):
        lines.append((number, line))
        size += len(line)
        if size >= TASK_BYTES:
            yield JsonTask(path, lines)
            lines, size = [], 0
    if lines:
        yield JsonTask(path, lines)


def _encode_all(tasks: Iterator[Task], encoding: Encoding, workers: int) -> Iterator[Encoded]:
    """`encode` of each task, in the tasks' order, a few tasks ahead of the writer."""
    if workers == 1:
        yield from (encode(task, encoding) for task in tasks)
        return
    # spawn: a fork of a process that holds process groups or CUDA may hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending: deque = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(encode, task, encoding))
                # bounded, so that a corpus larger than memory streams through
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@functools.lru_cache(maxsize=1)
def _worker_tokenizer(kind: str, path: str) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    assert tokenizer.type == kind, f"{path} was read as {tokenizer.type}, not {kind}"
    return tokenizer


def encode(task: Task, encoding: Encoding) -> Encoded:
    """Token ids of one task's documents; runs in a worker process. Raises InputError with file and line."""
    tokenizer = _worker_tokenizer(encoding.tokenizer_type, encoding.tokenizer_path)
    dtype = token_dtype(tokenizer.vocab_size)
    encoded = Encoded()
    rows: list[list[str]] = []  # for each document its text under each key
    if isinstance(task, TextTask):
        for path in task.paths:
            rows.append([read_text(path)])
            encoded.bytes += os.path.getsize(path)
    else:
        for number, line in task.lines:
            rows.append(json_texts(line, encoding.keys, task.path, number))
            encoded.bytes += len(line)
    for column, key in enumerate(encoding.keys):
        pieces = []
        for row in rows:
            ids = tokenizer.tokenize(row[column])
            if ids and encoding.append_eod:
                ids.append(tokenizer.eod)
            pieces.append(numpy.array(ids, dtype=dtype))
        encoded.tokens[key] = numpy.concatenate(pieces)
        encoded.lengths[key] = numpy.array([len(piece) for piece in pieces], dtype=numpy.int64)
    return encoded


def token_dtype(vocab_size: int) -> Any:
    """The integer type of the .bin file: Megatron's own rule (`DType.optimal_dtype`), without importing it."""
    return numpy.uint16 if vocab_size < 65500 else numpy.int32


def _write(tokens: numpy.ndarray, lengths: numpy.ndarray, held_out: list[bool], writers: list[_Writer]) -> None:
    start = 0
    for length, out in zip(lengths.tolist(), held_out, strict=True):
        if length:
            writers[out].add(tokens[start : start + length])
        start += length


class _Writer:
    """One .bin/.idx pair under temporary names until `publish`."""

    def __init__(self, prefix: str, tokenizer: Tokenizer, append_eod: bool) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix, self.tokenizer, self.append_eod = prefix, tokenizer, append_eod
        self.documents = self.tokens = 0
        dtype = DType.optimal_dtype(tokenizer.vocab_size)
        assert dtype is token_dtype(tokenizer.vocab_size), "Megatron's rule for the token type has changed"
        self.dtype = dtype
        self.builder = IndexedDatasetBuilder(prefix + ".bin.tmp", dtype=dtype)

    def add(self, tokens: numpy.ndarray) -> None:
        self.builder.add_document(tokens, [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)

    def finish(self) -> None:
        self.builder.finalize(self.prefix + ".idx.tmp")
        description = {
            "tokenizer": {
                "type": self.tokenizer.type,
                "model": self.tokenizer.path,
                "fingerprint": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
            },
            "append_eod": self.append_eod,
            "dtype": numpy.dtype(self.dtype).name,
            "documents": self.documents,
            "tokens": self.tokens,
        }
        with open(self.prefix + ".json.tmp", "w", encoding="utf-8") as stream:
            json.dump(description, stream, indent=2)
            stream.write("\n")

    def publish(self) -> None:
        if os.path.exists(self.prefix + ".idx"):  # an overwrite: the old index must not meet the new tokens
            os.remove(self.prefix + ".idx")
        for ending in (".json", ".bin", ".idx"):
            os.replace(self.prefix + ending + ".tmp", self.prefix + ending)

    def discard(self) -> None:
        self.builder.data_file.close()
        for ending in (".json.tmp", ".bin.tmp", ".idx.tmp"):
            if os.path.exists(self.prefix + ending):
                os.remove(self.prefix + ending)


def _refuse_empty(writers: list[_Writer], config: PreprocessConfig) -> None:
    if not any(writer.documents for writer in writers):
        raise InputError(f"preprocess.input={config.input!r} holds no text")
    for writer in writers:
        if not writer.documents and config.valid_fraction:
            raise InputError(
                f"preprocess.valid_fraction={config.valid_fraction} leaves no document for {writer.prefix}; "
                "give more documents or another fraction"
            )
        if not writer.documents:
            raise InputError(f"{writer.prefix} would be empty: preprocess.json_keys={config.json_keys} names no text")


class _Progress:
    """Lines with documents, megabytes, rate and time left."""

    def __init__(self, total_bytes: int, log_interval: int, report: Callable[[str], None]) -> None:
        self.total, self.interval, self.report = total_bytes, max(1, log_interval), report
        self.documents = self.bytes = self.reported = 0
        self.started = time.perf_counter()

    def add(self, documents: int, size: int) -> None:
        self.documents += documents
        self.bytes += size
        if self.documents - self.reported >= self.interval:
            self.reported = self.documents
            rate = self.bytes / max(time.perf_counter() - self.started, 1e-9)
            left = max(self.total - self.bytes, 0) / max(rate, 1e-9)
            self.report(
                f"preprocess: {self.documents:,} documents | {self.bytes / 1e6:,.1f} of {self.total / 1e6:,.1f} MB | "
                f"{rate / 1e6:.2f} MB/s | {int(left) // 60}:{int(left) % 60:02d} left"
            )

    def end(self, tokens: int) -> None:
        seconds = time.perf_counter() - self.started
        self.report(
            f"preprocess: done, {self.documents:,} documents, {self.bytes / 1e6:,.1f} MB, {tokens:,} tokens in "
            f"{seconds:.1f} s ({self.bytes / 1e6 / max(seconds, 1e-9):.2f} MB/s)"
        )
