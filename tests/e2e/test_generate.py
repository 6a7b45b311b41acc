"""`generate` as it is typed: a file of prompts to two checkpoints, against transformers on the exported folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.hf_cases import transformers_tokens
from tests.e2e.verbs import run_well

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
LINES: list[dict[str, Any]] = [
    {"prompt": "def read(self):\n    return"},
    {"prompt": "import"},
    {"messages": [{"role": "user", "content": "import json"}]},
]
TEXTS = ["def read(self):\n    return", "import", "user: import json\nassistant:"]
NEW = 10


@pytest.fixture(scope="module")
def root(corpus_with_teacher: Callable[[str], Path]) -> Path:
    """`teacher` with a tokenizer and a chat template beside it, its export `hf`, and `prompts.jsonl`."""
    root = corpus_with_teacher("generate")
    (root / "teacher" / "tokenizer").mkdir()
    shutil.copyfile(root / "tokenizer.model", root / "teacher" / "tokenizer" / "tokenizer.model")
    (root / "teacher" / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    run_well("export", f"checkpoint={root / 'teacher'}", f"hf={root / 'hf'}")
    return root


def generate(root: Path, *words: str, world_size: int = 1) -> tuple[str, list[dict[str, Any]]]:
    """What was shown, and the lines of the file."""
    given = [f"checkpoints.{name}={root / 'teacher'}" for name in ("teacher", "student")]
    file = root / "written" / "text.jsonl"
    given += [f"generate.prompts={root / 'prompts.jsonl'}", f"generate.max_new_tokens={NEW}"]
    shown = run_well("generate", *given, f"generate.output={file}", *words, world_size=world_size)
    return shown, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_text_is_that_of_transformers(root: Path) -> None:
    """The ids are those of the exported tokenizer, and of its template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "hf")
    chat = tokenizer.apply_chat_template(LINES[2]["messages"], tokenize=False, add_generation_prompt=True)
    assert chat == TEXTS[2]
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = transformers_tokens(root / "hf", ids, NEW)
    shown, rows = generate(root)
    assert [{key: row[key] for key in row if key != "continuations"} for row in rows] == LINES
    known = tokenizer.vocab_size  # the model has more rows than the tokenizer ids, which say nothing
    for row, prompt, new in zip(rows, ids, expected, strict=True):
        of_teacher, of_student = row["continuations"]["teacher"], row["continuations"]["student"]
        assert of_teacher == of_student
        assert of_teacher["tokens"] == NEW and of_teacher["finish_reason"] == "length"
        whole = tokenizer.decode(prompt + [token for token in new if token < known])
        assert whole == tokenizer.decode(prompt) + of_teacher["text"]
    assert "prompt 3: user: import json\n  teacher: " in shown and "3 prompts, 30 tokens" in shown


def test_two_ranks_write_the_same(root: Path) -> None:
    """Drawn, cut at a stop text, and in smaller batches."""
    stop = generate(root)[1][1]["continuations"]["teacher"]["text"][2:5]
    drawn = ["generate.temperature=0.7", "generate.top_p=0.9", f"generate.stop={json.dumps([stop, 'e'])}", "seed=3"]
    _, alone = generate(root, *drawn)
    _, sharded = generate(root, *drawn, "parallel.tensor=2", "parallel.sequence=true", world_size=2)
    _, shared = generate(root, *drawn, "generate.batch_size=1", world_size=2)
    assert alone == sharded == shared
    ends = [each for row in alone for each in row["continuations"].values()]
    assert all("e" not in each["text"] and stop not in each["text"] for each in ends)
    assert {each["finish_reason"] for each in ends} & {"stop"}
