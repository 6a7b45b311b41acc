"""Questions and their tokens: what is given, what is scored, who is right, and which lines are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from minitron_mcore.data.tokenizer import SENTENCEPIECE, Tokenizer
from minitron_mcore.evaluation.likelihood import Inputs, input_batches
from minitron_mcore.evaluation.questions import Question, Task, accuracy, load_task
from tests.refusals import refuses
from tests.unit.text_data import small_tokenizer

EOD = 1


def letters(*merges: str) -> Tokenizer:
    """A token for each letter, and for each of `merges`, which are taken first; `#` has no token."""
    pieces = [*merges, *map(chr, range(32, 127))]

    def encode(text: str) -> list[int]:
        ids = []
        while text:
            piece = next((piece for piece in pieces if text.startswith(piece)), text[0])
            if piece != "#":
                ids.append(2 + pieces.index(piece))
            text = text[len(piece) :]
        return ids

    def decode(ids: list[int]) -> str:
        return "".join(pieces[token - 2] for token in ids)

    return Tokenizer(SENTENCEPIECE, "letters", len(pieces) + 2, None, EOD, "letters", encode, decode)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def question(context: Any, choices: Any, answer: Any = 0, **more: Any) -> dict[str, Any]:
    return {"context": context, "choices": choices, "answer": answer, **more}


def longest(task: Task) -> int:
    """Tokens that the model reads of the longest row."""
    return max(len(sequence) - 1 for sequence, _ in task.rows)


def parts(tokenizer: Tokenizer, found: Question) -> list[tuple[str, str]]:
    """(given, scored) of every choice, as text."""
    assert all(sequence[0] == EOD for sequence in found.sequences)
    return [
        (tokenizer.detokenize(sequence[1:given]), tokenizer.detokenize(sequence[given:]))
        for sequence, given in zip(found.sequences, found.given, strict=True)
    ]


def test_the_context_is_given_and_the_choice_scored(tmp_path: Path) -> None:
    tokenizer = letters()
    lines = [question("two and two are", [" four", " five"], 0, id=7), "", question("ab", ["abc", "abd"], "abd")]
    task = load_task(write(tmp_path / "task.jsonl", *lines), tokenizer, 64)
    assert parts(tokenizer, task.questions[0]) == [("two and two are", " four"), ("two and two are", " five")]
    # What the choices have in common is theirs: it counts in each, and in the number of their tokens.
    assert parts(tokenizer, task.questions[1]) == [("ab", "abc"), ("ab", "abd")]
    assert [each.answer for each in task.questions] == [0, 1]
    assert len(task.rows) == 4 and longest(task) == len("two and two are") + 5


def test_a_choice_that_changes_the_contexts_last_token_does_not_change_the_rules(tmp_path: Path) -> None:
    """`t` + `he` becomes `the`; the `t` of the other choice is then scored as well: both score the same text."""
    tokenizer = letters("the")
    task = load_task(write(tmp_path / "task.jsonl", question("a t", ["he", "in"])), tokenizer, 64)
    assert parts(tokenizer, task.questions[0]) == [("a ", "the"), ("a ", "tin")]
    assert [len(sequence) for sequence in task.questions[0].sequences] == [4, 6]


def test_a_gap_in_the_middle_is_filled_into_the_context(tmp_path: Path) -> None:
    tokenizer = letters("the")
    fields = question(["by the boy", "by a t"], [" it is", "he is"], 1)
    (found,) = load_task(write(tmp_path / "task.jsonl", fields), tokenizer, 64).questions
    assert parts(tokenizer, found) == [("by the boy", " it is"), ("by a ", "the is")]


def test_an_empty_context_leaves_the_start_token(tmp_path: Path) -> None:
    tokenizer = letters()
    path = write(tmp_path / "task.jsonl", question("", ["ab", "cd"]))
    assert parts(tokenizer, load_task(path, tokenizer, 64).questions[0]) == [("", "ab"), ("", "cd")]


def test_with_a_real_tokenizer_all_text_comes_back(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path / "tokenizer.model")
    path = write(tmp_path / "task.jsonl", question("def encode(self", [", value):", " value ("], 0))
    (found,) = load_task(path, tokenizer, 64).questions
    texts = [tokenizer.detokenize(sequence[1:]) for sequence in found.sequences]
    assert texts == ["def encode(self, value):", "def encode(self value ("]
    assert len(set(found.given)) == 1 and 1 < found.given[0] < min(len(sequence) for sequence in found.sequences)


GOOD = question("a", ["b", "c"])
REFUSED = [
    ("{", "is not JSON"),
    ([1], "is not a question"),
    ({"context": "a", "choices": ["b", "c"]}, "is not a question"),
    (question(3, ["b", "c"]), "has context=3, which must be text"),
    (question(["a"], ["b", "c"]), "has context=['a'], which must be text, or a list of as many texts as there are"),
    (question(["a", 1], ["b", "c"]), "has context=['a', 1], which must be"),
    (question(["a", "a"], ["b", "b"]), "has two choices of the same text"),
    (question(["a", "d"], ["b", "b"], "b"), "has answer='b', which must be an index"),
    (question("a", ["b"]), "has choices=['b'], which must be a list of two or more texts"),
    (question("a", "bc"), "has choices='bc', which must be"),
    (question("a", "b" * 99), "bbb...bbb"),
    (question("a", ["b", 1]), "has choices=['b', 1], which must be"),
    (question("a", ["b", "b"]), "has two choices of the same text"),
    (question("a", ["b", "c"], 2), "has answer=2, which must be an index from 0 to 1 or one of the choices"),
    (question("a", ["b", "c"], -1), "has answer=-1"),
    (question("a", ["b", "c"], True), "has answer=True"),
    (question("a", ["b", "c"], "d"), "has answer='d'"),
    (question("a", ["b", ""]), "has the choice '', which has no tokens to score"),
    (question("a", ["b", "##"]), "has the choice '##', which has no tokens to score"),
    (question("a" * 63, ["b", "cd"]), "has 65 tokens of context and choice, more than max_position_embeddings=64"),
]


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: Any, words: str) -> None:
    path = write(tmp_path / "task.jsonl", GOOD, line)
    with refuses("importance.multiple_choice", f"{path}, line 2", words):
        load_task(path, letters(), 64)


@pytest.mark.parametrize(("content", "words"), [(b"", "holds no questions"), (b" \n", "holds no"), (b"\xff", "UTF-8")])
def test_a_file_without_questions_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path, none = tmp_path / "task.jsonl", tmp_path / "none.jsonl"
    path.write_bytes(content)
    with refuses("importance.multiple_choice", path, words):
        load_task(path, letters(), 64)
    with refuses("importance.multiple_choice", none, "cannot be read"):
        load_task(none, letters(), 64)


def test_as_many_tokens_as_the_model_has_positions_are_allowed(tmp_path: Path) -> None:
    assert longest(load_task(write(tmp_path / "task.jsonl", question("a" * 63, ["b", "c"])), letters(), 64)) == 64


TASK = Task(
    (
        Question(((1, 2, 3), (1, 2, 4, 5, 6)), (2, 2), 0),
        Question(((1, 7), (1, 8), (1, 9)), (1, 1, 1), 2),
        Question(((1, 2, 3, 4, 5, 6), (1, 9)), (1, 1), 1),
    ),
    "",
)


def test_the_likeliest_choice_is_taken_and_the_first_of_equal_ones() -> None:
    assert accuracy(TASK, numpy.array([-1.0, -2, -3, -4, -2, -9, -1])) == 1
    assert accuracy(TASK, numpy.array([-2.0, -1, -2, -4, -3, -9, -1])) == pytest.approx(1 / 3)
    assert accuracy(TASK, numpy.array([-1.0, -1, -2, -2, -2, -9, -9])) == pytest.approx(1 / 3), "ties: the first"


def test_by_the_token_a_long_choice_is_at_no_disadvantage() -> None:
    values = numpy.array([-1.0, -2.4, -3, -3, -1, -5, -1.5])
    assert accuracy(TASK, values) == 1
    assert accuracy(TASK, values, normalized=True) == pytest.approx(1 / 3), "-0.8 beats -1, and -1 beats -1.5"


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("size", "group"), [(1, 2), (2, 1), (4, 16)])
def test_every_input_goes_to_one_rank_once(ranks: int, size: int, group: int) -> None:
    inputs = Inputs.of(TASK.rows)
    assert inputs.readers == [[0], [1], [2, 3, 4, 6], [5]], "choices of one token after the same context share a pass"
    by_rank = [
        [
            [*batch]
            for batch in input_batches(
                inputs.sequences, size, group, 4, data_parallel_rank=rank, data_parallel_size=ranks
            )
        ]
        for rank in range(ranks)
    ]
    seen = []
    for lists in zip(*by_rank, strict=True):
        assert len({len(batch) for batch in lists}) == 1
        shapes = {microbatch.tokens.shape for batch in lists for microbatch in batch}
        ((rows, length),) = shapes
        assert rows == size and length % 4 == 0
        for microbatch in (microbatch for batch in lists for microbatch in batch):
            for number, tokens, valid in zip(microbatch.samples, microbatch.tokens, microbatch.valid, strict=True):
                if not valid:
                    continue
                sequence = inputs.sequences[int(number)]
                seen.append(int(number))
                assert tokens[: len(sequence)].tolist() == [*sequence]
    assert sorted(seen) == list(range(4))
