"""The stages that the campaign disturbs, each a command as it is typed, and what they read and leave. Pure."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

WORDS = ("prune", "distil", "score", "plan")
SEQUENCE, BATCH = 32, 4


@dataclass(frozen=True)
class Stage:
    """`words`: the command, in which `@` is the folder of the inputs, where every stage has what it leaves undisturbed
    in a folder of its name, and `%` the folder that this one writes.

    trains: it iterates, and saves on the way. reads: what of the inputs it reads, as far as it is damaged.
    """

    name: str
    words: tuple[str, ...]
    ranks: int = 1
    trains: bool = False
    reads: tuple[str, ...] = ()

    def command(self, inputs: Path, folder: Path, *more: str) -> list[str]:
        verb, *keys = self.words
        given = [key.replace("@", str(inputs)).replace("%", str(folder)) for key in (*keys, "data.cache_path=%/index")]
        return [verb, "--config", str(inputs / "recipe.yaml"), *given, *more]


TOKENIZER, TEXT = "tokenizer.model=@/tokenizer/tokenizer.model", "data.train=@/preprocess/tokens_text_document"
TOKENS, MODEL, STUDENT, TARGETS = "preprocess", "train/model", "prune/student", "cache/targets"
TEACHER, SMALLER = f"teacher.checkpoint=@/{MODEL}", ("student.num_layers=2", "student.ffn_hidden_size=64")
# In an order in which each reads only what those before it leave.
STAGES = {
    stage.name: stage
    for stage in (
        Stage("tokenizer", ("tokenizer", "input=@/text", "tokenizer.model=%/tokenizer.model")),
        Stage("preprocess", ("preprocess", "input=@/text", "preprocess.output_prefix=%/tokens", TOKENIZER)),
        Stage("train", ("train", "train.checkpoint=%/model", TOKENIZER, TEXT), 2, True, (TOKENS,)),
        Stage("export", ("export", f"checkpoint=@/{MODEL}", "hf=%/hf", TOKENIZER), reads=(MODEL,)),
        Stage("import", ("import", "hf=@/export/hf", "checkpoint=%/model"), 2, reads=("export/hf",)),
        Stage("score", ("score", TEACHER, "scores=%/scores.safetensors", TOKENIZER, TEXT), 2, reads=(MODEL, TOKENS)),
        Stage(
            "prune",
            (
                *("prune", TEACHER, "scores=@/score/scores.safetensors", "student.checkpoint=%/student"),
                *("parallel.tensor=2", *SMALLER),
            ),
            2,
            reads=(MODEL, "score"),
        ),
        Stage("cache", ("cache", TEACHER, "cache.folder=%/targets", TOKENIZER, TEXT), 2, reads=(MODEL, TOKENS)),
        Stage("correct", ("correct", TEACHER, "correct.checkpoint=%/corrected", TOKENIZER, TEXT), 1, True, (MODEL,)),
        Stage(
            "distill",
            (
                *("distill", TEACHER, f"student.checkpoint=@/{STUDENT}", "distill.checkpoint=%/distilled"),
                *("distill.async_save=true", "parallel.tensor=2", TOKENIZER, TEXT),
            ),
            2,
            True,
            (MODEL, STUDENT, TOKENS),
        ),
        Stage(
            "distill-cached",
            (
                *("distill", f"distill.teacher=cache:@/{TARGETS}", f"student.checkpoint=@/{STUDENT}"),
                *("distill.checkpoint=%/distilled", TOKENIZER, TEXT),
            ),
            1,
            True,
            (TARGETS, STUDENT),
        ),
        Stage(
            "align",
            (
                *("align", f"align.load=@/{MODEL}", "align.checkpoint=%/aligned", "chat.train=@/chats/chats.jsonl"),
                *("align.stages.dpo.chat.train=@/chats/pairs.jsonl", "data.sequence_length=128", TOKENIZER),
            ),
            2,
            True,
            (MODEL, "chats"),
        ),
        Stage(
            "evaluate",
            ("evaluate", f"checkpoint=@/{MODEL}", "results=%/results.json", TOKENIZER, TEXT),
            2,
            reads=(MODEL,),
        ),
        Stage("generate", ("generate", f"checkpoint=@/{MODEL}", "generate.output=%/written.jsonl", TOKENIZER)),
        Stage("search", ("search", TEACHER, "output=%/search", TOKENIZER, TEXT), 1, True, (MODEL, TOKENS)),
        Stage("ablate", ("ablate", TEACHER, "output=%/ablation", TOKENIZER, TEXT, *SMALLER), 2),
        Stage("run", ("run", "output=%/run", "input=[@/text]", *SMALLER), 2, True),
    )
}


def sections() -> dict[str, Any]:
    """The recipe of all stages: small models, trainings of a few iterations that save at every other one."""
    # Of every training: eight iterations.
    trained = {"tokens": 8 * BATCH * SEQUENCE, "global_batch_size": BATCH, "micro_batch_size": 2, "lr": 1e-2}
    trained |= {"save_interval": 2, "keep_last": 2, "eval_interval": 4, "eval_iters": 1}
    rounds = {"epochs": 1, "global_batch_size": BATCH, "lr": 1e-3, "min_lr": 1e-4, "save_interval": 1, "keep_last": 2}
    return {
        "name": "faults",
        "tokenizer": {"vocab_size": 400, "extensions": [".py"]},
        "preprocess": {"extensions": [".py"], "workers": 1},
        "data": {"sequence_length": SEQUENCE, "num_workers": 0, "split": "9,1"},
        "model": {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 96, "num_attention_heads": 4}
        | {"num_query_groups": 2, "kv_channels": 8, "max_position_embeddings": 256, "rotary_base": 10000.0},
        "importance": {"num_samples": 8, "micro_batch_size": 2},
        "train": trained,
        "correct": trained,
        "distill": trained,
        "cache": {"shard_samples": 8},
        "chat": {"template": "chatml"},
        "evaluate": {"samples": 8, "micro_batch_size": 2},
        "generate": {"prompt": "def ", "max_new_tokens": 8},
        "search": {"ffn_hidden_size": [64], "num_layers": [2, 3], "tokens": 4 * BATCH * SEQUENCE},
        "ablate": {"aggregations": ["l2/mean", "mean/var"], "methods": ["activation", "random"]}
        | {"layers": ["contiguous"], "depth_metrics": ["lm_loss"]},
        "run": {"baselines": []},
        "align": {**rounds, "stages": {"sft": {}, "dpo": {"method": "dpo"}}},
        "log": {"interval": 1, "wandb": "disabled", "tensorboard": False, "progress": "none"},
    }


def write_inputs(folder: Path) -> None:
    """The text, the chats and the recipe, from which the stages' commands make the rest."""
    for name in ("text", "chats"):
        (folder / name).mkdir(parents=True)
    for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / "json").glob("*.py")):
        (folder / "text" / path.name).write_bytes(path.read_bytes())
    chats, pairs = [], []
    for number in range(24):
        word = f"{WORDS[number % 4]}{number % 7}"
        asked = [{"role": "user", "content": word}]
        answer = [{"role": "assistant", "content": " ".join([word] * (1 + number % 3))}]
        chats.append({"messages": [*asked, *answer]})
        pairs.append({"prompt": asked, "chosen": answer, "rejected": [{"role": "assistant", "content": "plan0"}]})
    for name, records in (("chats", chats), ("pairs", pairs)):
        (folder / "chats" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections(), sort_keys=False))
