"""What `evaluate` leaves beside a checkpoint, whatever was asked of it in turn, and what it says meanwhile; and the
accuracy that depth is scored by, against the harness's.

Tolerance: 1e-4 of a log-likelihood, in fp32, as in test_harness.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.evaluation.harness_case import POSITIONS, make_case, samples
from tests.distributed.models import start_layout
from tests.distributed.ranks import run_on_ranks
from tests.e2e.verbs import commands_on_rank

TASKS = ["tiny_letter", "minitron_continuation"]
HELD_OUT = {"lm loss", "ppl", "samples", "sequence_length"}


def recorded_on_rank(commands: list[list[str]], results: Path) -> list[tuple[int, str, list[str], Any, list[bool]]]:
    """Of each command the code and what it showed; the titles of its work; what is in the file; and whether that was
    there whenever it was named."""
    from minitron_mcore.runtime.start import Runtime

    found: list[tuple[int, str, list[str], Any, list[bool]]] = []
    titles: list[str] = []
    was_there: list[bool] = []
    show, progress = Runtime.print, Runtime.progress

    def print_and_look(runtime: Runtime, *words: object) -> None:
        was_there.extend(results.is_file() for word in words if f"-> {results}" in str(word))
        show(runtime, *words)

    def titled(runtime: Runtime, total: float | None, unit: str, title: str, **more: Any) -> Any:
        titles.append(title)
        return progress(runtime, total, unit, title, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "print", print_and_look)
        patch.setattr(Runtime, "progress", titled)
        for words in commands:
            titles.clear()
            was_there.clear()
            ((code, shown),) = commands_on_rank([words])
            held = json.loads(results.read_text()) if results.is_file() else {}
            found.append((code, shown, [*titles], held, [*was_there]))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The case, and `short`: documents of which a question fits into the model's positions."""
    root = tmp_path_factory.mktemp("results")
    make_case(root)
    lines = [json.loads(line) for line in (root / "text.jsonl").read_text().splitlines()]
    (root / "short.jsonl").write_text("".join(json.dumps({"text": line["text"][:90]}) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def told(root: Path) -> list[tuple[int, str, list[str], Any, list[bool]]]:
    """Losses; tasks; another task; losses of several models, into the same file; and a prompt."""
    model, text = f"checkpoint={root}/ours", [f"data.valid={root}/email_text_document", "data.sequence_length=32"]
    evaluate, limit = ["evaluate", "evaluate.samples=2", "evaluate.micro_batch_size=2"], "evaluate.limit=12"
    several = [f"checkpoints.{name}={root}/ours" for name in ("one", "two")]
    commands = [
        ["import", f"hf={root}/hf", model],
        [*evaluate, model, *text],
        [*evaluate, model, f"evaluate.tasks=[{TASKS[0]}]", f"evaluate.task_folder={root}/tasks", limit],
        [*evaluate, model, f"evaluate.tasks=[{TASKS[1]}]", f"evaluate.text={root}/short.jsonl", limit],
        [*evaluate, *several, *text, f"results={root}/ours/results.json"],
        ["generate", model, "generate.prompt=a", "generate.max_new_tokens=1"],
        ["generate", *several, "generate.prompt=a", "generate.max_new_tokens=1"],
    ]
    (found,) = run_on_ranks(recorded_on_rank, 1, commands, root / "ours" / "results.json", timeout=280.0)
    for words, (code, shown, *_) in zip(commands, found, strict=True):
        assert code == 0, (words, shown)
    return found


def test_what_was_measured_stays(root: Path, told: list[tuple[int, str, list[str], Any, list[bool]]]) -> None:
    """Beside the same weights; what is said of others goes into a file of its own, and a line says so."""
    losses, task, both, several = (held for _, _, _, held, _ in told[1:5])
    assert losses.keys() >= HELD_OUT and "tasks" not in losses
    for name in HELD_OUT:
        assert task[name] == both[name] == losses[name]
    assert [*task["tasks"]] == TASKS[:1] and [*both["tasks"]] == TASKS
    assert both["tasks"][TASKS[0]] == task["tasks"][TASKS[0]]
    assert several["models"].keys() == {"one", "two"}
    assert json.loads((root / "ours" / "results.before-1.json").read_text()) == both
    assert "results.json; what results.json said of other weights or models is in results.before-1.json" in told[4][1]
    assert all("results.before" not in shown for _, shown, *_ in told[:4])


def test_the_file_is_named_once_it_is_written(told: list[tuple[int, str, list[str], Any, list[bool]]]) -> None:
    assert [was_there for *_, was_there in told] == [[], [True], [True], [True], [True], [], []]


def test_work_on_one_of_several_models_has_its_name(told: list[tuple[int, str, list[str], Any, list[bool]]]) -> None:
    titles = [{*titles} - {"export", "import"} for _, _, titles, _, _ in told[1:]]
    alone, named = {"evaluate"}, {"evaluate: one", "evaluate: two"}
    assert titles == [alone, alone, alone, named, {"generate"}, {"generate: one", "generate: two"}]


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.marker),)


def answers_on_rank(folder: Path) -> list[Any]:
    """What is read of answers as the harness keeps them by itself, a stranger's; and of our own, closed before."""
    from sqlitedict import SqliteDict

    from minitron_mcore.evaluation.harness.running import Answers

    class Model:
        def set_cache_hook(self, hook: Any) -> None:
            self.hook = hook

    with SqliteDict(str(folder / "theirs.db"), autocommit=True) as theirs:
        theirs["question"] = Evil(folder / "marker")
    kept: Any = Answers(Model(), folder / "theirs.db")  # type: ignore[arg-type]
    try:
        found = [kept.dbdict["question"]]
    except ValueError as error:
        found = [type(error).__name__]
    kept.dbdict.close()
    values = {"likelihood": (-0.1, True), "rolling": -1e300 / 3, "text": 'a "b"\n'}
    for _ in range(2):
        kept = Answers(Model(), folder / "ours.db")  # type: ignore[arg-type]
        found.append({name: kept.dbdict[name] for name in kept.dbdict})
        for name, value in values.items():
            kept.lm.hook.dbdict[name] = value
        kept.dbdict.close()
    return [*found[:2], found[2] == values]


def test_answers_are_no_pickles(told: Any, tmp_path: Path) -> None:
    assert run_on_ranks(answers_on_rank, 1, tmp_path) == [["UnicodeDecodeError", {}, True]]
    assert not (tmp_path / "marker").exists()


def scored_on_rank(root: str, files: list[str]) -> list[tuple[float, list[float]]]:
    """By file of questions: the accuracy, and every choice's log-likelihood, as `score` has them."""
    from minitron_mcore.checkpoint.folder import read_architecture
    from minitron_mcore.checkpoint.store import as_chunks, load_model
    from minitron_mcore.data.tokenizer import load_tokenizer
    from minitron_mcore.evaluation.likelihood import log_likelihoods
    from minitron_mcore.evaluation.questions import accuracy, load_task

    layout, checkpoint = start_layout({}, 1), Path(root, "ours")
    architecture = read_architecture(checkpoint)
    chunks: Any = as_chunks(load_model((checkpoint, 0), architecture, layout, "fp32"))
    tokenizer = load_tokenizer(str(checkpoint / "tokenizer"))
    assert tokenizer.bos is not None
    # The mark that the harness has before a text, in place of the one that ends a document here.
    tokenizer, found = dataclasses.replace(tokenizer, eod=tokenizer.bos), []
    for file in files:
        task = load_task(file, tokenizer, POSITIONS)
        sums = log_likelihoods(chunks, task.rows, architecture.vocab_size).sums
        found.append((accuracy(task, sums), sums.tolist()))
    return found


def test_accuracy_is_that_of_the_harness(root: Path, told: list[tuple[int, str, list[str], Any, list[bool]]]) -> None:
    """On the same questions, in a file of ours and as a task of the harness: the same choices, and the same `acc`.

    But for a context that a choice lends another last token: here it is then scored in every choice, there it is given.
    """
    assert told
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(root / "hf").encode
    written, expected = [], []
    for task in TASKS:
        rows = [
            row
            for row in samples(root / "ours" / "results_lm_eval" / "ours")[task]
            if all(
                encode(context + choice)[: len(encode(context))] == encode(context)
                for context, choice in row["arguments"]
            )
        ]
        file = root / f"{task}.questions.jsonl"
        documents = [row["doc"] | {"context": row["arguments"][0][0]} for row in rows]
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        written.append(str(file))
        sums = [float(response[0][0]) for row in rows for response in row["resps"]]
        expected.append((sum(row["acc"] for row in rows) / len(rows), sums))
    (found,) = run_on_ranks(scored_on_rank, 1, str(root), written)
    for task, (share, sums), (acc, theirs) in zip(TASKS, found, expected, strict=True):
        assert len(sums) == len(theirs) >= 20, task
        assert all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(sums, theirs, strict=True)), task
        assert share == pytest.approx(acc) and 0 < acc < 1, task
