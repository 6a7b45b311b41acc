"""`minitron align` as processes that are killed at random moments: the same command goes on, and two rounds, supervised
and of preferences, end where those end that nothing kills, to the last bit.

A moment is a random one among the files that a part of the work touches, as an uninterrupted walk counts them, or so
many seconds after one. What it leaves may be anything; the seed makes it the same again, up to the machine's pace.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_mcore.data.chat.prepared import FACTS, load_prepared
from tests import warm
from tests.distributed.ranks import run_on_ranks
from tests.e2e.launchers import environment, free_port
from tests.e2e.test_align import chats, pairs
from tests.e2e.verbs import all_run_well

ROUNDS = ("sft", "dpo")
STEPS = 6  # of each round: 24 samples, 4 at a time
BLOCK = 8  # segments, of 48
NEVER = "^$ 1 0 SIGKILL"
PATIENCE = 300.0  # seconds of one walk on a busy machine
# Parts of the work, in their order, by what they touch; and how often each is to be killed. `metrics.jsonl` is opened
# when a round begins to train: the moment is within the seconds that the whole round took.
PARTS = [
    ("sft/chats/", 2),
    ("dpo/chats/", 1),
    ("sft/metrics.jsonl", 1),
    (r"sft/\.?(unfinished_)?iter_", 2),
    ("dpo/reference/train$", 1),  # between the rounds
    ("dpo/reference/train/", 2),
    ("dpo/reference/train/reference.npy", 1),
    ("dpo/reference/valid/", 1),
    ("dpo/metrics.jsonl", 1),
    (r"dpo/\.?(unfinished_)?iter_", 2),
]


@dataclass(frozen=True)
class Place:
    root: Path

    def start(self, name: str, ranks: int, moment: str, log: Path) -> list[warm.Process]:
        """`align` into root/NAME on `ranks` ranks as srun starts them; the first is killed at `moment`."""
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        world |= {"MASTER_PORT": free_port(), "BLOCK": str(BLOCK), "FOLDER": str(self.root / name)}
        words = ["align", "--config", str(self.root / "recipe.yaml"), f"align.checkpoint={self.root / name}"]
        return [
            warm.start(
                "tests.e2e.killed_after",
                [*words, f"parallel.tensor={ranks}"],
                output=log.with_suffix(f".rank{rank}.log"),
                env=environment(
                    **world,
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    KILLED_AT=NEVER if rank else moment,
                    TOUCHES=str(log.with_suffix(f".rank{rank}.touches")),
                ),
            )
            for rank in range(ranks)
        ]

    def run(self, name: str, ranks: int, moment: str, log: Path, then: float = 0.0) -> int:
        """The exit code of the first rank. Where that was killed, the others are too, `then` seconds later."""
        processes = self.start(name, ranks, moment, log)
        try:
            code = processes[0].wait(PATIENCE)
            if code == -signal.SIGKILL:
                time.sleep(then)
            else:
                # Outside a training, a signal to one rank alone ends the others by an error.
                codes = [process.wait(PATIENCE) for process in processes[1:]]
                assert all((other == 0) == (code == 0) for other in codes), shown(log)
        finally:
            for process in processes:
                process.kill()
                process.wait(PATIENCE)
        return code


def shown(log: Path) -> str:
    return log.with_suffix(".rank0.log").read_text()


@pytest.fixture(scope="module")
def place(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("align_killed")
    for name, records in (("chats", chats()), ("pairs", pairs())):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 2))
    (root / "held-out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in pairs()[:6]))
    preferences = {"train": str(root / "pairs.jsonl"), "valid": str(root / "held-out.jsonl")}
    align: dict[str, Any] = {"load": str(root / "model"), "epochs": 1, "global_batch_size": 4, "lr": 1e-3}
    align |= {"min_lr": 1e-4, "save_interval": 1, "eval_interval": 2}
    sections = {
        "tokenizer": {"model": str(words / "tokenizer.model")},
        "data": {"sequence_length": 128, "num_workers": 0, "split": "1"},
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
        | {"num_query_groups": 2, "kv_channels": 8, "max_position_embeddings": 512, "init_method_std": 0.2},
        "train": {"tokens": 768, "global_batch_size": 4, "eval_iters": 0, "checkpoint": str(root / "model")},
        "chat": {"train": str(root / "chats.jsonl"), "template": "chatml"},
        "align": {**align, "stages": {"sft": {}, "dpo": {"method": "dpo", "chat": preferences}}},
        "log": {"interval": 1, "wandb": "disabled", "tensorboard": False},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))  # rounds in their order
    text = f"data.train={words / 'tokens_text_document'}"
    all_run_well([["train", "--config", str(root / "recipe.yaml"), text]])
    return Place(root)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def references(folder: Path) -> dict[str, Any]:
    """By file, but for which weights gave the numbers: files of equal tensors may differ."""
    found: dict[str, Any] = files_of(folder / "reference")
    for name in filter(lambda name: name.endswith(".json"), found):
        said = json.loads(found[name])
        assert said["values"] and not said["blocks"]
        found[name] = {**said, "facts": {**said["facts"], "weights": None}}
    return found


def logged(folder: Path) -> list[dict[str, Any]]:
    """Every number that follows from the training, each iteration and kind once."""
    rows = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    keys = [(row["iteration"], row["kind"]) for row in rows]
    assert len(set(keys)) == len(keys), keys
    timed = ("time", "-share", "(ms)", "per second", "per GPU", "memory", "utilization", "slowest rank")
    return [{name: value for name, value in row.items() if not any(word in name for word in timed)} for row in rows]


def states_on_rank(folders: list[str]) -> list[dict[str, Any]]:
    """Every weight and the optimizer's state."""
    import torch
    from megatron.core import dist_checkpointing

    from minitron_mcore.runtime.start import start

    start()
    states = [dist_checkpointing.load_plain_tensors(f"{folder}/iter_{STEPS:07d}") for folder in folders]
    return [{key: value for key, value in state.items() if isinstance(value, torch.Tensor)} for state in states]


def check_prepared(folder: Path, whole: Path) -> None:
    """What has the name of a prepared folder is whole, whenever the walk was killed."""
    for facts in folder.glob(f"*/chats/*/{FACTS}"):
        if facts.parent.suffix != ".partial":
            load_prepared(facts.parent)
            assert files_of(facts.parent) == files_of(whole / facts.parent.relative_to(folder))


def moments(touches: list[str], seconds: dict[str, float], seed: int) -> list[str]:
    """KILLED_AT of each start: of every part of the work some random ones."""
    draw, found = random.Random(seed), []
    for pattern, times in PARTS:
        count = sum(bool(re.search(pattern, path)) for path in touches)
        assert count, pattern
        if pattern.endswith("metrics.jsonl"):
            delays = sorted(draw.uniform(0.1, 0.8) * seconds[pattern.partition("/")[0]] for _ in range(times))
            found += [f"{pattern} 1 {delay:.3f} SIGKILL" for delay in delays]
        else:
            # In the first part of what is left, since a walk that goes on touches less than the whole one.
            most = max(1, count // (2 * times))
            found += [f"{pattern} {draw.randint(1, most)} 0 SIGKILL" for _ in range(times)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "seed"), [(1, 1), (2, 2)], ids=["one", "TP2"])
def test_killed_at_random_moments(place: Place, ranks: int, seed: int, tmp_path: Path) -> None:
    name, whole_name = f"killed-{ranks}", f"whole-{ranks}"
    folder, whole = place.root / name, place.root / whole_name
    log = tmp_path / "whole"
    assert place.run(whole_name, ranks, NEVER, log) == 0, shown(log)
    touches = log.with_suffix(".rank0.touches").read_text().splitlines()
    seconds = {}
    for each in ROUNDS:
        times = [json.loads(line)["time"] for line in (whole / each / "metrics.jsonl").read_text().splitlines()]
        seconds[each] = times[-1] - times[0]
    draw, killed = random.Random(seed), []
    for number, moment in enumerate(moments(touches, seconds, seed)):
        log = tmp_path / f"killed-{number}"
        code = place.run(name, ranks, moment, log, then=draw.uniform(0, 0.5))
        assert code in (0, -signal.SIGKILL), shown(log)
        killed += [moment] if code else []
        done = log.with_suffix(".rank0.touches").read_text().splitlines()
        print(f"{moment}: {code}, {len(done)} touches", *done[-1:], flush=True)
        check_prepared(folder, whole)
    log = tmp_path / "last"
    code = place.run(name, ranks, NEVER, log)
    assert code == 0, shown(log)
    print(f"killed {len(killed)} times:", *killed, sep="\n  ")
    assert len(killed) >= 8

    for each in ROUNDS:
        assert logged(folder / each) == logged(whole / each), each
        assert files_of(folder / each / "chats") == files_of(whole / each / "chats")
        assert references(folder / each) == references(whole / each)
        left = [path for path in (folder / each).rglob("*") if path.suffix in (".tmp", ".partial", ".lock")]
        assert not left and not list((folder / each).rglob(".unfinished*"))
    places = [str(place.root / run / each) for each in ROUNDS for run in (name, whole_name)]
    states = run_on_ranks(states_on_rank, 1, places)[0]
    for ours, theirs in (states[:2], states[2:]):
        assert ours.keys() == theirs.keys() and len(ours) > 10
        assert all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_the_middle_of_a_round(place: Place, ranks: int, tmp_path: Path) -> None:
    """To one rank, SIGTERM: in a round its step is finished and saved, within the reference's pass nothing is left
    half-written; the same command goes on."""
    folder = place.root / f"stopped-{ranks}"
    moments = [
        ("sft/latest_checkpointed_iteration.txt 2 0 SIGTERM", "SIGTERM: saved", 200),
        ("dpo/reference/train/block-000002.npy 1 0 SIGTERM", "stopped by SIGTERM", 143),
        ("dpo/latest_checkpointed_iteration.txt 3 0 SIGTERM", "SIGTERM: saved", 200),
    ]
    for number, (moment, words, code) in enumerate(moments):
        log = tmp_path / f"stopped-{number}"
        assert place.run(f"stopped-{ranks}", ranks, moment, log) == code, shown(log)
        assert words in shown(log) and "same command goes on" in shown(log) and "Traceback" not in shown(log)
    log = tmp_path / "last"
    assert place.run(f"stopped-{ranks}", ranks, NEVER, log) == 0, shown(log)
    assert "sft: done before" in shown(log)
    assert [row["iteration"] for row in logged(folder / "dpo") if row["kind"] == "train"] == list(range(1, STEPS + 1))
    assert not os.listdir(folder / "dpo" / "reference" / "train").count("block-000000.npy")
