"""What alignment is worth: held-out preferences and answers before and after each round, as transformers sees them.

    python launch/docstring_chats.py runs/chats
    for seed in 1234 4321; do
        torchrun --nproc-per-node 2 -m minitron_mcore align --config configs/align-quickstart.yaml \\
            seed=$seed align.checkpoint=runs/align-$seed
    done
    python benchmarks/align.py --chats runs/chats --before runs/quickstart/students/width/distilled \\
        runs/align-1234 runs/align-4321

Each folder is a finished `align` of several rounds. Every round's model is exported, and what is measured is worked out
by transformers alone, in fp32 on the CPU, on chats that no round was trained on:

- *prefers*: the share of pairs whose chosen answer has the higher log-probability, summed (sum), or as a mean over its
  tokens (mean), which does not favour short answers;
- *moved*: the share of pairs whose margin grew against the round before (`rewards/accuracies`);
- *well-formed*: the share of greedy answers of one line that begin with a capital letter, close with a full stop, and
  are ended by the model itself within `--longest` tokens.

Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from minitron_mcore.tables import table

BATCH = 32
SIDES = ("chosen", "rejected")
HEADS = ("prefers (sum)", "prefers (mean)", "moved", "well-formed")


@dataclass
class Seen:
    """log_probs: of each side, float64 [2, pairs], summed; lengths: int64 [2, pairs]; answers: greedy ones."""

    log_probs: torch.Tensor
    lengths: torch.Tensor
    answers: list[str | None] = field(default_factory=list)

    def prefers(self, *, mean: bool) -> float:
        values = self.log_probs / self.lengths if mean else self.log_probs
        return (values[0] > values[1]).double().mean().item()

    def moved(self, before: Seen) -> float:
        chosen, rejected = self.log_probs - before.log_probs
        return (chosen > rejected).double().mean().item()

    @property
    def well_formed(self) -> float:
        return sum(map(is_well_formed, self.answers)) / len(self.answers)


def is_well_formed(answer: str | None) -> bool:
    """Whether the answer is one sentence; None is one that did not end."""
    if not answer:
        return False
    return answer[0].isupper() and answer.endswith(".") and "\n" not in answer


def exported(checkpoint: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "minitron_mcore", "export", f"checkpoint={checkpoint}", f"hf={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


@torch.no_grad()
def log_probs(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """float64 [pairs]: the sum over each answer's tokens."""
    found = []
    for start in range(0, len(prompts), BATCH):
        rows = [*zip(prompts[start : start + BATCH], answers[start : start + BATCH], strict=True)]
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        # Padding on the right is seen by nothing in front of it.
        ids = torch.tensor([[*p, *a, *[0] * (longest - len(p) - len(a))] for p, a in rows])
        logits = model(ids).logits.double().log_softmax(-1)
        for row, (prompt, answer) in enumerate(rows):
            places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
            found.append(logits[row, places, torch.tensor(answer)].sum())
    return torch.stack(found)


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompts: list[list[int]], longest: int) -> list[str | None]:
    """The text of each answer that the end of sentence ends, else None."""
    found: list[str | None] = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )[0, len(prompt) :].tolist()
        ended = out[-1] == tokenizer.eos_token_id
        found.append(tokenizer.decode(out[:-1]).strip(" ") if ended else None)
    return found


def look(folder: Path, tokenizer: Any, records: list[dict[str, Any]], longest: int) -> Seen:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts: list[list[int]] = []
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    for record in records:
        prompt = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer.encode(prompt, add_special_tokens=False))
        for side, name in enumerate(SIDES):
            whole = tokenizer.apply_chat_template(record["prompt"] + record[name], tokenize=False).rstrip("\n")
            ids = tokenizer.encode(whole, add_special_tokens=False)
            if ids[: len(prompts[-1])] != prompts[-1] or ids[-1] != tokenizer.eos_token_id:
                raise SystemExit(f"the answer's tokens do not follow the prompt's, or do not end: {whole!r}")
            sides[side].append(ids[len(prompts[-1]) :])
    return Seen(
        torch.stack([log_probs(model, prompts, answers) for answers in sides]),
        torch.tensor([[len(answer) for answer in answers] for answers in sides]),
        greedy(model, tokenizer, prompts, longest),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="align.checkpoint of a finished run, one for each seed")
    parser.add_argument("--chats", type=Path, required=True, help="what launch/docstring_chats.py wrote")
    parser.add_argument("--before", type=Path, required=True, help="align.load of the runs")
    parser.add_argument("--rounds", nargs="+", default=["sft", "dpo"], help="folders of the rounds, in order")
    parser.add_argument("--longest", type=int, default=64, help="tokens of a greedy answer")
    parser.add_argument("--pairs", type=int, help="so many held-out pairs, instead of all")
    options = parser.parse_args()
    logging.disable_progress_bar()
    lines = (options.chats / "pairs_valid.jsonl").read_text(encoding="utf-8").splitlines()[: options.pairs]
    records = [*map(json.loads, lines)]
    rows: list[tuple[str, ...]] = []
    summary: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        tuned = exported(options.runs[0] / options.rounds[0], Path(scratch) / "tuned")
        tokenizer = AutoTokenizer.from_pretrained(tuned)  # with the chat template, which a base model has none of
        places = [("-", "before", options.before)]
        places += [(run.name, name, run / name) for run in options.runs for name in options.rounds]
        last: dict[str, Seen] = {}
        for number, (run, name, checkpoint) in enumerate(places):
            seen = look(exported(checkpoint, Path(scratch) / str(number)), tokenizer, records, options.longest)
            numbers = {"prefers (sum)": seen.prefers(mean=False), "prefers (mean)": seen.prefers(mean=True)}
            numbers["well-formed"] = seen.well_formed
            if run in last:
                numbers["moved"] = seen.moved(last[run])
            last[run] = seen
            summary.append({"run": run, "round": name, **numbers})
            print(f"{run} {name}: {seen.answers[:3]}", flush=True)
            rows.append((run, name, *(f"{numbers[key]:.1%}" if key in numbers else "-" for key in HEADS)))
    print(f"\n{len(records)} held-out pairs")
    print(table(rows, ("run", "round", *HEADS)))
    print(json.dumps({"pairs": len(records), "models": summary}))


if __name__ == "__main__":
    main()
