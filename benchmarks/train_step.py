"""Tokens a second of our training step against a plain transformers + AdamW loop, on the same model, data and threads.

    python benchmarks/train_step.py                  one process (TP = 1), ratio to the plain loop
    python benchmarks/train_step.py --tensor 2       and on two ranks (TP = 2), which share the threads
    python benchmarks/train_step.py --data 2         and on two that share the batch, with overlap and without
    python benchmarks/train_step.py --tensor 2 --hidden-size 768 --layers 2 --steps 2      of another width

All sides: fp32, SDPA attention, AdamW, clipping at 1.0, the same weights, the same random ids, the same number of
threads, one micro-batch an iteration on each rank. Overlapped, gradients are reduced in buckets of 400,000 parameters,
as many as a layer has, and weights gathered under the next step's forward pass. Repeats are interleaved; medians are
compared. The losses of the first steps must be equal. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY = 4096
SHAPE: dict[str, Any] = {
    "family": "llama",
    "num_layers": 6,
    "hidden_size": 192,
    "ffn_hidden_size": 512,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rotary_base": 10000.0,
}
BATCH, SEQUENCE = 8, 256
BUCKET = 400_000
Run = Callable[[int, int], tuple[float, float]]  # (number of the first step, how many) -> seconds, last loss


def reshape(hidden: int, layers: int) -> None:
    """Another width, with the same proportions and width of heads, and another depth."""
    if hidden % SHAPE["hidden_size"]:
        raise SystemExit(f"train_step: --hidden-size {hidden} must be a multiple of {SHAPE['hidden_size']}")
    times = hidden // SHAPE["hidden_size"]
    grows = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    SHAPE.update({"num_layers": layers} | {name: SHAPE[name] * times for name in grows})


def ids(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)


class Ours:
    """One step of the training loop at the given tensor parallelism, on the rest of the ranks by data parallelism."""

    def __init__(self, tensor: int, overlap: bool = False) -> None:
        from minitron_mcore.architecture import build_architecture
        from minitron_mcore.distillation.logits.settings import LossSettings
        from minitron_mcore.distillation.objective import Objective
        from minitron_mcore.model.gpt import build_model
        from minitron_mcore.model.initialize import initialize
        from minitron_mcore.runtime.config import ParallelConfig
        from minitron_mcore.runtime.parallel import seed_everything, use_layout
        from minitron_mcore.runtime.start import start
        from minitron_mcore.training.budget import plan_timetable
        from minitron_mcore.training.config import TrainConfig
        from minitron_mcore.training.step import Trained, train_step

        self.runtime = start()
        layout = ParallelConfig(tensor=tensor)
        use_layout(layout, self.runtime.world_size)
        seed_everything(1)
        self.architecture = build_architecture(SHAPE)
        self.models = build_model(self.architecture, layout, "fp32")
        initialize(self.models, self.architecture, seed=1)
        budget = 1000 * BATCH * SEQUENCE
        keys: dict[str, Any] = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
        keys |= {"ddp_bucket_size": BUCKET if overlap else None, "lr_decay_style": "constant"}
        train = TrainConfig(tokens=budget, lr=1e-3, min_lr=1e-3, global_batch_size=BATCH, **keys)
        timetable = plan_timetable(train, SEQUENCE, "train")
        trained = Trained.of(self.models, train, timetable)
        objective = Objective(LossSettings(vocab_size=self.architecture.vocab_size))
        self._step = lambda batch: train_step(trained, objective, timetable.at(0).shape, batch)

    def step(self, number: int) -> float:
        from minitron_mcore.model.microbatch import Microbatch
        from minitron_mcore.runtime.groups import data_group

        tokens = ids(number).chunk(data_group().size())[data_group().rank()]
        positions = torch.arange(SEQUENCE).expand(len(tokens), SEQUENCE)
        mask = torch.ones(len(tokens), SEQUENCE)
        batch = Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, positions)
        return self._step([batch])["lm loss"]


class Plain:
    """transformers' LlamaForCausalLM with the same weights, torch's AdamW, clipping."""

    def __init__(self, ours: Ours) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        a = ours.architecture
        config = LlamaConfig(
            vocab_size=a.vocab_size,
            hidden_size=a.hidden_size,
            intermediate_size=a.ffn_hidden_size,
            num_hidden_layers=a.num_layers,
            num_attention_heads=a.num_attention_heads,
            num_key_value_heads=a.num_query_groups,
            head_dim=a.kv_channels,
            rms_norm_eps=a.layernorm_epsilon,
            max_position_embeddings=a.max_position_embeddings,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": a.rotary_base},
        )
        config._attn_implementation = "sdpa"
        self.model = LlamaForCausalLM(config)
        self.model.load_state_dict(hugging_face_weights(ours), strict=True)
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)

    def step(self, number: int) -> float:

        tokens = ids(number)
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def hugging_face_weights(ours: Ours) -> dict[str, torch.Tensor]:
    """Our parameters (TP = 1) under transformers' names."""
    a = ours.architecture
    weights = dict(ours.models[0].named_parameters())
    result = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    q, d = a.heads_per_group, a.kv_channels
    for layer in range(a.num_layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = weights[here + "self_attention.linear_qkv.weight"].view(a.num_query_groups, q + 2, d, a.hidden_size)
        gate, up = weights[here + "mlp.linear_fc1.weight"].chunk(2)
        result |= {
            there + "self_attn.q_proj.weight": qkv[:, :q].reshape(-1, a.hidden_size),
            there + "self_attn.k_proj.weight": qkv[:, q].reshape(-1, a.hidden_size),
            there + "self_attn.v_proj.weight": qkv[:, q + 1].reshape(-1, a.hidden_size),
            there + "self_attn.o_proj.weight": weights[here + "self_attention.linear_proj.weight"],
            there + "mlp.gate_proj.weight": gate,
            there + "mlp.up_proj.weight": up,
            there + "mlp.down_proj.weight": weights[here + "mlp.linear_fc2.weight"],
            there + "input_layernorm.weight": weights[here + "input_layernorm.weight"],
            there + "post_attention_layernorm.weight": weights[here + "pre_mlp_layernorm.weight"],
        }
    return {name: value.detach().clone() for name, value in result.items()}


def seconds_of(side: Any, first: int, steps: int) -> tuple[float, float]:
    """Seconds that `steps` steps from number `first` on took, and the last one's loss."""
    started = time.perf_counter()
    for number in range(first, first + steps):
        loss = side.step(number)
    return time.perf_counter() - started, loss


class Ranks:
    """Our step on several ranks, in processes that sleep until they are asked. words: options for each of them."""

    def __init__(self, count: int, threads: int, *words: str) -> None:
        each = str(max(1, threads // count))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [*command, __file__, "--threads", each, *words], env={**os.environ, "OMP_NUM_THREADS": each}, **pipes
        )

    def seconds(self, first: int, steps: int) -> tuple[float, float]:
        """As `seconds_of`, of the first rank."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{first} {steps}\n")
        self.process.stdin.flush()
        answer = next(line for line in self.process.stdout if line.startswith("["))
        seconds, loss = json.loads(answer)
        return seconds, loss

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def rank_main(options: argparse.Namespace) -> None:
    """What each of `Ranks` runs: the steps that the first one reads, until its input ends."""
    torch.set_num_threads(options.threads)
    ours = Ours(tensor=options.tensor, overlap=options.overlap)
    while True:
        words = sys.stdin.readline().split() if ours.runtime.is_main else []
        asked = torch.tensor([int(word) for word in words] or [0, 0])
        torch.distributed.broadcast(asked, src=0)
        first, steps = asked.tolist()
        if not steps:
            return
        result = seconds_of(ours, first, steps)
        if ours.runtime.is_main:
            print(json.dumps(result), flush=True)


def compare(sides: dict[str, Run], repeats: int, steps: int) -> dict[str, Any]:
    """Tokens a second of every side, and what part they are of the other sides'; the losses of the first steps, which
    are refused where they differ."""
    losses = [[run(number, 1)[1] for run in sides.values()] for number in range(3)]
    assert all(max(row) - min(row) < 1e-4 for row in losses), losses
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            times[name].append(sides[name](3 + repeat * steps, steps)[0])
    rates = {name: BATCH * SEQUENCE * steps / statistics.median(values) for name, values in times.items()}
    ratios = {}
    for name, other in itertools.combinations(sides, 2):
        pairs = [there / here for here, there in zip(times[name], times[other], strict=True)]
        quartiles = statistics.quantiles(pairs, method="inclusive")
        ratios[f"{name} / {other}"] = {
            "medians": round(rates[name] / rates[other], 4),
            "pairs": [round(value, 4) for value in (min(pairs), *quartiles, max(pairs))],
        }
    return {
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratios": ratios,
        "losses_first_steps": [[round(loss, 6) for loss in row] for row in losses],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps a repeat")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--hidden-size", type=int, default=SHAPE["hidden_size"], help="a multiple of 192 (192)")
    parser.add_argument("--layers", type=int, default=SHAPE["num_layers"], help="(6)")
    parser.add_argument("--overlap", action="store_true", help=argparse.SUPPRESS)  # of `Ranks`
    options = parser.parse_args()
    reshape(options.hidden_size, options.layers)
    if "WORLD_SIZE" in os.environ:
        rank_main(options)
        return
    torch.set_num_threads(options.threads)
    ours = Ours(tensor=1)
    sides: dict[str, Run] = {"ours": partial(seconds_of, ours), "transformers": partial(seconds_of, Plain(ours))}
    started: list[Ranks] = []
    shape = ["--hidden-size", str(options.hidden_size), "--layers", str(options.layers)]
    if options.tensor > 1:
        started.append(Ranks(options.tensor, options.threads, "--tensor", str(options.tensor), *shape))
        sides = {f"tensor {options.tensor}": started[0].seconds, **sides}
    if options.data > 1:
        started += [Ranks(options.data, options.threads, *shape, *words) for words in (["--overlap"], [])]
        data = dict(zip((f"data {options.data}, overlapped", f"data {options.data}"), started[-2:], strict=True))
        sides = {**{name: ranks.seconds for name, ranks in data.items()}, **sides}
    result = {"benchmark": "train_step", **compare(sides, options.repeats, options.steps), "threads": options.threads}
    for ranks in started:
        ranks.close()
    for name, rate in result["tokens_per_second"].items():
        print(f"{name:18}{rate:8.0f} tokens/s")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio['medians']:.3f} (pairs: least, quartiles, most {ratio['pairs']})")
    of = {name: getattr(options, name) for name in ("hidden_size", "layers", "repeats", "steps")}
    print(json.dumps({**result, **of}))


if __name__ == "__main__":
    main()
