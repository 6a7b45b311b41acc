"""Questions and documents made of held-out text: what follows really follows, the rest comes from elsewhere."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.described import held_out_part
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.evaluation.harness.local_tasks import (
    CHOICES,
    CONTEXT,
    CONTINUED,
    DOCUMENT_CHARACTERS,
    documents_of_files,
    documents_of_tokens,
    questions,
    task_config,
    whole_documents,
)
from tests.refusals import refuses
from tests.unit.text_data import EMAIL_PACKAGE, python_files

TEXTS = [path.read_text(encoding="utf-8") for path in python_files(EMAIL_PACKAGE)]


def test_the_answer_follows_the_context_and_the_others_are_of_other_documents() -> None:
    found = questions(TEXTS, random.Random(5))
    assert len(found) > 20 and len({question["answer"] for question in found}) == CHOICES
    for question in found:
        context, choices, answer = question["context"], question["choices"], question["answer"]
        assert len(set(choices)) == CHOICES and len(context) <= CONTEXT[1]
        (home,) = {number for number, text in enumerate(TEXTS) if context + choices[answer] in text}
        for place, choice in enumerate(choices):
            assert CONTINUED[0] <= len(choice) <= CONTINUED[1]
            assert choice[0].isspace() and not choice[-1].isspace() and not context[-1].isspace()
            if place != answer:
                assert context + choice not in TEXTS[home]
                assert any(choice in text for number, text in enumerate(TEXTS) if number != home)


def test_drawn_by_the_seed_alone() -> None:
    assert questions(TEXTS, random.Random(5)) == questions(TEXTS, random.Random(5))
    assert questions(TEXTS, random.Random(5)) != questions(TEXTS, random.Random(6))


def test_documents_of_the_perplexity_are_cut() -> None:
    found = whole_documents([*TEXTS, " \n"], random.Random(1))
    assert len(found) == sum(bool(text.strip()) for text in TEXTS)
    assert max(len(row["text"]) for row in found) == DOCUMENT_CHARACTERS


@pytest.mark.parametrize("name", ["minitron_continuation", "minitron_perplexity"])
def test_too_little_text_is_refused(name: str) -> None:
    with refuses("evaluate.tasks", name, "held-out documents", "name more text as evaluate.text"):
        task_config(name, [""], 1)


def test_documents_of_token_files_are_the_texts(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    part = held_out_part(DataConfig(valid=str(corpus / "email_text_document"), sequence_length=32), 4)
    assert documents_of_tokens(part, tokenizer, 3) == [text for text in TEXTS if text]
    path = tmp_path / "some.txt"
    path.write_text(TEXTS[1], encoding="utf-8")
    assert documents_of_files(str(path), 3) == [TEXTS[1]]
