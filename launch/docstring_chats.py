"""Instruction pairs from the Python standard library's own docstrings, for configs/align-quickstart.yaml.

    python launch/docstring_chats.py runs/chats

A message shows a function's first line; the answer is the first sentence of its docstring. Writes `sft.jsonl` and
`sft_valid.jsonl` of `messages`, and of the same functions `pairs.jsonl` and `pairs_valid.jsonl` of `prompt`, `chosen`
and `rejected`: the rejected answer is the sentence of another function, or this one cut off, or without its capital
letter and full stop. A function is held out by its name's checksum, so that no name is in both. Rewards: how far an
answer is what was asked, 2 for the sentence itself, less for each fault.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

HELD_OUT = 10  # one name in so many
SHORTEST, LONGEST = 20, 100  # characters of a sentence
SENTENCE = re.compile(r"[A-Z][^\n]*?\.(?=\s|$)")


def sentences(library: Path) -> Iterator[tuple[str, str, str]]:
    """(name, first line, first sentence of the docstring) of every function that has one, each name once."""
    seen = set()
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & {*path.relative_to(library).parts}:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name in seen:
                continue
            found = SENTENCE.match(" ".join((ast.get_docstring(node) or "").split()))
            if found and SHORTEST <= len(found[0]) <= LONGEST:
                seen.add(node.name)
                yield node.name, f"def {node.name}({ast.unparse(node.args)}):", found[0]


def spoilt(sentence: str, other: str, draw: random.Random) -> tuple[str, float]:
    """A worse answer, and its reward."""
    fault = draw.randrange(3)
    if fault == 0:
        return other, 1.0
    if fault == 1:
        return sentence[: draw.randrange(len(sentence) // 3, 2 * len(sentence) // 3)].rstrip(" ."), 0.5
    return sentence[0].lower() + sentence[1:].rstrip("."), 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the four files are written")
    parser.add_argument("--seed", type=int, default=1234, help="of the faults")
    options = parser.parse_args()
    functions = [*sentences(Path(sysconfig.get_path("stdlib")))]
    draw = random.Random(options.seed)
    draw.shuffle(functions)
    options.folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for part, held_out in (("", False), ("_valid", True)):
        chats, pairs = [], []
        for number, (name, line, sentence) in enumerate(functions):
            if (zlib.crc32(name.encode()) % HELD_OUT == 0) != held_out:
                continue
            worse, reward = spoilt(sentence, functions[number - 1][2], draw)
            asked = {"role": "user", "content": line}
            chats.append({"messages": [asked, {"role": "assistant", "content": sentence}]})
            answers = {"chosen": sentence, "rejected": worse, "chosen_reward": 2.0, "rejected_reward": reward}
            sides = {key: [{"role": "assistant", "content": answers[key]}] for key in ("chosen", "rejected")}
            pairs.append({"prompt": [asked], **answers, **sides})
        for kind, records in (("sft", chats), ("pairs", pairs)):
            file = options.folder / f"{kind}{part}.jsonl"
            file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            counts[file] = len(records)
    print("\n".join(f"{file}: {count:,} records" for file, count in counts.items()))


if __name__ == "__main__":
    main()
