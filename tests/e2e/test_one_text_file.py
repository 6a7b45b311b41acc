"""From one plain text file: trained without validation data where none is asked for, refused early where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.distributed.ranks import run_on_ranks
from tests.e2e.verbs import commands_on_rank

LENGTH = 16
SMALL = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
TRAIN = {"tokens": 4 * LENGTH, "global_batch_size": 4, "micro_batch_size": 4, "eval_iters": 1}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    folder = tmp_path_factory.mktemp("one")
    text = "\n\n".join(f"Paragraph {i} says that {i * i % 97} is a number." for i in range(900))
    (folder / "text.txt").write_text(text[:20_000])
    (folder / "long.txt").write_text(text + text)
    recipe = {
        "input": str(folder / "text.txt"),
        "tokenizer": {"model": str(folder / "t.model"), "vocab_size": 300, "input": str(folder / "text.txt")},
        "preprocess": {"workers": 1},
        "data": {"sequence_length": LENGTH, "num_workers": 0},
        "model": SMALL,
        "train": TRAIN,
        "distill": TRAIN,
        "evaluate": {"samples": 2},
        "log": {"interval": 1, "wandb": "disabled", "tensorboard": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    short = f"data.train={folder}/short_text_document"
    long = [f"data.train={folder}/long_text_document", f"data.valid={folder}/long_valid_text_document"]
    fraction = "preprocess.valid_fraction=0.05"
    commands = {
        "tokenizer": ["tokenizer"],
        "preprocess": ["preprocess", f"output_prefix={folder}/short"],
        "preprocess long": ["preprocess", f"input={folder}/long.txt", f"output_prefix={folder}/long", fraction],
        "train": ["train", short, f"train.checkpoint={folder}/unvalidated"],
        "train quietly": ["train", short, "train.eval_iters=0", f"train.checkpoint={folder}/quiet"],
        "train long": ["train", *long, f"train.checkpoint={folder}/validated"],
        "train split": ["train", short, "data.split=90,10,0", f"train.checkpoint={folder}/split"],
        "evaluate": ["evaluate", short, f"checkpoint={folder}/unvalidated"],
        "run": ["run", short, f"output={folder}/run"],
        "run text": ["run", "tokenizer.model=null", f"output={folder}/run text"],
    }
    arguments = [[verb, "--config", str(folder / "recipe.yaml"), *rest] for verb, *rest in commands.values()]
    return folder, dict(zip(commands, run_on_ranks(commands_on_rank, 1, arguments)[0], strict=True))


def validations(folder: Path) -> int:
    return sum("lm loss validation" in json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_trains_without_validation_and_says_so(seen):
    folder, shown = seen
    words = "train: WARNING: there is no validation of the whole blend, because data.valid is not set"
    assert shown["train"][0] == 0 and shown["train"][1].count(words) == 1
    assert shown["train quietly"][0] == 0 and "there is no validation" not in shown["train quietly"][1]
    assert validations(folder / "unvalidated") == validations(folder / "quiet") == 0


def test_a_long_file_has_a_held_out_share(seen):
    folder, shown = seen
    assert "long text files, cut at blank lines: 1, into 5 documents" in shown["preprocess long"][1]
    assert shown["train long"][0] == 0 and "no validation" not in shown["train long"][1]
    assert validations(folder / "validated") == 1


@pytest.mark.parametrize("command", ["train split", "evaluate", "run", "run text"])
def test_refuses_early_where_held_out_text_is_asked_for(seen, command):
    folder, shown = seen
    code, text = shown[command]
    assert code == 2, text
    sentence = text.strip().splitlines()[-1]
    assert "holds 0 tokens in the 0 of its 1 documents that are for valid" in sentence
    assert "give more text (data.valid, or preprocess.valid_fraction)" in sentence
    assert not (folder / "split").exists() and not (folder / "run").exists()
    assert not (folder / "run text" / "teacher").exists()
