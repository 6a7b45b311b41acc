"""`align` as typed: the same numbers at every layout, packed or not; resumed bit for bit; several rounds; wrong input.

Losses in fp32 agree to 1e-5 (relative) over six steps, and gradient norms to 1e-3: the same sums in another order, and
what Adam makes of rounding.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.ranks import run_on_ranks
from tests.e2e.verbs import all_run_well, commands_on_rank, minitron, run_well

WORDS = ("prune", "distil", "score", "plan")
ONE: dict[str, tuple[str, ...]] = {"one rank": (), "micro-batch 4": ("align.micro_batch_size=4",)}
TWO: dict[str, tuple[str, ...]] = {
    "TP2": ("parallel.tensor=2",),
    "TP2-SP": ("parallel.tensor=2", "parallel.sequence=true"),
    "PP2": ("parallel.pipeline=2",),
    "DP2": (),
}
QUICK = {"sft": ["one rank", "PP2"], "dpo": ["one rank", "micro-batch 4", "TP2-SP", "DP2"]}


def chats() -> list[dict[str, Any]]:
    asked = [f"{WORDS[number % 4]}{number % 7}" for number in range(12)]
    return [
        {
            "messages": [
                {"role": "user", "content": word},
                {"role": "assistant", "content": " ".join([word] * (1 + number % 3))},
            ]
        }
        for number, word in enumerate(asked)
    ]


def pairs() -> list[dict[str, Any]]:
    return [
        {
            "prompt": chat["messages"][:1],
            "chosen": chat["messages"][1:],
            "rejected": [{"role": "assistant", "content": WORDS[number % 4] + "0 plan1"}],
            "chosen_reward": 2.0,
            "rejected_reward": number % 3 / 2,
        }
        for number, chat in enumerate(chats())
    ]


@pytest.fixture(scope="module")
def place(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`recipe.yaml`, `chats.jsonl`, `pairs.jsonl`, and `model`, trained for three steps."""
    folder = tmp_path_factory.mktemp("align")
    for name, records in (("chats", chats()), ("pairs", pairs())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sections = {
        "tokenizer": {"model": str(words / "tokenizer.model")},
        "data": {"sequence_length": 128, "num_workers": 0, "split": "1"},
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
        | {"num_query_groups": 2, "kv_channels": 8, "max_position_embeddings": 512, "init_method_std": 0.2},
        "train": {"tokens": 768, "global_batch_size": 4, "eval_iters": 0, "checkpoint": str(folder / "model")},
        "chat": {"train": str(folder / "chats.jsonl"), "template": "chatml"},
        "align": {"load": str(folder / "model"), "epochs": 2, "global_batch_size": 4, "lr": 1e-3, "min_lr": 1e-4},
        "log": {"interval": 1, "wandb": "disabled", "tensorboard": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    text = f"data.train={words / 'tokens_text_document'}"
    all_run_well([["train", "--config", str(folder / "recipe.yaml"), text]])
    return folder


def align(place: Path, to: Path, *keys: str) -> list[str]:
    return ["align", "--config", str(place / "recipe.yaml"), f"align.checkpoint={to}", *keys]


def of_pairs(place: Path, method: str = "dpo") -> tuple[str, ...]:
    return (f"chat.train={place / 'pairs.jsonl'}", f"align.method={method}")


def steps(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.parametrize(
    ("method", "tried"),
    [*QUICK.items(), *(pytest.param(method, [*ONE, *TWO], marks=pytest.mark.slow) for method in QUICK)],
    ids=["sft", "dpo", "sft-all", "dpo-all"],
)
def test_the_same_numbers_at_every_layout(place: Path, tmp_path: Path, method: str, tried: list[str]) -> None:
    """Of the losses themselves, every layout is in tests/distributed/alignment; here, that the verb hands them on."""
    keys = of_pairs(place) if method == "dpo" else ()
    made: dict[str, list[dict[str, Any]]] = {}
    for world_size, known in ((1, ONE), (2, TWO)):
        layouts = {name: known[name] for name in tried if name in known}
        folders = {name: tmp_path / name.replace(" ", "-") for name in layouts}
        all_run_well([align(place, folders[name], *keys, *layouts[name]) for name in layouts], world_size)
        made |= {name: steps(folder) for name, folder in folders.items()}
    whole = made.pop("one rank")
    assert len(whole) == 6 and whole[-1]["loss"] < whole[0]["loss"]
    assert method == "sft" or whole[0]["loss"] == pytest.approx(0.693147, rel=1e-5)
    for name, rows in made.items():
        for row, expected in zip(rows, whole, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5), name
            assert row["grad-norm"] == pytest.approx(expected["grad-norm"], rel=1e-3), name


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(place: Path, tmp_path: Path) -> None:
    """And what was prepared, and the reference, are not worked out again."""
    keys = ["align.save_interval=1", "chat.packing=true", "chat.valid_fraction=0.2", "align.eval_interval=2"]
    keys += ["data.sequence_length=512", "align.global_batch_size=1", "align.epochs=2", "align.eval_iters=1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    all_run_well([align(place, whole, *of_pairs(place), *keys)])
    shutil.copytree(whole, cut)
    newest = max(int(folder.name.removeprefix("iter_")) for folder in cut.glob("iter_*"))
    for number in range(3, newest + 1):
        shutil.rmtree(cut / f"iter_{number:07d}")
    (cut / "latest_checkpointed_iteration.txt").write_text("2")
    shown = run_well(*align(place, cut, *of_pairs(place), *keys))
    assert "resumed" in shown and "at iteration 2" in shown
    kept = ("loss", "rewards/margins", "grad-norm", "logps/chosen")
    for kind in ("train", "validation"):
        ours, theirs = steps(cut, kind), steps(whole, kind)
        assert len(ours) == len(theirs) > 1
        for row, expected in zip(ours, theirs, strict=True):
            same = [name for name in row if name.split(" validation")[0] in kept]
            assert same and [row[name] for name in same] == [expected[name] for name in same]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_what_is_held_out_is_measured_once(place: Path, tmp_path: Path, method: str) -> None:
    """Whatever the sizes of batches: `eval_iters` asks for more than there is, and the same numbers come out as of one
    training step, at a learning rate of 0, over the same rows. 1e-6: sums in another order."""
    held_out, keys = tmp_path / "held-out.jsonl", ["align.lr=0", "align.min_lr=0"]
    records = chats() if method == "sft" else pairs()
    held_out.write_text("".join(json.dumps(record) + "\n" for record in records[:5]))
    keys += [*of_pairs(place), "align.sft_weight=0.1"] if method == "dpo" else []
    once = [*keys, f"chat.train={held_out}", "align.global_batch_size=5", "align.epochs=1"]
    valid = [*keys, f"chat.valid={held_out}", "align.epochs=0.5"]
    packed = ["chat.packing=true", "data.sequence_length=256"]
    sizes = {
        "four": [],
        "two-by-two": ["align.global_batch_size=2", "align.micro_batch_size=2"],
        "eight": ["align.global_batch_size=8", "align.micro_batch_size=4"],
        "packed": [*packed, "align.global_batch_size=2"],
    }
    all_run_well(
        [
            align(place, tmp_path / "once", *once),
            *(align(place, tmp_path / name, *valid, *sizes[name]) for name in sizes),
        ]
    )
    ranks = {"DP2": [], "DP2-eight": sizes["eight"], "PP2": ["parallel.pipeline=2"]}
    all_run_well([align(place, tmp_path / name, *valid, *ranks[name]) for name in ranks], 2)
    (expected,) = steps(tmp_path / "once")
    names = ["loss", "share of counted tokens"]
    names += ["mean length"] if method == "sft" else ["rewards/margins", "logps/rejected", "sft loss"]
    for name in [*sizes, *ranks]:
        row = steps(tmp_path / name, "validation")[-1]
        found = {key: row[f"{key} validation"] for key in names}
        assert found == pytest.approx({key: expected[key] for key in names}, rel=1e-6, abs=1e-6), name


def test_a_budget_that_is_changed_on_the_way(place: Path, tmp_path: Path) -> None:
    """As of every training: more of a constant rate goes on bit for bit, in whatever unit; a rate that decays towards
    the old end does not, nor a round from which another has begun. A reference that has gone is told of."""
    folder, whole, decays = (tmp_path / name for name in ("longer", "whole", "decays"))
    keys = [*of_pairs(place), "align.lr_decay_style=constant"]
    stages: dict[str, dict[str, Any]] = {
        "one": {"epochs": 1, "lr_decay_style": "constant"},
        "two": {
            "method": "dpo",
            "epochs": 1,
            "lr_decay_style": "constant",
            "chat": {"train": str(place / "pairs.jsonl")},
        },
    }

    def walk(**epochs: int) -> list[str]:
        given = {name: {**stage, "epochs": epochs.get(name, 1)} for name, stage in stages.items()}
        return align(place, tmp_path / "rounds", f"align.stages={json.dumps(given)}")

    commands = [
        align(place, folder, *keys, "align.epochs=1"),
        align(place, folder, *keys, "align.epochs=0", "align.samples=24"),
        align(place, whole, *keys, "align.epochs=2"),
        align(place, decays, "align.epochs=1"),
        align(place, decays, "align.epochs=2"),
        align(place, folder, *keys, "align.epochs=1"),
        align(place, folder, *keys, "align.epochs=2", "align.beta=0.2"),
        walk(),
        walk(one=2),
        walk(two=2),
    ]
    ((*results,),) = run_on_ranks(commands_on_rank, 1, commands)
    refused = {
        4: "align.epochs=2.0 cannot replace align.epochs=1.0 after 1536 tokens, because the learning rate",
        5: "align.epochs=1.0 is 3072 tokens, less than the 6144 that align.checkpoint",
        6: "holds another run: align.beta is 0.1 there and 0.2 here",
        8: f"{tmp_path / 'rounds' / 'one'} stands at iteration 3 of 6, but the round two has begun from it already",
    }
    for number, (code, shown) in enumerate(results):
        assert code == (2 if number in refused else 0) and refused.get(number, "") in shown, (commands[number], shown)
    assert "at iteration 3 of 6" in results[1][1] and "at iteration 3 of 6" in results[9][1]
    kept = ("iteration", "loss", "rewards/margins", "grad-norm", "learning-rate")
    ours, theirs = ([[row[name] for name in kept] for row in steps(each)] for each in (folder, whole))
    assert ours == theirs and len(ours) == 6
    assert len(steps(tmp_path / "rounds" / "one")) == 3 and len(steps(tmp_path / "rounds" / "two")) == 6

    lineage = folder / "lineage.yaml"
    said = yaml.safe_load(lineage.read_text())
    lineage.write_text(yaml.safe_dump({**said, "reference": {**said["reference"], "iteration": 1}}))
    code, shown = minitron(*align(place, folder, *keys, "align.epochs=2"))
    assert code == 2 and "was aligned so far against iteration 1 of its reference, which is not in align.load=" in shown


def test_rounds_follow_one_another(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "aligned"
    stages = {
        "sft": {"epochs": 1},
        "rpo-1": {"method": "rpo_bwd_kl", "epochs": 1, "chat": {"train": str(place / "pairs.jsonl")}},
        "rpo-2": {"method": "rpo_bwd_kl", "epochs": 1, "lr": 2e-3, "chat": {"train": str(place / "pairs.jsonl")}},
    }
    # `eta` is for the rounds that have a use for it.
    keys = "align.eta=0.5", f"align.stages={json.dumps(stages)}"
    shown = run_well(*align(place, folder, *keys))
    assert "[3/3] rpo-2" in shown
    assert "done before" in run_well(*align(place, folder, *keys))
    first, second = steps(folder / "rpo-1"), steps(folder / "rpo-2")
    # Each starts as its own reference, which for the second is the model of the first.
    assert first[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert second[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert abs(first[-1]["rewards/margins"]) > 1e-4
    lineage = yaml.safe_load((folder / "rpo-2" / "lineage.yaml").read_text())
    assert lineage["load"] == str(folder / "rpo-1") and lineage["lineage"]["method"] == "rpo_bwd_kl"
    # What is exported writes by the template that it was trained with.
    run_well("export", f"checkpoint={folder / 'rpo-2'}", f"hf={tmp_path / 'hf'}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    text = tokenizer.apply_chat_template(chats()[0]["messages"], tokenize=False)
    assert "<|im_start|>user\nprune0<|im_end|>" in text


def test_a_student_learns_what_its_teacher_says_in_chats(place: Path, tmp_path: Path) -> None:
    """`distill` on the counted tokens of chats, packed at TP2, not packed at PP2; its next-token loss is `sft`'s."""
    scores, student = tmp_path / "scores.safetensors", tmp_path / "student"
    shared = ["--config", str(place / "recipe.yaml"), f"teacher.checkpoint={place / 'model'}", f"scores={scores}"]
    shared += [f"student.checkpoint={student}"]
    pruned = ["student.ffn_hidden_size=32", "importance.method=magnitude"]
    all_run_well([[verb, *shared, *pruned] for verb in ("score", "prune")])
    sizes = [
        f"distill.{key}" for key in ("global_batch_size=4", "lr=1e-3", "min_lr=1e-4", "kd_weight=1", "lm_weight=0")
    ]
    sizes += ["distill.tokens=3072"]

    def distil(name: str, *keys: str) -> list[str]:
        return ["distill", *shared, *sizes, f"distill.checkpoint={tmp_path / name}", *keys]

    packed = ("chat.packing=true", "data.sequence_length=256", "distill.tokens=3072")
    all_run_well(
        [
            distil("one"),
            distil("one-packed", *packed),
            distil("taught", *packed, "distill.correct_teacher=true", f"correct.checkpoint={tmp_path / 'teacher'}"),
            align(place, tmp_path / "sft", f"align.load={student}"),
        ]
    )
    layouts = [distil("two", "parallel.pipeline=2"), distil("two-packed", "parallel.tensor=2", *packed)]
    all_run_well(layouts, 2)
    for kind in ("", "-packed"):
        whole = steps(tmp_path / f"one{kind}")
        assert whole[-1]["logits distillation loss"] < whole[0]["logits distillation loss"]
        for row, expected in zip(steps(tmp_path / f"two{kind}"), whole, strict=True):
            for loss in ("logits distillation loss", "lm loss", "teacher lm loss"):
                assert row[loss] == pytest.approx(expected[loss], rel=1e-5), (kind, loss)
    assert steps(tmp_path / "one")[0]["lm loss"] == pytest.approx(steps(tmp_path / "sft")[0]["lm loss"], rel=1e-6)
    # A teacher that is corrected on the chats on the way begins with the same loss, and ends with a lower one.
    still, corrected = ([row["teacher lm loss"] for row in steps(tmp_path / name)] for name in ("one-packed", "taught"))
    assert corrected[0] == still[0] and corrected[-1] < still[-1]
    assert (tmp_path / "teacher" / "tokenizer" / "chat_template.jinja").is_file()
    code, shown = minitron(*distil("both", f"data.train={place / 'x'}"))
    assert code == 2 and "data.train both name what is learnt from" in shown


BAD = {
    "no budget": ("align.epochs=0", "align.tokens, align.samples, align.epochs are not given"),
    "two budgets": ("align.tokens=1k", "both give the budget"),
    "other keys": ("align.eta=2", "align.eta=2"),
    "phases": ("align.phases=[{tokens: 64}]", "align.phases"),
    "no files": ("chat.train=nowhere.jsonl", "nowhere.jsonl"),
    "own folder": ("align.load=@/aligned", "is align.load's own folder"),
    "a round's own load": ("align.stages={one: {load: x, epochs: 1}}", "align.stages.one.load"),
    "an unknown key of a round": ("align.stages={one: {beat: 1}}", "align.stages.one.beat"),
    "a round's name": ("align.stages={a/b: {epochs: 1}}", "folder's name"),
    "rewards that are missing": ("align.method=rpo_sq", "pairs.jsonl"),
    "context": ("parallel.context=2", "chat.packing"),
}


def test_wrong_input_is_one_sentence(place: Path, tmp_path: Path) -> None:
    commands = []
    for key, _ in BAD.values():
        keys = [key.replace("@", str(tmp_path))]
        if key == "align.method=rpo_sq":
            bare = [{name: value for name, value in pair.items() if "reward" not in name} for pair in pairs()]
            (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bare))
            keys.append(f"chat.train={tmp_path / 'pairs.jsonl'}")
        if "context" in key:
            keys.append("chat.packing=true")
        commands.append(align(place, tmp_path / "aligned", *keys))
    ((*results,),) = run_on_ranks(commands_on_rank, 1, commands)
    for (code, shown), (name, (_, words)) in zip(results, BAD.items(), strict=True):
        assert code == 2 and words in shown and "Traceback" not in shown, (name, shown)
    assert not list(tmp_path.rglob("iter_*"))


ASKED = {"role": "user", "content": "plan1"}
# Thoughts stand before the last answer alone, so that of an earlier one the place is not known.
THINKING = (
    "{% for m in messages %}{{ m.role }} {% if loop.last and m.role == 'assistant' %}thought {% endif %}{{ m.content }}"
    "\n{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def said(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


# Name -> (method, record, template, the rule).
BAD_RECORDS: dict[str, tuple[str, Any, str, str]] = {
    "no key": ("sft", {"text": "plan1"}, "chatml", "has only text, not messages"),
    "an empty answer": ("sft", {"messages": [ASKED, said(" ")]}, "chatml", "has an empty answer: message 2"),
    "an unknown role": ("sft", {"messages": [ASKED, said("plan1", "bot")]}, "chatml", "the unknown role 'bot'"),
    "out of turn": ("sft", {"messages": [ASKED, ASKED, said("plan1")]}, "chatml", "has roles out of turn: message 2"),
    "a template without marks": (
        "sft",
        {"messages": [ASKED, said("plan1"), ASKED, said("plan2")]},
        "@/thinking.jinja",
        "message 2, that cannot be told from the rest",
    ),
    "no rejected": ("dpo", {"prompt": "plan1", "chosen": "plan2"}, "chatml", "has no rejected, only chosen, prompt"),
    "chosen = rejected": (
        "dpo",
        {"prompt": "plan1", "chosen": "plan2", "rejected": "plan2"},
        "chatml",
        "has the same answer as chosen and as rejected",
    ),
    "no rewards": (
        "rpo_fwd_kl",
        {"prompt": "plan1", "chosen": "plan2", "rejected": "plan3"},
        "chatml",
        "has no chosen_reward and no rejected_reward",
    ),
}


def test_records_that_break_a_rule(place: Path, tmp_path: Path, corpus: Path) -> None:
    """Exit code 2, one sentence with key, file, line and rule, before anything is trained; or, by key, left out and
    counted. Whatever is skipped, a damaged file is refused, and so is another tokenizer than the model's."""
    (tmp_path / "thinking.jinja").write_text(THINKING)
    good = {"sft": chats(), "dpo": pairs(), "rpo_fwd_kl": pairs()}
    commands = []
    for name, (method, record, template, _) in BAD_RECORDS.items():
        records = [*good[method][:4], record]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        keys = [f"chat.train={tmp_path / name}.jsonl", f"align.method={method}"]
        keys.append(f"chat.template={template.replace('@', str(tmp_path))}")
        commands.append(align(place, tmp_path / "aligned", *keys))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress((place / "chats.jsonl").read_bytes())[:-20])
    cut = align(place, tmp_path / "aligned", f"chat.train={tmp_path}/cut.jsonl.gz", "chat.bad_records=skip")
    other = align(place, tmp_path / "aligned", f"tokenizer.model={corpus / 'tokenizer.model'}")
    skipped = [*commands[0], "chat.bad_records=skip", "align.epochs=1"]
    ((*results,),) = run_on_ranks(commands_on_rank, 1, [*commands, cut, other, skipped])
    *_, (code, shown) = results
    assert code == 0 and "4 chats of 5 records" in shown and "1 skipped, the first: " in shown, shown
    shutil.rmtree(tmp_path / "aligned")
    for (code, shown), (name, (_, _, _, rule)) in zip(results, BAD_RECORDS.items(), strict=False):
        where = f"chat.train={tmp_path / name}.jsonl, line 5"
        assert code == 2 and where in shown and rule in shown and "chat.bad_records=skip" in shown, (name, shown)
        assert "Traceback" not in shown and len(shown.strip().splitlines()[-1]) > len(where), (name, shown)
    for code, shown in results[-3:-1]:
        assert code == 2 and "Traceback" not in shown, shown
    assert "cut.jsonl.gz is damaged or cut off" in results[-3][1], results[-3]
    assert "is not the tokenizer that" in results[-2][1] and "tokenizer.model=" in results[-2][1], results[-2]


def test_a_dry_run_says_what_would_be_done(place: Path, tmp_path: Path) -> None:
    code, shown = minitron(*align(place, tmp_path / "aligned", *of_pairs(place), "--dry-run"))
    assert code == 0 and "6 iterations of 4 x 256 tokens" in shown and "forecast" in shown, shown
    assert not (tmp_path / "aligned").exists()
