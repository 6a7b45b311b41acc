"""Tasks made from held-out text, for a machine without a network: which of four continuations really follows, and the
perplexity of documents. Pure.

Both are drawn by a seed from the same documents for every model, so that models are compared on the same samples. The
wrong continuations come from other documents. A context ends before a blank, with which each continuation begins.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from minitron_mcore.data.config import EXTENSIONS
from minitron_mcore.data.corpus import find_files
from minitron_mcore.data.described import Part
from minitron_mcore.data.documents import draw, draw_documents
from minitron_mcore.data.records import Replacements, read_records, texts_of
from minitron_mcore.data.text_file import TextFile, inspect_files
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.harness.names import CONTINUATION, KEY, PERPLEXITY

CHOICES = 4
QUESTIONS = 500
CONTEXT, CONTINUED = (40, 400), (20, 80)  # characters, at least and at most
DOCUMENTS, DOCUMENT_CHARACTERS = 200, 8_000  # of the perplexity, at most
READ_DOCUMENTS = 2_000  # drawn of the text to make tasks of


def task_config(name: str, documents: Sequence[str], seed: int) -> dict[str, Any]:
    """The task `name`, one of LOCAL, as the harness takes it in place of a name. Raises InputError where there is too
    little text."""
    make = {CONTINUATION: questions, PERPLEXITY: whole_documents}[name]
    rows = make(documents, random.Random(seed))
    ways: dict[str, Any] = {
        CONTINUATION: {
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": _metrics("acc", "acc_norm", aggregation="mean", higher_is_better=True),
        },
        PERPLEXITY: {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [
                *_metrics("byte_perplexity", aggregation="weighted_perplexity"),
                *_metrics("bits_per_byte", aggregation="bits_per_byte"),
            ],
        },
    }

    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    common = {"task": name, "custom_dataset": load, "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1}}
    return common | ways[name]


def _metrics(*names: str, higher_is_better: bool = False, aggregation: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better} for name in names]


def questions(documents: Sequence[str], draw: random.Random) -> list[dict[str, Any]]:
    """Up to QUESTIONS of {context, choices, answer}, at most 3 from a document, none of which has two equal choices."""
    found = []
    for number in draw.sample(range(len(documents)), len(documents)):
        spans = [span for _ in range(3) if (span := _passage(documents[number], draw))]
        found += [(number, *span) for span in dict.fromkeys(spans)]
    owners = {number for number, _, _ in found}
    if len(owners) < CHOICES:
        raise _too_little(CONTINUATION, CHOICES, CONTEXT[0] + CONTINUED[0], len(owners))
    rows = []
    for number, context, right in draw.sample(found, min(QUESTIONS, len(found))):
        wrong: dict[str, int] = {}
        for _ in range(50):
            other, _, text = draw.choice(found)
            if other not in (number, *wrong.values()) and text != right:
                wrong.setdefault(text, other)
            if len(wrong) == CHOICES - 1:
                break
        else:
            continue
        answer = draw.randrange(CHOICES)
        choices = [*wrong]
        choices.insert(answer, right)
        rows.append({"context": context, "choices": choices, "answer": answer})
    if not rows:
        raise _too_little(CONTINUATION, CHOICES, CONTEXT[0] + CONTINUED[0], len(owners))
    return rows


def _passage(text: str, draw: random.Random) -> tuple[str, str] | None:
    """A context and what follows it; None where the text has no place for one."""
    last = len(text) - CONTINUED[0]
    if last <= CONTEXT[0]:
        return None
    cut = _blank_after(text, draw.randrange(CONTEXT[0], last))
    if cut is None:
        return None
    context, follows = text[max(0, cut - CONTEXT[1]) : cut], text[cut : cut + CONTINUED[1]]
    if cut + CONTINUED[1] < len(text):  # not within a word
        follows = follows[: len(follows.rstrip().rsplit(None, 1)[0])] if len(follows.split()) > 1 else follows
    follows = follows.rstrip()
    return (context, follows) if len(follows) >= CONTINUED[0] and context.strip() else None


def _blank_after(text: str, start: int) -> int | None:
    """The first place from `start` on where a blank follows something else."""
    places = range(start, len(text) - CONTINUED[0])
    return next((place for place in places if text[place].isspace() and not text[place - 1].isspace()), None)


def whole_documents(documents: Sequence[str], draw: random.Random) -> list[dict[str, Any]]:
    """Up to DOCUMENTS of {text}, cut at DOCUMENT_CHARACTERS."""
    taken = draw.sample(range(len(documents)), min(DOCUMENTS, len(documents)))
    rows = [{"text": documents[number][:DOCUMENT_CHARACTERS]} for number in sorted(taken)]
    rows = [row for row in rows if row["text"].strip()]
    if not rows:
        raise _too_little(PERPLEXITY, 1, 1, 0)
    return rows


def _too_little(name: str, documents: int, characters: int, found: int) -> InputError:
    rule = f"needs at least {documents} held-out documents of {characters} characters, and there are {found}"
    return InputError(KEY, name, rule, "name more text as evaluate.text")


def text_files(sources: Any) -> list[TextFile]:
    """The files that `evaluate.text` names. Raises InputError."""
    key = "evaluate.text"
    return inspect_files(find_files(sources, list(EXTENSIONS), key, [], lambda line: None), lambda line: None)


def documents_of_files(sources: Any, seed: int) -> list[str]:
    """Documents of text files, as `preprocess` reads them; at most READ_DOCUMENTS, drawn of all. Raises InputError."""
    replaced = Replacements()
    found = (
        text
        for file in text_files(sources)
        for record in read_records(file, ["text"])
        for text in texts_of(record, file.form, file.path, ["text"], replaced)
    )
    return draw(found, READ_DOCUMENTS, seed)


def documents_of_tokens(part: Part, tokenizer: Tokenizer, seed: int) -> list[str]:
    """Documents of token files, the share of them that `part` says, as text; at most READ_DOCUMENTS, drawn of all."""
    texts = []
    for tokens in draw_documents(part, READ_DOCUMENTS, seed):
        ids = tokens.tolist()
        texts.append(tokenizer.detokenize(ids[:-1] if ids and ids[-1] == tokenizer.eod else ids))
    return texts
