"""Tasks of the LM Evaluation Harness on the sharded model, at every layout, against its own `hf` model of the exported
folder: the same log-likelihoods of every sample, the same choices, texts and scores.

Tolerance: 1e-4 of a log-likelihood, in fp32 (3e-6 was seen), as matrix products are summed in another order.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.evaluation.harness.names import asked_tasks
from tests import warm
from tests.distributed.evaluation.harness_case import ALL, POSITIONS, TASKS, WINDOW, make_case, samples
from tests.distributed.evaluation.killed_asking import counting
from tests.distributed.ranks import run_on_ranks
from tests.e2e.launchers import environment
from tests.e2e.verbs import command_on_rank, commands_on_rank, one_process_group
from tests.refusals import refuses

TOLERANCE = 1e-4
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"one": []},
    2: {
        "tensor": ["parallel.tensor=2", "evaluate.micro_batch_size=2"],
        "sequence": ["parallel.tensor=2", "parallel.sequence=true"],
        "pipeline": ["parallel.pipeline=2", "evaluate.micro_batch_size=1"],
        "data": [],
    },
    4: {"tensor-pipeline": ["parallel.tensor=2", "parallel.pipeline=2"]},
}
LIMIT = 9


def evaluate(root: Path, name: str, *more: str, tasks: Any = ALL) -> list[str]:
    words = [
        "evaluate",
        f"checkpoint={root}/ours",
        f"results={root}/{name}.json",
        f"evaluate.tasks=[{','.join(tasks)}]",
    ]
    words += [f"data.valid={root}/email_text_document", "data.sequence_length=32", "evaluate.samples=4"]
    words += [f"evaluate.task_folder={root}/tasks", f"evaluate.limit={LIMIT}", "evaluate.micro_batch_size=8"]
    return [*words, *([f"evaluate.text={root}/text.jsonl"] if "minitron_perplexity" in tasks else []), *more]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The case, imported, exported, and evaluated at every layout; `both` holds the checkpoint and the folder."""
    root = tmp_path_factory.mktemp("harness")
    make_case(root)
    both = ["checkpoint=null", f"checkpoints.one={root}/ours", f"checkpoints.exported={root}/exported"]
    convert = [["import", f"hf={root}/hf", f"checkpoint={root}/ours"]]
    convert += [["export", f"checkpoint={root}/ours", f"hf={root}/exported"]]
    shown = run_well(1, [*convert, evaluate(root, "both", *both)])
    (root / "shown.txt").write_text(shown[-1])
    for world_size in (2, 4):
        run_well(world_size, [evaluate(root, name, *more) for name, more in LAYOUTS[world_size].items()])
    return root


def run_well(world_size: int, commands: list[list[str]]) -> list[str]:
    """What the first rank showed of each."""
    ranks = run_on_ranks(commands_on_rank, world_size, commands, timeout=280.0)
    for results in ranks:
        for words, (code, shown) in zip(commands, results, strict=True):
            assert code == 0, (words, shown)
    return [shown for _, shown in ranks[0]]


def table(root: Path, name: str) -> Any:
    return json.loads((root / f"{name}.json").read_text())


def responses(sample: dict[str, Any]) -> list[Any]:
    """(log-likelihood, greedy) of every choice, a log-likelihood, or a text."""
    return [json.loads(each) if isinstance(each, str) and each[:1] in "[(" else each for each in flat(sample["resps"])]


def flat(nested: Any) -> list[Any]:
    is_pair = isinstance(nested, list) and len(nested) == 2 and isinstance(nested[1], bool | str)
    if is_pair or not isinstance(nested, list):
        return [nested]
    return [each for inner in nested for each in flat(inner)]


@pytest.mark.parametrize("name", ["one", *LAYOUTS[2], *LAYOUTS[4]])
def test_every_sample_as_the_harness_has_it_of_the_exported_folder(root: Path, name: str) -> None:
    folder = root / "both_lm_eval" / "one" if name == "one" else root / f"{name}_lm_eval" / "ours"
    ours, theirs = samples(folder), samples(root / "both_lm_eval" / "exported")
    assert {task: len(rows) for task, rows in ours.items()} == {
        "tiny_choice": 9,
        "tiny_letter": 9,
        "tiny_text": 6,
        "tiny_answer": 6,
        "minitron_continuation": LIMIT,
        "minitron_perplexity": LIMIT,
    }
    for task, rows in ours.items():
        for mine, other in zip(rows, theirs[task], strict=True):
            assert mine["arguments"] == other["arguments"]
            for one, reference in zip(responses(mine), responses(other), strict=True):
                if isinstance(reference, list):
                    assert math.isclose(float(one[0]), float(reference[0]), rel_tol=TOLERANCE), (task, mine["doc_id"])
                    assert one[1] == reference[1]
                elif task == "tiny_answer":
                    assert one == reference
                else:
                    assert math.isclose(float(one), float(reference), rel_tol=TOLERANCE), (task, mine["doc_id"])
    scores = table(root, "both")["models"]["exported"]["tasks"]
    found = table(root, "both")["models"]["one"] if name == "one" else table(root, name)
    assert found["tasks"].keys() == scores.keys()
    for task, score in scores.items():
        for metric, reference in score["metrics"].items():
            one = found["tasks"][task]["metrics"][metric]
            exact = metric.startswith(("acc", "exact"))
            assert math.isclose(one["value"], reference["value"], rel_tol=0 if exact else 5e-3), (task, metric)
    assert math.isclose(found["lm loss"], table(root, "both")["models"]["exported"]["lm loss"], rel_tol=1e-5)


def test_the_case_can_tell_models_apart(root: Path) -> None:
    """Some of the continuations are greedy and some are not, contexts are cut, texts differ, choices are right and
    wrong: else the comparison would prove little."""
    theirs = samples(root / "both_lm_eval" / "exported")
    assert {sample["acc"] for sample in theirs["tiny_choice"]} == {0.0, 1.0}
    assert len({str(sample["resps"]) for sample in theirs["tiny_answer"]}) > 3
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "hf")
    asked = [sample["arguments"][0][0] for task in ("tiny_choice", "tiny_letter") for sample in theirs[task]]
    lengths = [len(tokenizer.encode(context)) for context in asked]
    assert min(lengths) < POSITIONS < max(lengths)


def test_the_table_shows_both_and_their_difference(root: Path) -> None:
    shown, results = (root / "shown.txt").read_text(), table(root, "both")
    assert "it/s" not in shown and "WARNING" not in shown, "the harness is silent"
    (head,) = [line for line in shown.splitlines() if line.startswith("task ")]
    assert head.split()[-5:] == ["one", "exported", "exported", "−", "one"]
    difference = results["differences"]["exported"]["tasks"]["tiny_choice"]["acc"]
    assert difference == {"difference": 0.0, "stderr": 0.0}, "paired: both are right and wrong on the same documents"
    own = results["models"]["one"]["tasks"]["tiny_choice"]
    assert own["shots"] == 2 and own["documents"] == 9 and own["metrics"]["acc"]["stderr"] > 0
    theirs = json.loads((root / "both_lm_eval" / "exported" / "results.json").read_text())
    assert theirs["results"]["tiny_choice"]["acc_norm,none"] == own["metrics"]["acc_norm"]["value"]
    assert theirs["n-shot"]["tiny_choice"] == 2 and theirs["config"]["limit"] == LIMIT


def interrupted_on_rank(words: list[str]) -> tuple[int, int]:
    """The command, broken off in its fourth request, then run whole, then once more: the requests of the last two."""
    with counting(breaks_at=4) as asked, one_process_group(), pytest.raises(KeyError, match="broken off"):
        command_on_rank(words)
    assert len(asked) == 4
    found = []
    for _ in range(2):
        with counting() as asked, one_process_group():
            code, shown = command_on_rank(words)
        assert code == 0, shown
        found.append(sum(asked))
    return found[0], found[1]


def test_broken_off_and_run_again_it_asks_for_what_is_missing(root: Path) -> None:
    ((rest, again),) = run_on_ranks(interrupted_on_rank, 1, small(root, "broken"))
    check_resumed(root, "broken", rest)
    assert again == 0


@pytest.mark.slow
def test_killed_and_run_again_it_asks_for_what_is_missing(root: Path, tmp_path: Path) -> None:
    module = "tests.distributed.evaluation.killed_asking"
    killed = warm.start(module, ["4", *small(root, "killed")], output=tmp_path / "log", env=environment())
    assert killed.wait(timeout=250) == -signal.SIGKILL, (tmp_path / "log").read_text()
    ((code, shown, asked),) = run_on_ranks(counted_on_rank, 1, small(root, "killed"))
    assert code == 0, shown
    check_resumed(root, "killed", asked)


def small(root: Path, name: str) -> list[str]:
    return evaluate(root, name, "data.sequence_length=8", "evaluate.micro_batch_size=1", tasks=TASKS)


def counted_on_rank(words: list[str]) -> tuple[int, str, int]:
    with counting() as asked:
        code, shown = command_on_rank(words)
    return code, shown, sum(asked)


def check_resumed(root: Path, name: str, asked: int) -> None:
    """Less was asked than there is, and the scores are those of an evaluation in one piece."""
    whole = samples(root / "both_lm_eval" / "one")
    rows = sum(len(sample["arguments"]) for task in whole if task.startswith("tiny") for sample in whole[task])
    assert 0 < asked < rows
    scores = table(root, "both")["models"]["one"]["tasks"]
    for task, found in table(root, name)["tasks"].items():
        for metric, score in found["metrics"].items():
            assert math.isclose(score["value"], scores[task]["metrics"][metric]["value"], rel_tol=5e-3), (task, metric)


def test_rolling_perplexity_is_the_loss_on_the_same_tokens(root: Path) -> None:
    window = [f"data.valid={root}/window", f"data.sequence_length={WINDOW}", "evaluate.samples=1", "evaluate.limit=1"]
    run_well(1, [evaluate(root, "window", *window, tasks=["tiny_text"])])
    (sample,) = samples(root / "window_lm_eval" / "ours")["tiny_text"]
    (total,) = responses(sample)
    assert math.isclose(-float(total) / WINDOW, table(root, "window")["lm loss"], rel_tol=1e-6)


# (keys beside those of a command that works, in what is refused, in its sentence)
REFUSALS: list[tuple[list[str], str]] = [
    (["evaluate.tasks=[helaswag]"], "evaluate.tasks=helaswag is no task of the LM Evaluation Harness, nor of"),
    (["evaluate.tasks=[helaswag]"], "did you mean hellaswag?"),
    (["evaluate.tasks=[tiny_chioce:3]"], "did you mean tiny_choice?"),
    (["evaluate.tasks=[tiny_letter,tiny_letter:2]"], "=tiny_letter:2 asks for tiny_letter twice: name it once"),
    (["evaluate.tasks=[tiny_letter,tiny_all]"], "evaluate.tasks=tiny_all asks once more for tiny_letter"),
    (["evaluate.tasks=[hellaswag:10]"], "evaluate.tasks=hellaswag needs the data set Rowan/hellaswag, which is not in"),
    (["evaluate.tasks=[mmlu]"], "evaluate.tasks=mmlu needs the data set "),
    (["evaluate.tasks=[humaneval]"], "evaluate.tasks=humaneval runs the programs that a model writes, which is not"),
    (["evaluate.tasks=[minitron]"], "or name minitron_continuation or minitron_perplexity, which need none"),
    (["evaluate.tasks=[tiny_torn]"], "evaluate.tasks=tiny_torn cannot be loaded: "),
    (
        ["evaluate.tasks=[tiny_long]"],
        "evaluate.tasks asks for 64 new tokens, and the model's max_position_embeddings is 64",
    ),
    (["evaluate.task_folder=@/none"], "evaluate.task_folder=@/none is not a folder"),
    (
        ["evaluate.tasks=[minitron_continuation]", "data.valid=null"],
        "=minitron_continuation is made from held-out text",
    ),
    (["evaluate.text=@/text.jsonl"], "evaluate.text=@/text.jsonl has no effect with these evaluate.tasks"),
    (["evaluate.tasks=[minitron_perplexity]", "evaluate.text=@/none.txt"], "evaluate.text=@/none.txt does not exist"),
    (
        ["evaluate.tasks=[minitron_continuation]", "evaluate.text=@/few.txt"],
        "=minitron_continuation needs at least 4 held-out documents of 60 characters, and there are 1",
    ),
    (["evaluate.tasks=[]"], "evaluate.task_folder=@/tasks has no effect without evaluate.tasks"),
    (["evaluate.limit=2.5"], "evaluate.limit=2.5 is neither a whole number nor below 1"),
    (["checkpoint=null", "checkpoints.a=@/ours", "checkpoints.b=@/exported", "results=null"], "results is not given"),
    (["checkpoint=@/exported", "results=null"], "results is not given: name the file to write"),
    (["checkpoint=@/bare"], "tokenizer.model=@/bare holds neither tokenizer.json nor tokenizer.model"),
]


def refused_on_rank(commands: list[list[str]]) -> list[tuple[int, str, float]]:
    """As on a machine without a network; the seconds that it took, too."""
    import huggingface_hub.constants

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    with one_process_group(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr("socket.create_connection", unreachable)
        found = []
        for words in commands:
            started = time.process_time()
            code, shown = command_on_rank(words)
            found.append((code, shown, time.process_time() - started))
    return found


def test_what_cannot_be_is_refused_in_one_sentence(root: Path) -> None:
    (root / "few.txt").write_text("One document of a few words and no more than that, but for these here.")
    (root / "tasks" / "torn.yaml").write_text("task: tiny_torn\noutput_type: multiple_choice\n")
    long = (root / "tasks" / "tiny_answer.yaml").read_text().replace("tiny_answer\n", "tiny_long\n", 1)
    (root / "tasks" / "long.yaml").write_text(long.replace("max_gen_toks: 12", "max_gen_toks: 64"))
    (root / "bare").mkdir()
    (root / "bare" / "config.json").write_text((root / "hf" / "config.json").read_text())
    commands = [
        [word.replace("@", str(root)) for word in (*evaluate(root, "refused", tasks=["tiny_letter"]), *more)]
        for more, _ in REFUSALS
    ]
    (found,) = run_on_ranks(refused_on_rank, 1, commands)
    for (more, words), (code, shown, seconds) in zip(REFUSALS, found, strict=True):
        assert code == 2 and words.replace("@", str(root)) in shown, (more, shown)
        assert "Traceback" not in shown and seconds < 20, (more, shown)
    assert not (root / "refused.json").exists()


def test_without_the_harness_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refuses("evaluate.tasks", ["hellaswag"], "is not installed", "pip install 'minitron-mcore[eval]'"):
        asked_tasks(["hellaswag"], None, None)


def led_on_rank(kind: str) -> Any:
    from minitron_mcore.errors import InputError
    from minitron_mcore.runtime.agree import led
    from minitron_mcore.runtime.start import start

    rank, seen = start().rank, []

    def do(request: int) -> int:
        seen.append(request)
        return request * 10 + rank

    def work(ask: Callable[[int], int]) -> Any:
        found = [ask(1), ask(2)]
        if kind == "fails":
            raise InputError("key", 3, "is refused")
        return found

    try:
        return led(work, do), seen
    except InputError as error:
        return str(error), seen


def test_what_the_first_rank_asks_every_rank_does_and_its_failure_is_everyones() -> None:
    assert run_on_ranks(led_on_rank, 2, "works") == [([10, 20], [1, 2])] * 2
    assert run_on_ranks(led_on_rank, 2, "fails") == [("key=3 is refused", [1, 2])] * 2
