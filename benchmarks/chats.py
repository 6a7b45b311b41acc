"""Time of finding a chat's answers by comparison with that by the template's marks: the same chats, ids and masks.

    python benchmarks/chats.py                  20 turns a chat
    python benchmarks/chats.py --turns 2 8 20   several sizes

Templates without `{% generation %}` marks, as most that models come with, have each answer found by what the whole
chat's ids begin with. Repeats are interleaved; medians of processor time are compared. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def text() -> str:
    """What chats and tokenizer are made of: a package of the standard library."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py")))


def tokenizer_in(folder: Path) -> Any:
    """Byte-level BPE, as of GPT-2, with ChatML's marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from minitron_mcore.data.tokenizer import load_tokenizer

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = trainers.BpeTrainer(vocab_size=2000, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text()], how)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": MARKS[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(str(folder))


def chats(number: int, turns: int, characters: int) -> list[Any]:
    from minitron_mcore.data.chat.forms import Chat

    drawn, words = random.Random(turns), text()

    def said() -> str:
        start = drawn.randrange(len(words) - characters)
        return words[start : start + drawn.randrange(characters // 2, characters)].strip() or "yes"

    roles = ("user", "assistant")
    return [Chat(tuple({"role": roles[turn % 2], "content": said()} for turn in range(turns))) for _ in range(number)]


def measure(tokenizer: Any, turns: int, options: argparse.Namespace) -> dict[str, Any]:
    from minitron_mcore.data.chat.template import ChatTemplate, Encoder, find_template

    marked = find_template("chatml", tokenizer)
    assert marked is not None
    bare = ChatTemplate(re.sub(r"\{%-? *(end)?generation *-?%\}", "", marked.text), "chatml without marks")
    ways = {"marks": Encoder(tokenizer, marked), "comparison": Encoder(tokenizer, bare)}
    read = chats(options.chats, turns, options.characters)
    same = all(
        (one == other).all()
        for chat in read
        for one, other in zip(*(encode(chat) for encode in ways.values()), strict=True)
    )
    tokens = sum(len(ways["marks"](chat)[0]) for chat in read)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, encode in ways.items():
            start = time.process_time()
            for chat in read:
                encode(chat)
            times[name].append(time.process_time() - start)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    rates = {f"tokens_per_second_{name}": round(tokens / each) for name, each in seconds.items()}
    found = {"turns": turns, "tokens": tokens, **rates, "ratio": round(seconds["comparison"] / seconds["marks"], 3)}
    print(f"{turns} turns: {found}", flush=True)
    return {**found, "same": same}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[20])
    parser.add_argument("--chats", type=int, default=20, help="of each size")
    parser.add_argument("--characters", type=int, default=400, help="of a message, at most")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_in(Path(folder))
        results = [measure(tokenizer, turns, options) for turns in options.turns]
    print(json.dumps({"benchmark": "chats", "results": results}))
    return 0 if all(each["same"] for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
