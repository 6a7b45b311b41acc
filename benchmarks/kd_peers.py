"""A whole distillation step of ours, in time and memory, against TRL's trainers and a plain transformers loop.

    python benchmarks/kd_peers.py                    hidden 512, vocabulary 128256, sequence 512, batch 4: 16 GB
    python benchmarks/kd_peers.py --peers plain --hidden 128 --vocabulary 32000

A step is the forward passes of teacher and student, the forward KL divergence (temperature 1, mean over the tokens),
backward, clipping at 1.0 and AdamW. The same weights (one Hugging Face folder, ours through `import`), token ids,
threads and number format (fp32, SDPA attention) for all:

plain        transformers and torch alone: whole logits, F.kl_div, fused AdamW
trl_gkd      TRL's GKDTrainer with lmbda=0, which is how it learns given answers: whole logits
trl_chunked  TRL's DistillationTrainer, whose logits exist by chunks; it learns what the student generates, and gets the
             data in its place

TRL's logging, saving and recomputation are off; both of its trainers run one token more a row, their prompt.
Each contestant is a process of its own. Ours stays beside one peer after another and takes turns with it, one step at a
time; medians are compared. Memory is the largest resident set from loading the models on, less what the process held
when all was imported (`empty`); what is above the weights, the gradients and Adam's moments is given too (`above`).
The losses of all steps must agree. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minitron_mcore.tables import table  # noqa: E402

PEERS = ("plain", "trl_gkd", "trl_chunked")
SPEED, MEMORY, LOSSES = 1.5, 0.4, 1e-4  # at least; at most; at most, relative
GB = 1e9


def make_models(folder: Path, options: argparse.Namespace) -> int:
    """Write teacher and student, random, as Hugging Face folders and import them; the bytes that training must hold."""
    from transformers import LlamaConfig, LlamaForCausalLM

    held = 0
    for name, layers, copies in (("teacher", options.teacher_layers, 1), ("student", options.layers, 4)):
        torch.manual_seed(1 + layers + copies)
        config = LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            intermediate_size=options.ffn,
            num_hidden_layers=layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.groups,
            max_position_embeddings=options.sequence + 1,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = LlamaForCausalLM(config)
        held += 4 * copies * sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder / "hf" / name)
        words = ["import", f"hf={folder}/hf/{name}", f"checkpoint={folder}/checkpoint/{name}"]
        done = subprocess.run(
            [sys.executable, "-m", "minitron_mcore", *words], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
    return held


class Contestant:
    """A process that takes a step when it is asked."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace) -> None:
        words = [
            sys.executable,
            str(ROOT / "benchmarks/peers/contestant.py"),
            name,
            str(folder),
            json.dumps(vars(options)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        self.name, self._said = name, (folder / f"{name}.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=environment
        )
        self.empty: int = self._answer()["empty"]
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise RuntimeError(f"{self.name} ended: {self._said.read()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.seconds.append(answer["seconds"])
        self.losses.append(answer["loss"])
        self.peak: int = answer["peak"]

    def close(self) -> None:
        self._process.communicate()
        self._said.close()


def compare(ours: Contestant, peer: Contestant, tokens: int, held: int, repeats: int) -> dict[str, Any]:
    """A step of each that does not count, then `repeats` of them, in turns; what came of it."""
    start = len(ours.seconds) + 1
    for repeat in range(repeats + 1):
        for each in (ours, peer) if repeat % 2 else (peer, ours):
            each.step()
    mine, theirs = ours.seconds[start:], peer.seconds[1:]
    pairs = sorted(b / a for a, b in zip(mine, theirs, strict=True))
    apart = [abs(a - b) / abs(b) for a, b in zip(ours.losses, peer.losses, strict=False)]
    return {
        "tokens_per_second": {"ours": tokens / statistics.median(mine), "peer": tokens / statistics.median(theirs)},
        "speed": statistics.median(theirs) / statistics.median(mine),
        "speed_of_pairs": [pairs[0], statistics.median(pairs), pairs[-1]],
        "time": statistics.median(mine) / statistics.median(theirs),
        "memory": (ours.peak - ours.empty) / (peer.peak - peer.empty),
        "memory_with_process": ours.peak / peer.peak,
        "memory_above": (ours.peak - ours.empty - held) / (peer.peak - peer.empty - held),
        "bytes": {each.name: {"peak": each.peak, "empty": each.empty} for each in (ours, peer)},
        "losses_apart": max(apart),
        "losses": [ours.losses[:4], peer.losses[:4]],
        "seconds": {"ours": mine, "peer": theirs},
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    tokens, results = options.batch * options.sequence, {}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        held = make_models(folder, options)
        ours = Contestant("ours", folder, options)
        for name in options.peers:
            peer = Contestant(name, folder, options)
            results[name] = compare(ours, peer, tokens, held, options.repeats)
            peer.close()
        ours.close()
    return {"held_bytes": held, "results": results}


def met(result: dict[str, Any]) -> list[tuple[str, bool]]:
    """Each goal in words, and whether it is met."""
    return [
        (f"tokens a second {result['speed']:.2f}x, at least {SPEED}x", result["speed"] >= SPEED),
        (f"peak memory {result['memory']:.2f}x, at most {MEMORY}x", result["memory"] <= MEMORY),
        (f"losses {result['losses_apart']:.1e} apart, at most {LOSSES:.0e}", result["losses_apart"] <= LOSSES),
    ]


def show(found: dict[str, Any]) -> None:
    rows = [["against", "ours, tokens/s", "theirs", "ratio (lowest, highest pair)", "ours, peak GB", "theirs", "above"]]
    for name, result in found["results"].items():
        speed, (low, _, high) = result["tokens_per_second"], result["speed_of_pairs"]
        peaks = [(each["peak"] - each["empty"]) / GB for each in result["bytes"].values()]
        above = [f"{peak - found['held_bytes'] / GB:.2f}" for peak in peaks]
        ratio = f"{result['speed']:.2f}x ({low:.2f}, {high:.2f})"
        rates = f"{speed['ours']:.0f}", f"{speed['peer']:.0f}"
        rows.append([name, *rates, ratio, *(f"{peak:.2f}" for peak in peaks), " and ".join(above)])
    print(table(rows[1:], rows[0]))
    print(f"above: of {found['held_bytes'] / GB:.2f} GB of weights, gradients and moments")
    for name, result in found["results"].items():
        for words, well in met(result):
            print(f"{name}: {words}: {'met' if well else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "hidden": (512, "hidden_size of both"),
        "ffn": (1536, "ffn_hidden_size of both"),
        "heads": (8, "num_attention_heads of both"),
        "groups": (4, "num_query_groups of both"),
        "layers": (4, "num_layers of the student"),
        "teacher-layers": (6, "num_layers of the teacher"),
        "vocabulary": (128256, "vocab_size"),
        "sequence": (512, "tokens of a sample"),
        "batch": (4, "samples of a step, in one microbatch"),
        "repeats": (5, "steps of each that count"),
        "threads": (len(os.sched_getaffinity(0)), "threads"),
    }
    for name, (value, words) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words} ({value})")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--folder", help="where to write the models, 1.2 GB")
    options = parser.parse_args()
    options.steps = options.repeats + 1
    found = run(options)
    show(found)
    shown = {name: value for name, value in vars(options).items() if name != "folder"}
    print(json.dumps({"benchmark": "kd_peers", **shown, **found}))


if __name__ == "__main__":
    main()
