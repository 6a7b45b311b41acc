"""How long training stands still for a checkpoint that is written while it goes on, beside one that it waits for.

    python benchmarks/save.py                  118 million parameters, fp32, 1.9 GB with Adam's moments, one rank
    python benchmarks/save.py --ranks 2        the same on two data-parallel ranks, each with half the optimizer's state
    python benchmarks/save.py --repeats 7 --folder /scratch/x      on another disk; on a GPU where there is one

Each repeat saves the same state twice: while training waits, and then in the background under steps of training.
Stalled is the time within the calls that begin and finish the second, of the first rank; all ranks come to these at the
same time, since who waits there for a slower rank waits less in its next step. How much longer its steps take
than steps without a save is said beside it, since the writer shares the processor's cores and copies what training
changes. The manifests must be equal. Medians over the repeats; ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY, SEQUENCE, BATCH = 32768, 32, 1
SHAPE = {
    "family": "llama",
    "num_layers": 4,
    "hidden_size": 1024,
    "ffn_hidden_size": 2752,
    "num_attention_heads": 8,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rotary_base": 10000.0,
}


class Training:
    """A model that trains on random ids, and its checkpoints in `folder`."""

    def __init__(self, folder: Path) -> None:
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
        from minitron_mcore.training.step import Trained

        self.folder, self.runtime = folder, start()
        use_layout(ParallelConfig(), self.runtime.world_size)
        seed_everything(1)
        self.architecture = build_architecture(SHAPE)
        models = build_model(self.architecture, ParallelConfig(), "fp32")
        initialize(models, self.architecture, seed=1)
        self.parameters = sum(parameter.numel() for parameter in models[0].parameters())
        batch = BATCH * self.runtime.world_size
        train = TrainConfig(tokens=1000 * batch * SEQUENCE, global_batch_size=batch, micro_batch_size=BATCH)
        timetable = plan_timetable(train, SEQUENCE, "train")
        self.shape = timetable.at(0).shape
        self.trained = Trained.of(models, train, timetable)
        self.objective = Objective(LossSettings(vocab_size=VOCABULARY))
        self.batch = self._batch()

    def _batch(self) -> list[Any]:
        from minitron_mcore.model.microbatch import Microbatch

        ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
        positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
        batch = Microbatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(BATCH, SEQUENCE), positions)
        return [batch.to(torch.cuda.current_device())]

    def step(self) -> float:
        """Seconds of a step."""
        from minitron_mcore.training.step import train_step

        return seconds(lambda: train_step(self.trained, self.objective, self.shape, self.batch))

    @staticmethod
    def _on_any_rank(state: int) -> int:
        number = torch.tensor(state, device=torch.cuda.current_device())
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)

    def _arguments(self, name: str) -> tuple[Any, ...]:
        return self.folder / name, {"iteration": 1}, self.runtime, self.architecture, lambda: None

    def save(self) -> float:
        """Seconds of a save that training waits for."""
        return seconds(lambda: self.trained.save(*self._arguments("waits")))

    def save_under_steps(self) -> tuple[float, float, float, list[float]]:
        """Seconds of the call that begins a save, of the one that finishes it, from one to the other, and of the steps
        that were done meanwhile."""
        torch.distributed.barrier()
        begun = time.perf_counter()
        under_way = self.trained.begin_save(*self._arguments("goes on"))
        beginning = time.perf_counter() - begun
        steps = [self.step()]
        while self._on_any_rank(under_way.state) == under_way.WRITING:
            steps.append(self.step())
        between = time.perf_counter() - begun
        torch.distributed.barrier()
        return beginning, seconds(under_way.finish), between, steps


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure(repeats: int, folder: Path) -> dict[str, Any]:
    training = Training(folder)
    training.step()
    rows: list[dict[str, float]] = []
    for repeat in range(repeats):
        for name in ("waits", "goes on"):
            training.runtime.on_main(partial(shutil.rmtree, folder / name, ignore_errors=True))
        plain = statistics.mean(training.step() for _ in range(3))

        waited = training.save()
        manifest = read_tensors(folder / "waits")
        beginning, finishing, between, steps = training.save_under_steps()
        if read_tensors(folder / "goes on") != manifest:
            raise SystemExit("the two saves hold different tensors")
        rows.append(
            {
                "waited": waited,
                "beginning": beginning,
                "finishing": finishing,
                "stalled": (beginning + finishing) / waited,
                "written_after": between,
                "slower_steps": (sum(steps) - plain * len(steps)) / waited,
            }
        )
        said = ", ".join(f"{name} {value:.3f}" for name, value in rows[-1].items())
        training.runtime.print(f"repeat {repeat + 1}: {said}")
    median = {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]}
    size = sum(path.stat().st_size for path in (folder / "waits").rglob("*.distcp"))
    return {
        "benchmark": "save",
        "summary": f"stalled {100 * median['stalled']:.1f}% of the {median['waited']:.2f} s that a save takes",
        "parameters": training.parameters,
        "gigabytes": round(size / 1e9, 3),
        **median,
        "stalled_spread": [round(bound([row["stalled"] for row in rows]), 4) for bound in (min, max)],
        "repeats": repeats,
        "ranks": training.runtime.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def read_tensors(folder: Path) -> Any:
    return json.loads((folder / "iter_0000001" / "manifest.json").read_text())["tensors"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks, started by torchrun")
    parser.add_argument("--hidden-size", type=int, default=1024, help="of 4 layers; a multiple of 16")
    parser.add_argument("--small", action="store_true", help="a model of a few megabytes, for a trial")
    parser.add_argument("--folder", type=Path, help="where to save; a temporary folder by default")
    options = parser.parse_args()
    if options.ranks > 1 and "RANK" not in os.environ:
        with tempfile.TemporaryDirectory(dir=options.folder) as shared:
            launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.ranks}"]
            raise SystemExit(subprocess.call([*launch, *sys.argv, f"--folder={shared}"]))
    torch.set_num_threads(options.threads)
    wide = options.hidden_size
    SHAPE.update(hidden_size=wide, ffn_hidden_size=wide * 43 // 16, kv_channels=wide // 8)
    if options.small:
        SHAPE.update(num_layers=2, hidden_size=128, ffn_hidden_size=256, kv_channels=16)
    if options.ranks > 1:
        found = measure(options.repeats, options.folder)
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = measure(options.repeats, Path(folder))
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
