"""A tiny model as transformers, this project and the LM Evaluation Harness read it; tasks of every kind in YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy

from tests.distributed.hf_cases import save_with_transformers
from tests.unit.data.test_fingerprint import train_byte_level
from tests.unit.text_data import EMAIL_PACKAGE, python_files, small_data

TASKS = ("tiny_choice:2", "tiny_letter", "tiny_text", "tiny_answer")
ALL = [*TASKS, "minitron_continuation", "minitron_perplexity"]
POSITIONS = 64  # of the model
WINDOW = 48  # tokens of the document that `evaluate` reads as held-out text too, its mark included
COMMON = "test_split: test\ndataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\nmetadata: {version: 1.0}\n"
CHOICE = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
fewshot_split: test
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TEXT = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
ANSWER = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def make_case(root: Path) -> None:
    """`hf`: a folder whose tokenizer begins every text with a mark of its own, as Llama's does; held-out `email`;
    `window`: one sample of the first text of tiny_text; `tasks`."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    save_with_transformers("llama-scaled", root / "hf")
    train_byte_level(root / "hf")
    tokenizer = AutoTokenizer.from_pretrained(root / "hf")
    begins = [("<|begin_of_text|>", tokenizer.bos_token_id)]
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=begins)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(root / "hf")
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    from minitron_mcore.data.tokenizer import load_tokenizer

    small_data(root / "email", load_tokenizer(str(root / "hf")))
    texts = [path.read_text() for path in python_files(EMAIL_PACKAGE)]
    first = text_of_length(tokenizer, texts[0])
    rows: dict[str, tuple[str, list[dict[str, Any]]]] = {
        # The first context is longer than the model's positions; a choice begins at a newline, one within a word.
        "tiny_choice": (
            CHOICE,
            [
                {"question": texts[n][: 30 + 200 // n], "choices": [f" {n}", f"\n  x{n * 111}", "ing on", " the end"]}
                | {"answer": n % 4}
                for n in range(1, 10)
            ],
        ),
        "tiny_letter": (
            CHOICE,
            [{"question": f"What is {n}?", "choices": [" a", " b", " c"], "answer": n % 3} for n in range(9)],
        ),
        "tiny_text": (TEXT, [{"text": first}, *({"text": texts[n][: 90 * n]} for n in range(1, 6))]),
        "tiny_answer": (ANSWER, [{"question": texts[n][: 40 * n], "answer": str(n)} for n in range(1, 7)]),
    }
    pieces = [text[start : start + 250] for text in texts for start in range(300, min(len(text), 2000), 600)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    (root / "tasks").mkdir()
    for name, (how, documents) in rows.items():
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (root / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{COMMON % path}{how}")
    parts = "group: tiny_all\ntask: [tiny_choice, tiny_letter]\naggregate_metric_list: [{metric: acc}]\n"
    (root / "tasks" / "group.yaml").write_text(parts + "metadata: {version: 1.0}\n")
    # As the harness takes a text: a mark, then what the tokenizer makes of it, which begins with the mark once more.
    write_window(root / "window", [tokenizer.bos_token_id, *tokenizer.encode(first)])


def text_of_length(tokenizer: Any, text: str) -> str:
    """The beginning of `text` that is WINDOW tokens."""
    for end in range(len(text)):
        if len(tokenizer.encode(text[:end])) == WINDOW:
            return text[:end]
    raise AssertionError("no beginning of the text has that many tokens")


def write_window(prefix: Path, tokens: list[int]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    builder.add_document(numpy.array(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def samples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By task, what the harness has written of each document."""
    return {
        path.stem.removeprefix("samples_"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("samples_*.jsonl"))
    }
