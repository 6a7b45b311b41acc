"""Text, JSON lines and Parquet to Megatron's indexed token files.

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
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy

from minitron_mcore.data.config import PreprocessConfig, TokenizerConfig
from minitron_mcore.data.corpus import Texts, make_parent, prefixes_of
from minitron_mcore.data.records import Record, Replacements, read_records, texts_of
from minitron_mcore.data.text_file import TEXT, TextFile
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.files import writing
from minitron_mcore.runtime.interrupt import held_back
from minitron_mcore.runtime.pace import Pace
from minitron_mcore.runtime.progress import Progress, progress

T = TypeVar("T")
R = TypeVar("R")

TASK_BYTES = 1 << 18  # text handed to a worker at a time
WAITING_TOKENS = 1 << 26  # of documents that are kept in memory until both sides have one
RECORD_BYTES = 64  # what a document weighs beside its text


@dataclass
class Task:
    """Documents, each with its file's path and form, and the bytes that they take of the files on the disk."""

    documents: list[tuple[str, str, Record]] = field(default_factory=list)
    read: int = 0


@dataclass
class Encoded:
    """One task's documents. A key's `tokens` are its documents end to end; a length of 0 is an empty document."""

    bytes: int = 0  # of the files on the disk
    tokens: dict[str, numpy.ndarray] = field(default_factory=dict)  # [sum of lengths], the output's integer type
    lengths: dict[str, numpy.ndarray] = field(default_factory=dict)  # [documents], int64
    replacements: Replacements = field(default_factory=Replacements)

    def sizes(self) -> list[int]:
        """Tokens of each document, under all keys."""
        return numpy.sum(list(self.lengths.values()), axis=0).tolist()


def preprocess(
    config: PreprocessConfig,
    texts: Texts,
    tokenizer: Tokenizer,
    *,
    seed: int,
    report: Callable[[str], None] = print,
    progress: Progress = progress,
) -> list[str]:
    """Encode every document of `texts`; returns the prefixes written, held-out ones last.

    One process calls it. `seed` decides which documents are held out. Raises InputError, with nothing left behind, for
    text that is empty or malformed.
    """
    keys, files, (names, held_out_names) = config.json_keys, texts.files, prefixes_of(config)
    made = make_parent(names[0], "preprocess.output_prefix")

    work = functools.partial(
        encode, kind=tokenizer.type, path=tokenizer.path, keys=tuple(keys), append_eod=config.append_eod
    )
    writers: list[TokenWriter] = []
    pace, documents_done = Pace(), 0
    replacements = Replacements()
    cut: dict[str, int] = {}
    tasks = _tasks(files, keys, config.document_bytes, cut)
    try:
        with writing(f"preprocess.output_prefix={config.output_prefix}"):
            writers += [TokenWriter(name, tokenizer, config.append_eod) for name in names + held_out_names]
        with progress(sum(file.size for file in files), "B", "preprocess") as bar:
            parts = in_order(tasks, work, config.workers or len(os.sched_getaffinity(0)))
            for encoded, held_out in assign(parts, fraction=config.valid_fraction, seed=seed, report=report):
                for k, key in enumerate(keys):
                    sides = writers[k :: len(keys)]
                    documents = numpy.split(encoded.tokens[key], numpy.cumsum(encoded.lengths[key])[:-1])
                    for document, is_held_out in zip(documents, held_out, strict=True):
                        sides[is_held_out].add(document)
                replacements.add(encoded.replacements)
                documents_done += len(held_out)
                bar.advance(encoded.bytes)
        for writer in writers:
            writer.finish()
        _refuse_empty(writers, config, texts.key)
    except BaseException:
        for writer in writers:
            writer.discard()
        with contextlib.suppress(OSError):  # not empty: another process writes there
            for folder in made:
                os.rmdir(folder)
        raise
    for writer in writers:
        writer.publish()
    if cut:
        report(
            f"preprocess: long text files, cut at blank lines: {len(cut):,}, into {sum(cut.values()):,} documents "
            "(preprocess.document_bytes=0 leaves each whole)"
        )
    if warning := str(replacements):
        report(warning)
    report(
        f"preprocess: done, {documents_done:,} documents, {bar.done / 1e6:,.1f} MB, "
        f"{sum(writer.tokens for writer in writers):,} tokens in {pace.seconds:.1f} s "
        f"({pace.rate(bar.done) / 1e6:.2f} MB/s)"
    )
    return [writer.prefix for writer in writers]


def _tasks(
    files: Iterable[TextFile], keys: Sequence[str], document_bytes: int | None, cut: dict[str, int]
) -> Iterator[Task]:
    """The work, in order, in parts of about TASK_BYTES. `cut` is told how many documents a text file was cut into."""
    task, size = Task(), 0
    for file in files:
        read = 0
        for count, record in enumerate(read_records(file, keys, document_bytes), start=1):
            if count > 1 and file.form == TEXT:
                cut[file.path] = count
            task.documents.append((file.path, file.form, record))
            task.read, read = task.read + record.read - read, record.read
            size += record.size + RECORD_BYTES
            if size >= TASK_BYTES:
                yield task
                task, size = Task(), 0
    if task.documents:
        yield task


def in_order(tasks: Iterator[T], work: Callable[[T], R], workers: int) -> Iterator[R]:
    """What `work` makes of each task, in the tasks' order, a few tasks ahead of the writer."""
    if workers == 1:
        yield from map(work, tasks)
        return
    with _pool(workers) as pool:
        pending: deque = deque()
        try:
            for task in tasks:
                with held_back():  # the first tasks start the workers
                    pending.append(pool.submit(work, task))
                # bounded, so that a corpus larger than memory streams through
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: a fork of a process that holds process groups or CUDA may hang
    context = multiprocessing.get_context("spawn")
    with held_back():  # what keeps the pool's locks is a process too
        return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """In a worker: a parent that is killed does not end its pool, and the worker would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _worker_tokenizer(kind: str, path: str) -> Tokenizer:
    return load_tokenizer(TokenizerConfig(type=kind, model=path))


def encode(task: Task, kind: str, path: str, keys: tuple[str, ...], append_eod: bool) -> Encoded:
    """Token ids of one task's documents, by the tokenizer of `kind` at `path`; runs in a worker process. Raises
    InputError with file and line."""
    tokenizer = _worker_tokenizer(kind, path)
    dtype = token_dtype(tokenizer.vocab_size)
    encoded = Encoded(bytes=task.read)
    # For each document its text under each key.
    rows = [texts_of(record, form, file, keys, encoded.replacements) for file, form, record in task.documents]
    for column, key in enumerate(keys):
        pieces = []
        for row in rows:
            ids = tokenizer.tokenize(row[column])
            if ids and append_eod:
                ids.append(tokenizer.eod)
            pieces.append(numpy.array(ids, dtype=dtype))
        encoded.tokens[key] = numpy.concatenate(pieces)
        encoded.lengths[key] = numpy.array([len(piece) for piece in pieces], dtype=numpy.int64)
    return encoded


def draw(document: int, seed: int) -> int:
    """A number below 2**64 for a document by its own number and the seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{document}".encode()).digest()[:8], "little")


def is_held_out(document: int, fraction: float, seed: int) -> bool:
    """Whether a document goes to the held-out files: `fraction` of all draws do."""
    return bool(fraction) and draw(document, seed) < fraction * 2.0**64


def assign(
    parts: Iterable[Encoded], *, fraction: float, seed: int, report: Callable[[str], None]
) -> Iterator[tuple[Encoded, list[bool]]]:
    """Each of `parts` with, for each of its documents, whether it is held out.

    With few documents the draw may leave one side without any. That side then gets the document whose draw came
    nearest, and `report` a line about it. Empty documents do not count.
    """
    waiting: list[tuple[Encoded, list[bool]]] = []
    tokens = number = 0
    sides: set[bool] = set()
    settled = not fraction
    for part in parts:
        lengths = part.sizes()
        marks = [is_held_out(number + i, fraction, seed) for i in range(len(lengths))]
        number += len(lengths)
        if settled:
            yield part, marks
            continue
        waiting.append((part, marks))
        tokens += sum(lengths)
        sides |= {mark for mark, length in zip(marks, lengths, strict=True) if length}
        settled = len(sides) == 2 or tokens > WAITING_TOKENS
        if settled:
            yield from waiting
            waiting = []
    if waiting and len(sides) == 1:
        _move_one(waiting, sides.pop(), seed, report)
    yield from waiting


def _move_one(waiting: list[tuple[Encoded, list[bool]]], side: bool, seed: int, report: Callable[[str], None]) -> None:
    """Where all documents are on one `side`, put the one whose draw is nearest to the other side there."""
    places = [(marks, i, length) for part, marks in waiting for i, length in enumerate(part.sizes())]
    draws = [(draw(number, seed), number) for number, (_, _, length) in enumerate(places) if length]
    if len(draws) > 1:
        marks, i, _ = places[(max if side else min)(draws)[1]]
        marks[i] = not side
        report(
            f"preprocess: the draw holds out {'all' if side else 'none'} of the {len(draws)} documents, because they "
            f"are few; one of them {'is kept for training' if side else 'is held out'} all the same"
        )


def _refuse_empty(writers: list[TokenWriter], config: PreprocessConfig, key: str) -> None:
    empty = next((writer.prefix for writer in writers if not writer.tokens), None)
    if not any(writer.tokens for writer in writers):
        raise InputError(key, config.input, "holds no text", "name other files")
    if empty and config.valid_fraction:
        remedy = "give more documents, another fraction, or preprocess.document_bytes, which cuts files up"
        raise InputError("preprocess.valid_fraction", config.valid_fraction, f"leaves no document for {empty}", remedy)
    if empty:
        rule = f"names a key without any text, so that {empty} would be empty"
        raise InputError("preprocess.json_keys", config.json_keys, rule, "leave that key out")


def token_dtype(vocab_size: int) -> Any:
    """The integer type of the .bin file: Megatron's own rule (`DType.optimal_dtype`), without importing it."""
    return numpy.uint16 if vocab_size < 65500 else numpy.int32


class TokenWriter:
    """One .bin/.idx pair under temporary names until `publish`."""

    def __init__(self, prefix: str, tokenizer: Tokenizer, append_eod: bool) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix, self.tokenizer, self.append_eod = prefix, tokenizer, append_eod
        self.documents = self.tokens = 0
        self.dtype = token_dtype(tokenizer.vocab_size)
        assert self.dtype is DType.optimal_dtype(tokenizer.vocab_size), "Megatron's rule has changed"
        self.builder = IndexedDatasetBuilder(prefix + ".bin.tmp", dtype=self.dtype)

    def add(self, tokens: numpy.ndarray) -> None:
        """A document. One without tokens is a boundary in the index and no sequence, as of Megatron-LM's own tool."""
        self.builder.add_document(tokens, [len(tokens)] if len(tokens) else [])
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
        Path(self.prefix + ".json.tmp").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def publish(self) -> None:
        if os.path.exists(self.prefix + ".idx"):  # an overwrite: the old index must not meet the new tokens
            os.remove(self.prefix + ".idx")
        for ending in (".json", ".bin", ".idx"):
            os.replace(self.prefix + ending + ".tmp", self.prefix + ending)

    def discard(self) -> None:
        """As far as the disk lets itself be written: what is raised is why this is called."""
        with contextlib.suppress(OSError):
            self.builder.data_file.close()
        for ending in (".json.tmp", ".bin.tmp", ".idx.tmp"):
            with contextlib.suppress(OSError):
                os.remove(self.prefix + ending)
