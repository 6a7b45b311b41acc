"""Files of chats and preferences as prepared tokens: what is kept, cut, left out, skipped, refused."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from minitron_mcore.data.chat.config import ChatConfig
from minitron_mcore.data.chat.described import describe_chats
from minitron_mcore.data.chat.forms import Chat, Completion
from minitron_mcore.data.chat.prepare import prepare
from minitron_mcore.data.chat.prepared import Part, Prepared, load_prepared
from minitron_mcore.data.chat.template import Encoder, find_template
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from tests.refusals import refuses
from tests.unit.text_data import silent

Record = dict[str, Any]
LENGTH = 64


def chat(question: str, answer: str) -> Record:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pair(question: str, chosen: str, rejected: str, **rest: Any) -> Record:
    return {"prompt": question, "chosen": chosen, "rejected": rejected, **rest}


CHATS = [chat("a?", "b"), chat("import what", "json\nos"), chat("c", "d" * 9)]
PAIRS = [pair("def f(", "x): pass", "y, z):\n    return"), pair("import ", "json", "os")]


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def run(
    folder: Path, tokenizer: Tokenizer, train: Any, *, report: Callable[[str], None] = silent, **settings: Any
) -> Prepared:
    """What a job and its stage do together."""
    apart = ("sequence_length", "pairs", "needs_rewards", "seed")
    how: dict[str, Any] = {"sequence_length": LENGTH} | {name: settings.pop(name) for name in apart if name in settings}
    config = ChatConfig(train=str(train), **{"template": "zephyr", **settings})
    return prepare(describe_chats(config, tokenizer, **how), folder / "out", report=report)


def segments(part: Part) -> list[tuple[list[int], list[bool]]]:
    ends = zip(part.starts[:-1], part.starts[1:], strict=True)
    return [(part.tokens[start:stop].tolist(), part.counted[start:stop].tolist()) for start, stop in ends]


@pytest.fixture(scope="module")
def zephyr(family: Callable[[str], Tokenizer]) -> Tokenizer:
    return family("zephyr")


@pytest.fixture(scope="module")
def encode(zephyr: Tokenizer) -> Encoder:
    return Encoder(zephyr, find_template("zephyr", zephyr))


def as_lists(sample: Any, encode: Encoder) -> tuple[list[int], list[bool]]:
    ids, learnt = encode(sample)
    return ids.tolist(), learnt.tolist()


def test_chats(tmp_path: Path, zephyr: Tokenizer, encode: Encoder) -> None:
    lines: list[str] = []
    made = run(tmp_path, zephyr, write(tmp_path / "chats.jsonl", CHATS), report=lines.append)
    part = made.parts["train"]
    assert segments(part) == [as_lists(Chat(tuple(record["messages"])), encode) for record in CHATS]
    assert (part.tokens.dtype, part.counted.dtype, part.starts.dtype) == (numpy.int32, bool, numpy.int64)
    assert (part.units, part.segments, part.rewards, list(made.parts)) == (3, 3, None, ["train"])
    assert part.positions().tolist() == [len(ids) - 1 for ids, _ in segments(part)]
    assert part.learnt().tolist() == [sum(learnt[1:]) for _, learnt in segments(part)]
    counts = made.facts["parts"]["train"]
    assert (counts["read"], counts["kept"], counts["skipped"], counts["too_long"]) == (3, 3, 0, 0)
    assert counts["tokens"] == len(part.tokens) and counts["learnt"] == part.learnt().sum()
    assert made.ends_with == zephyr.eos == made.padding and made.facts["kind"] == "chats"
    assert lines == [
        f"chat: train: 3 chats of 3 records; {len(part.tokens):,} tokens, of which "
        f"{counts['learnt'] / counts['tokens']:.1%} are learnt"
    ]


@pytest.mark.parametrize("form", ["gz", "zst", "bz2", "list", "parquet", "folder", "workers"])
def test_the_same_from_every_kind_of_file(form: str, tmp_path: Path, zephyr: Tokenizer) -> None:
    plain = write(tmp_path / "plain.jsonl", CHATS)
    expected = run(tmp_path, zephyr, plain)
    text, path = plain.read_bytes(), tmp_path / f"other.jsonl.{form}"
    if form == "gz":
        path.write_bytes(gzip.compress(text))
    elif form == "zst":
        zstd = pytest.importorskip("backports.zstd")
        path.write_bytes(zstd.compress(text))
    elif form == "bz2":
        path.write_bytes(bz2.compress(text))
    elif form == "list":
        path = tmp_path / "other.json"
        path.write_text(json.dumps(CHATS, indent=1))
    elif form == "parquet":
        import pyarrow
        from pyarrow import parquet

        path = tmp_path / "other.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([{**CHATS[0], "id": 1}, *CHATS[1:]]), path)
    elif form == "folder":
        path = tmp_path / "folder"
        (path / "inner").mkdir(parents=True)
        write(path / "inner" / "b.jsonl", CHATS[1:])
        write(path / "a.jsonl", CHATS[:1])
        (path / "notes.txt").write_text("no record")
    else:
        path = write(tmp_path / "again.jsonl", [*CHATS[:2], CHATS[2]])
        path.write_text(path.read_text() + "\n")
    made = run(tmp_path, zephyr, path, workers=2 if form == "workers" else None)
    assert made.digest != expected.digest
    assert segments(made.parts["train"]) == segments(expected.parts["train"])


def test_preferences_and_rewards(tmp_path: Path, zephyr: Tokenizer, encode: Encoder) -> None:
    records = [{**record, "chosen_reward": i + 0.5, "rejected_reward": -i} for i, record in enumerate(PAIRS)]
    made = run(tmp_path, zephyr, write(tmp_path / "pairs.jsonl", records), pairs=True, needs_rewards=True)
    part = made.parts["train"]
    sides = [Completion(record["prompt"], record[name]) for record in PAIRS for name in ("chosen", "rejected")]
    assert segments(part) == [as_lists(side, encode) for side in sides]
    assert (part.units, part.segments, made.facts["kind"]) == (2, 4, "pairs")
    assert part.rewards is not None and part.rewards.tolist() == [[0.5, 0.0], [1.5, -1.0]]
    without = run(tmp_path, zephyr, write(tmp_path / "some.jsonl", [records[0], PAIRS[1]]), pairs=True)
    assert without.parts["train"].rewards is None


def test_preferences_as_messages(tmp_path: Path, zephyr: Tokenizer, encode: Encoder) -> None:
    sides = [chat("q", answer)["messages"] for answer in ("yes", "no")]
    record = {"chosen": sides[0], "rejected": sides[1], "prompt": "q"}
    part = run(tmp_path, zephyr, write(tmp_path / "pairs.jsonl", [record]), pairs=True).parts["train"]
    assert segments(part) == [as_lists(Chat(tuple(side), first=1), encode) for side in sides]


def test_what_is_there_is_not_made_again(tmp_path: Path, zephyr: Tokenizer) -> None:
    path = write(tmp_path / "chats.jsonl", CHATS)
    made = run(tmp_path, zephyr, path)
    times = {file: file.stat().st_mtime_ns for file in made.folder.rglob("*")}
    moved = tmp_path / "moved.jsonl"
    os.rename(path, moved)
    assert run(tmp_path, zephyr, moved, workers=1).folder == made.folder
    assert {file: file.stat().st_mtime_ns for file in made.folder.rglob("*")} == times
    others = [
        run(tmp_path, zephyr, moved, **change)
        for change in ({"sequence_length": 65}, {"counted": "last"}, {"too_long": "cut"}, {"template": "chatml"})
    ]
    assert len({made.folder, *(each.folder for each in others)}) == 5
    write(moved, CHATS[:2])
    assert run(tmp_path, zephyr, moved).digest != made.digest
    assert not list((tmp_path / "out").glob("*.partial"))


def test_the_bytes_are_the_same_every_time(tmp_path: Path, zephyr: Tokenizer) -> None:
    path = write(tmp_path / "chats.jsonl", CHATS)
    one, other = run(tmp_path / "a", zephyr, path), run(tmp_path / "b", zephyr, path, workers=1)
    files = [sorted(file for file in each.folder.rglob("*") if file.is_file()) for each in (one, other)]
    assert len(files[0]) == 4 and [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_held_out_records(tmp_path: Path, zephyr: Tokenizer) -> None:
    records = [chat(f"question {i}", f"answer {i}") for i in range(40)]
    path = write(tmp_path / "chats.jsonl", records)
    whole = segments(run(tmp_path, zephyr, path).parts["train"])
    made = run(tmp_path, zephyr, path, valid_fraction=0.25, seed=1)
    train, valid = (segments(made.parts[name]) for name in ("train", "valid"))
    assert 0 < len(valid) < 20 and sorted(train + valid) == sorted(whole)
    assert [each for each in whole if each in train] == train, "in the files' order"
    assert segments(run(tmp_path, zephyr, path, valid_fraction=0.25, seed=2).parts["valid"]) != valid
    named = run(tmp_path, zephyr, path, valid=str(write(tmp_path / "valid.jsonl", CHATS)))
    assert len(segments(named.parts["valid"])) == 3 and segments(named.parts["train"]) == whole
    with refuses("chat.valid_fraction", 1e-9, "holds out no record", "raise it"):
        run(tmp_path, zephyr, path, valid_fraction=1e-9)


def test_too_long_chats(tmp_path: Path, zephyr: Tokenizer, encode: Encoder) -> None:
    """sequence_length positions hold one token more, since the last one is never read."""
    records = [*CHATS, chat("e", "word " * 40), chat("question " * 40, "f")]
    sizes = [len(encode(Chat(tuple(record["messages"])))[0]) for record in records]
    path, limit = write(tmp_path / "chats.jsonl", records), max(sizes[:3])
    assert min(sizes[3:]) > limit > 8
    lines: list[str] = []
    left_out = run(tmp_path, zephyr, path, sequence_length=limit - 1, report=lines.append)
    assert len(segments(left_out.parts["train"])) == 3
    words = f"2 left out, longer than data.sequence_length={limit - 1}; {max(sizes) - 1} would hold them all"
    assert words in lines[0]
    assert len(segments(run(tmp_path, zephyr, path, sequence_length=max(sizes) - 1).parts["train"])) == 5
    with refuses("chat.train", path, "0 chats of 5 records; 5 left out", "raise data.sequence_length"):
        run(tmp_path, zephyr, path, sequence_length=2)
    cut = run(tmp_path, zephyr, path, sequence_length=limit - 1, too_long="cut", report=lines.append)
    found = segments(cut.parts["train"])
    assert found[:3] == segments(left_out.parts["train"]) and len(found) == 4, "of the last one no answer is left"
    whole = as_lists(Chat(tuple(records[3]["messages"])), encode)
    assert found[3] == (whole[0][:limit], whole[1][:limit])
    assert (cut.facts["parts"]["train"]["cut"], cut.facts["parts"]["train"]["too_long"]) == (1, 1)
    short = run(tmp_path, zephyr, path, sequence_length=limit - 2)
    assert len(segments(short.parts["train"])) == 3 - sizes[:3].count(limit)


@pytest.mark.parametrize("packing", [False, True])
def test_too_long_preferences(packing: bool, tmp_path: Path, zephyr: Tokenizer, encode: Encoder) -> None:
    """Never one side alone: both are left out, or both lose the same tokens of their prompt."""
    record = pair("one two three four five six seven", " eight nine ten", " no")
    path = write(tmp_path / "pairs.jsonl", [record, pair("a", " b", " c")])
    sides = [as_lists(Completion(record["prompt"], record[name]), encode) for name in ("chosen", "rejected")]
    longest, both = max(len(ids) - 1 for ids, _ in sides), sum(len(ids) - 1 for ids, _ in sides)
    fits = both if packing else longest
    common: Any = {"pairs": True, "packing": packing}
    assert run(tmp_path, zephyr, path, sequence_length=fits, **common).parts["train"].units == 2
    assert run(tmp_path, zephyr, path, sequence_length=fits - 1, **common).parts["train"].units == 1
    made = run(tmp_path, zephyr, path, sequence_length=fits - 3, too_long="cut", **common)
    gone, found = 2 if packing else 3, segments(made.parts["train"])[:2]
    for (ids, learnt), (before, marks) in zip(found, sides, strict=True):
        assert ids[0] == zephyr.bos and ids[1:] == before[1 + gone :] and learnt[1:] == marks[1 + gone :]
    # The prompt alone is cut, down to its last token.
    assert run(tmp_path, zephyr, path, sequence_length=8, too_long="cut", **common).parts["train"].units == 1


def test_the_bos_that_a_template_writes_stays(tmp_path: Path, family: Callable[[str], Tokenizer]) -> None:
    """Though the tokenizer itself puts none."""
    family("mistral").save(str(tmp_path / "bare"))
    file = tmp_path / "bare" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    own = load_tokenizer(str(tmp_path / "bare"))
    assert own.bos not in own.tokenize_prompt("one")
    sides = [chat("one two three four", answer)["messages"] for answer in ("yes", "no")]
    path = write(tmp_path / "pairs.jsonl", [{"chosen": sides[0], "rejected": sides[1]}])
    common: Any = {"pairs": True, "template": "mistral"}
    whole = segments(run(tmp_path, own, path, **common).parts["train"])
    longest = max(len(ids) - 1 for ids, _ in whole)
    cut = segments(run(tmp_path, own, path, sequence_length=longest - 4, too_long="cut", **common).parts["train"])
    assert [ids for ids, _ in cut] == [[own.bos, *ids[5:]] for ids, _ in whole]


def test_records_that_break_a_rule_are_refused_by_file_and_line(tmp_path: Path, zephyr: Tokenizer) -> None:
    path = write(tmp_path / "chats.jsonl", [CHATS[0], {}, {"messages": [{"role": "bot", "content": "x"}]}])
    with refuses("chat.train", f"{path}, line 2", "has no keys", "or set chat.bad_records=skip"):
        run(tmp_path, zephyr, path)
    assert not list((tmp_path / "out").glob("*"))
    lines: list[str] = []
    made = run(tmp_path, zephyr, path, bad_records="skip", report=lines.append)
    assert made.facts["parts"]["train"]["skipped"] == 2 and made.parts["train"].units == 1
    assert f"2 skipped, the first: {path}, line 2, has no keys" in lines[0]
    valid = write(tmp_path / "valid.jsonl", [{"text": "x"}])
    with refuses("chat.valid", f"{valid}, line 1", "has only text"):
        run(tmp_path, zephyr, write(path, CHATS), valid=str(valid))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"messages": [', "is not JSON"),
        ("[1]", "holds a list"),
        (json.dumps(chat("q", "")), "has an empty answer"),
        (json.dumps(pair("q", "a", "b")), "has only chosen, prompt, rejected"),
        (json.dumps({**chat("q", "a"), "tools": [{"type": "function"}]}), "does not suit chat.template=zephyr"),
    ],
)
def test_lines_that_break_a_rule(line: str, rule: str, tmp_path: Path, zephyr: Tokenizer) -> None:
    path = write(tmp_path / "chats.jsonl", CHATS)
    path.write_text(path.read_text() + line + "\n")
    with refuses("chat.train", f"{path}, line 4", rule, "chat.bad_records=skip"):
        run(tmp_path, zephyr, path)
    assert run(tmp_path, zephyr, path, bad_records="skip").parts["train"].units == 3


def test_what_is_no_character_is_replaced_and_counted(tmp_path: Path, zephyr: Tokenizer) -> None:
    path, lines = write(tmp_path / "chats.jsonl", CHATS), list[str]()
    half, bad = (json.dumps(chat(text, "c")) for text in ("a \ud800 b", "x"))
    path.write_bytes(path.read_bytes() + f"{half}\n{bad}".encode().replace(b"x", b"\xff"))
    made = run(tmp_path, zephyr, path, report=lines.append)
    assert made.parts["train"].units == 5
    assert lines[0].startswith("WARNING: characters that are not UTF-8, replaced by U+FFFD: 2 (files: 1)")
    assert lines[0].endswith(f"the first in {path}, line 4")


def test_preferences_without_rewards_that_are_needed(tmp_path: Path, zephyr: Tokenizer) -> None:
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    with refuses("chat.train", f"{path}, line 1", "has no chosen_reward and no rejected_reward"):
        run(tmp_path, zephyr, path, pairs=True, needs_rewards=True)
    with refuses("chat.train", path, "has no record that can be used: 0 preferences of 2 records; 2 skipped"):
        run(tmp_path, zephyr, path, pairs=True, needs_rewards=True, bad_records="skip")


def test_a_damaged_file_is_refused_whatever_is_skipped(tmp_path: Path, zephyr: Tokenizer) -> None:
    path = tmp_path / "chats.jsonl.gz"
    whole = gzip.compress(b"".join(json.dumps(chat(str(i), os.urandom(30).hex())).encode() + b"\n" for i in range(9)))
    path.write_bytes(whole[:-40])
    for bad_records in ("refuse", "skip"):
        with refuses("", path, "is damaged or cut off", "make or fetch it again"):
            run(tmp_path, zephyr, path, bad_records=bad_records)
    assert not list((tmp_path / "out").glob("*"))


def test_files_that_hold_no_records(tmp_path: Path, zephyr: Tokenizer) -> None:
    with refuses("chat.train", None, "is not set"):
        describe_chats(ChatConfig(), zephyr, sequence_length=LENGTH)
    with refuses("chat.train", tmp_path / "nowhere.jsonl", "does not exist"):
        run(tmp_path, zephyr, tmp_path / "nowhere.jsonl")
    path = tmp_path / "text.txt"
    path.write_text("just text")
    with refuses("chat.train", path, "is plain text, which holds no records"):
        run(tmp_path, zephyr, path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with refuses("chat.train", empty, "has no record that can be used: 0 chats of 0 records"):
        run(tmp_path, zephyr, empty)


def test_texts_need_no_template_and_chats_do(tmp_path: Path, zephyr: Tokenizer) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"prompt": "import", "completion": " json"}])
    assert run(tmp_path, zephyr, texts, template=None).parts["train"].units == 1
    with refuses("chat.template", None, "no chat template for chat.texts=turns"):
        run(tmp_path, zephyr, texts, template=None, texts="turns")
    turned = run(tmp_path, zephyr, texts, texts="turns").parts["train"]
    assert "<|assistant|>" in zephyr.detokenize(turned.tokens)
    chats = write(tmp_path / "chats.jsonl", CHATS)
    for bad_records in ("refuse", "skip"):
        with refuses("chat.template", None, "has no chat template"):
            run(tmp_path, zephyr, chats, template=None, bad_records=bad_records)


def test_a_model_without_all_of_the_tokenizers_ids(tmp_path: Path, zephyr: Tokenizer) -> None:
    path = write(tmp_path / "chats.jsonl", CHATS)
    with refuses("chat.train", f"{path}, line 1", "beyond the model's vocab_size=20"):
        run(tmp_path, replace(zephyr, rows=20), path)


def test_a_folder_that_is_something_else(tmp_path: Path, zephyr: Tokenizer) -> None:
    made = run(tmp_path, zephyr, write(tmp_path / "chats.jsonl", CHATS))
    (made.folder / "train" / "counted.npy").write_bytes(b"")
    with refuses("", made.folder, "does not hold prepared chats"):
        load_prepared(made.folder)


def test_our_own_tokenizer(tmp_path: Path, corpus: Path) -> None:
    """Its SentencePiece model, with a template that comes along."""
    own = load_tokenizer(str(corpus / "tokenizer.model"))
    made = run(tmp_path, own, write(tmp_path / "chats.jsonl", CHATS))
    assert made.ends_with == own.eos and made.parts["train"].units == 3
    # To this tokenizer <|im_end|> is characters, at the last of which nothing is to stop.
    assert run(tmp_path, own, tmp_path / "chats.jsonl", template="chatml").ends_with is None
