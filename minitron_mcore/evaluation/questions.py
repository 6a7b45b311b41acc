"""Multiple-choice questions from a JSONL file, their tokens, and who answers them right. Pure.

One question per line; further keys are ignored:

    {"context": "The trophy did not fit into the case because the", "choices": [" trophy", " case"], "answer": 0}

`answer` is the index of the right choice (the first is 0) or its text. A choice is scored by its log-likelihood as the
continuation of the context: the two are joined as they stand, so that a space between them belongs to the choice.

A gap in the middle, as in Winogrande, is filled into the context: each choice then has its own, and the rest of the
sentence is scored (partial scoring, arXiv 1806.02847):

    {"context": ["It did not fit because the trophy", "It did not fit because the case"],
     "choices": [" was too big.", " was too big."], "answer": 0}

Tokens: each context + choice is tokenised as a whole, after the end-of-document token, which precedes a document in the
samples that models are trained on here. The tokens that the context alone and all choices begin with are given; the
rest is scored. So where a choice changes how the end of the context is tokenised, the changed tokens are scored in
every choice, and the choices stay comparable. With a context for each choice, the given tokens are those that a choice
shares with its own context.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown

import numpy

from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import InputError

FORM = '{"context": text (or one a choice), "choices": [text, …], "answer": index or text}'


@dataclass(frozen=True)
class Question:
    """By choice: token ids of start, context and choice, and how many of the first are given and not scored."""

    sequences: tuple[tuple[int, ...], ...]
    given: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """The questions of a file, and the file's sha256."""

    questions: tuple[Question, ...]
    digest: str

    @property
    def rows(self) -> list[tuple[tuple[int, ...], int]]:
        """(token ids, number of given ones) of every choice, question by question."""
        return [row for each in self.questions for row in zip(each.sequences, each.given, strict=True)]


def load_task(path: str | Path, tokenizer: Tokenizer, max_positions: int) -> Task:
    """Read and tokenise the questions in `path`.

    Any rank calls. Raises InputError, with file and line, for a line that is not a question, a choice without tokens,
    and a row of more than `max_positions` tokens.
    """
    questions = []
    for where, contexts, choices, answer in read_questions(path):
        question = _tokenise(contexts, choices, answer, tokenizer, where)
        read = max(len(sequence) - 1 for sequence in question.sequences)
        if read > max_positions:
            rule = f"has {read} tokens of context and choice, more than max_position_embeddings={max_positions}"
            raise refusal(where, rule, "shorten the context")
        questions.append(question)
    return Task(tuple(questions), hashlib.sha256(Path(path).read_bytes()).hexdigest())


def read_questions(path: str | Path) -> list[tuple[str, list[str], list[str], int]]:
    """(file and line, contexts, choices, index of the right one) of every line that is not blank. Raises InputError.

    There is one context, or one for each choice.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise refusal(path, f"is not UTF-8 (byte {error.start})", "write it as UTF-8") from error
    questions = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            questions.append((where, *_parse(line, where)))
    if not questions:
        raise refusal(path, "holds no questions", f"write lines of {FORM}")
    return questions


def refusal(where: str | Path, rule: str, remedy: str = "") -> InputError:
    return InputError("importance.multiple_choice", where, rule, remedy)


def _parse(line: str, where: str) -> tuple[list[str], list[str], int]:
    """(contexts, choices, index of the right one)"""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise refusal(where, f"is not JSON ({error})", f"write {FORM}") from error
    if not isinstance(fields, dict) or not {"context", "choices", "answer"} <= fields.keys():
        raise refusal(where, "is not a question", f"write {FORM}")
    context, choices, answer = (fields[name] for name in ("context", "choices", "answer"))
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise refusal(where, f"has choices={shown(choices)}, which must be a list of two or more texts")
    contexts = context if isinstance(context, list) and len(context) == len(choices) else [context]
    if not all(isinstance(each, str) for each in contexts):
        rule = f"has context={shown(context)}, which must be text, or a list of as many texts as there are choices"
        raise refusal(where, rule)
    if len(set(_joined(contexts, choices))) < len(choices):
        raise refusal(where, "has two choices of the same text, between which no model could choose")
    if isinstance(answer, str) and choices.count(answer) == 1:
        return contexts, choices, choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        rule = f"has answer={shown(answer)}, which must be an index from 0 to {len(choices) - 1} or one of the choices"
        raise refusal(where, rule)
    return contexts, choices, answer


def _joined(contexts: Sequence[str], choices: Sequence[str]) -> list[str]:
    own = contexts if len(contexts) == len(choices) else list(contexts) * len(choices)
    return [context + choice for context, choice in zip(own, choices, strict=True)]


def _tokenise(
    contexts: Sequence[str], choices: Sequence[str], answer: int, tokenizer: Tokenizer, where: str
) -> Question:
    alone = [tokenizer.tokenize(context) for context in contexts]
    wholes = [tokenizer.tokenize(text) for text in _joined(contexts, choices)]
    if len(alone) == 1:
        given = [min(_common(alone[0], whole) for whole in wholes)] * len(wholes)
    else:
        given = [_common(context, whole) for context, whole in zip(alone, wholes, strict=True)]
    for choice, whole, count in zip(choices, wholes, given, strict=True):
        if len(whole) == count:
            raise refusal(where, f"has the choice {shown(choice)}, which has no tokens to score", "give it text")
    return Question(tuple((tokenizer.eod, *whole) for whole in wholes), tuple(count + 1 for count in given), answer)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the prefix that both have."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


def accuracy(task: Task, log_likelihoods: numpy.ndarray, *, normalized: bool = False) -> float:
    """Share of the questions whose right choice has the largest log-likelihood; of equal ones the first counts.

    `log_likelihoods` float64 [rows]: sums over each choice's tokens. `normalized`: divided by the choice's number of
    tokens, so that long choices are not at a disadvantage.
    """
    values = log_likelihoods / [len(row) - given for row, given in task.rows] if normalized else log_likelihoods
    firsts = numpy.cumsum([len(question.sequences) for question in task.questions])[:-1]
    of_questions = zip(task.questions, numpy.split(values, firsts), strict=True)
    return sum(int(of.argmax()) == question.answer for question, of in of_questions) / len(task.questions)
