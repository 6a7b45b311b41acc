"""Files of chats or preferences -> a folder of prepared samples (prepared.py says what lies in it).

The folder is named by a digest of all that decides what is in it, so that the next run finds it; it is written aside
and renamed when it is whole. Of several processes that want the same one, one writes and the others wait for it; where
the file system has no locks, all write, and the first to be done is right for all.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import numpy

from minitron_mcore.data.chat.described import Preparation, digest_of
from minitron_mcore.data.chat.encode import Encoded, How, Task, Unit, encode
from minitron_mcore.data.chat.prepared import COUNTED, FACTS, REWARDS, STARTS, TOKENS, Prepared, load_prepared
from minitron_mcore.data.corpus import Texts
from minitron_mcore.data.preprocess import RECORD_BYTES, TASK_BYTES, in_order, is_held_out
from minitron_mcore.data.records import Replacements, read_objects
from minitron_mcore.errors import InputError
from minitron_mcore.files import writing
from minitron_mcore.runtime.folder_lock import FolderLock
from minitron_mcore.runtime.progress import Progress, progress
from minitron_mcore.tables import counted

ROW_BYTES = 1 << 10  # what a Parquet row is taken to weigh
MUCH_BYTES = 1 << 23  # on the disk, of which several processes are sooner done in spite of starting
NAME_LENGTH = 16  # of the digest
POLL_SECONDS = 0.2
COUNTS = ("read", "kept", "cut", "too_long", "skipped", "tokens", "learnt")  # of records, and of tokens


def prepare(
    what: Preparation, folder: Path, *, report: Callable[[str], None] = print, progress: Progress = progress
) -> Prepared:
    """The prepared samples of `what`, in a folder within `folder`; what is there already, or is just being made by
    another process, is not made again.

    One process of a job calls. Raises InputError, with nothing left behind, for a record that breaks a rule (unless
    they are skipped), a file that is damaged, and where no record is left.
    """
    sources, settings = what.sources(), what.settings()
    digest = digest_of(settings, sources)
    place = folder / digest[:NAME_LENGTH]
    if (place / FACTS).is_file():
        return load_prepared(place)
    with writing(f"chat.cache_path={folder}"), _alone(place, report) as is_sure:
        if not (place / FACTS).is_file():  # else it was made while this process waited
            for left in (place, *(folder.glob(f"{place.name}*.partial") if is_sure else ())):
                shutil.rmtree(left, ignore_errors=True)  # of killed processes
            aside = Path(f"{place}.{uuid.uuid4().hex[:8]}.partial")
            try:
                facts = {"kind": what.kind, "digest": digest, "settings": settings, "sources": sources}
                facts["parts"] = _write(what, aside, report, progress)
                _publish(aside, place, facts | _described(what))
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return load_prepared(place)


def _described(what: Preparation) -> dict[str, Any]:
    """What facts.json says beside what decides the digest."""
    return {
        "padding": what.tokenizer.eos,
        "tokenizer": {"path": what.tokenizer.path, "fingerprint": what.tokenizer.fingerprint},
        "template": what.template and {"name": what.template.name, "digest": what.template.digest},
    }


@contextmanager
def _alone(place: Path, report: Callable[[str], None]) -> Iterator[bool]:
    """Within the `with` no other process makes `place`; whether that is sure, which without file locks it is not."""
    lock = FolderLock(place.with_name(f".{place.name}.lock"), InputError("", place, "is being made"))
    is_told = False
    while True:
        try:
            lock.take()
            break
        except InputError:
            if not is_told:
                report(f"chat: waiting for another command, which prepares {place}")
            is_told = True
            time.sleep(POLL_SECONDS)
    try:
        yield lock.is_sure
    finally:
        lock.release()


def _publish(aside: Path, place: Path, facts: dict[str, Any]) -> None:
    """Write the facts, which make the folder whole, and give it its name; unless another process was first with it."""
    (aside / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        os.replace(aside, place)
    except OSError:
        if not (place / FACTS).is_file():
            raise


def _write(what: Preparation, folder: Path, report: Callable[[str], None], progress: Progress) -> dict[str, Any]:
    """Write the parts; returns their counts."""
    names = ("train", *(["valid"] if what.valid is not None or what.config.valid_fraction else []))
    marks = what.tokenizer.added | {what.tokenizer.eos}
    writers = {name: PartWriter(folder / name, pairs=what.pairs, marks=marks) for name in names}
    texts = [each for each in (what.train, what.valid) if each is not None]
    files = [file for each in texts for file in each.files]
    for note in (note for each in texts for note in each.notes):
        report(f"WARNING: {note}")
    size = sum(file.size for file in files)
    few = len(os.sched_getaffinity(0)) if size > MUCH_BYTES else 1
    work = functools.partial(encode, how=_how(what))
    replacements = Replacements()
    with progress(size, "B", f"prepare {what.kind}") as bar:
        for name, number, unit, encoded in _units(what, work, what.config.workers or few):
            is_valid = is_held_out(number, what.config.valid_fraction, what.seed)
            writers["valid" if is_valid else name].add(unit)
            if encoded is not None:
                replacements.add(encoded.replacements)
                bar.advance(encoded.read)
    if warning := str(replacements):
        report(warning)
    for name, writer in writers.items():
        writer.finish()
        _refuse_empty(what, name, writer)
        report(f"chat: {name}: {writer.in_words(what)}")
    return {name: writer.counts for name, writer in writers.items()}


def _units(
    what: Preparation, work: Callable[[Task], Encoded], workers: int
) -> Iterator[tuple[str, int, Unit, Optional[Encoded]]]:
    """(part, number, unit, with the last of a task's units what was made of the task), in the files' order."""
    for name, texts in (("train", what.train), ("valid", what.valid)):
        number = 0
        done: Iterable[Encoded] = () if texts is None else in_order(_tasks(texts), work, workers)
        for encoded in done:
            for place, unit in enumerate(encoded.units, start=1):
                yield name, number, unit, encoded if place == len(encoded.units) else None
                number += 1


def _tasks(texts: Texts) -> Iterator[Task]:
    """The records, in order, in parts of about TASK_BYTES."""
    task, size = Task(), 0
    for file in texts.files:
        before = 0
        for number, content, read in read_objects(file):
            task.records.append((texts.key, file, number, content))
            task.read, before = task.read + read - before, read
            size += RECORD_BYTES + (ROW_BYTES if isinstance(content, dict) else len(content))
            if size >= TASK_BYTES:
                yield task
                task, size = Task(), 0
    if task.records:
        yield task


def _how(what: Preparation) -> How:
    config = what.config
    return How(
        tokenizer_type=what.tokenizer.type,
        tokenizer=what.tokenizer.path,
        rows=what.tokenizer.rows,
        template=what.template,
        sequence_length=what.sequence_length,
        pairs=what.pairs,
        needs_rewards=what.needs_rewards,
        turns=config.texts == "turns",
        last=config.counted == "last",
        cut=config.too_long == "cut",
        skip=config.bad_records == "skip",
        packing=config.packing,
    )


def _refuse_empty(what: Preparation, name: str, writer: PartWriter) -> None:
    if writer.counts["kept"]:
        return
    if name == "valid" and what.valid is None:
        rule = "holds out no record that can be used"
        raise InputError("chat.valid_fraction", what.config.valid_fraction, rule, "raise it, or name chat.valid")
    sources = what.config.train if name == "train" else what.config.valid
    remedy = "" if not writer.counts["too_long"] else "raise data.sequence_length, or name other files"
    raise InputError(f"chat.{name}", sources, f"has no record that can be used: {writer.in_words(what)}", remedy)


class PartWriter:
    """The arrays of one part, and their counts. marks: tokens that no ordinary text has."""

    def __init__(self, folder: Path, *, pairs: bool, marks: frozenset[int]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.pairs, self.marks = folder, pairs, marks
        self.tokens = _Growing(folder / TOKENS, numpy.int32)
        self.counted = _Growing(folder / COUNTED, bool)
        self.lengths: list[int] = []
        self.rewards: list[Optional[tuple[float, float]]] = []
        self.counts: dict[str, Any] = dict.fromkeys(COUNTS, 0)
        self.ends: set[int] = set()  # the last tokens of what is learnt

    def add(self, unit: Unit) -> None:
        counts = self.counts
        counts["read"] += 1
        if unit.needed:
            counts["longest"] = max(counts.get("longest", 0), unit.needed)
        if not unit.sides:
            counts["skipped" if unit.fault else "too_long"] += 1
            if unit.fault:
                counts.setdefault("first_skipped", unit.fault)
            return
        counts["kept"] += 1
        counts["cut"] += unit.is_cut
        for ids, learnt in unit.sides:
            self.tokens.add(ids)
            self.counted.add(learnt)
            self.lengths.append(len(ids))
            counts["tokens"] += len(ids)
            counts["learnt"] += int(learnt[1:].sum())
            if not unit.is_cut:
                self.ends.add(int(ids[numpy.flatnonzero(learnt)[-1]]))
        self.rewards.append(unit.rewards)

    def finish(self) -> None:
        self.tokens.close()
        self.counted.close()
        if len(self.ends) == 1 and self.ends <= self.marks:
            self.counts["ends_with"] = next(iter(self.ends))
        starts = numpy.concatenate([[0], numpy.cumsum(self.lengths, dtype=numpy.int64)]).astype(numpy.int64)
        numpy.save(self.folder / STARTS, starts)
        rewards = [each for each in self.rewards if each is not None]
        if rewards and len(rewards) == len(self.rewards):
            numpy.save(self.folder / REWARDS, numpy.array(rewards, dtype=numpy.float64))

    def in_words(self, what: Preparation) -> str:
        counts, noun = self.counts, "preference" if self.pairs else "chat"
        words = [f"{counted(counts['kept'], noun)} of {counted(counts['read'], 'record')}"]
        if counts["tokens"]:
            share = counts["learnt"] / counts["tokens"]
            words.append(f"{counted(counts['tokens'], 'token')}, of which {share:.1%} are learnt")
        if counts["cut"]:
            words.append(f"{counts['cut']:,} cut to data.sequence_length={what.sequence_length}")
        if counts["too_long"]:
            words.append(f"{counts['too_long']:,} left out, longer than data.sequence_length={what.sequence_length}")
        if longest := counts.get("longest"):
            words.append(f"{longest:,} would hold them all")
        if counts["skipped"]:
            words.append(f"{counts['skipped']:,} skipped, the first: {counts['first_skipped']}")
        return "; ".join(words)


class _Growing:
    """A one-dimensional .npy file that is written as it grows; NumPy leaves room in the header for its length."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype, self.length = numpy.dtype(dtype), 0
        self.file = path.open("wb")
        self._header()

    def add(self, values: numpy.ndarray) -> None:
        self.file.write(values.astype(self.dtype, copy=False).tobytes())
        self.length += len(values)

    def close(self) -> None:
        end = self.file.tell()
        self.file.seek(0)
        self._header()
        assert (end - self.file.tell()) == self.length * self.dtype.itemsize, "the header has grown"
        self.file.close()

    def _header(self) -> None:
        description = {"shape": (self.length,), "fortran_order": False, "descr": self.dtype.str}
        numpy.lib.format.write_array_header_1_0(self.file, description)
